"""A VAE whose encoded picture is drawn from its distribution where a block asks for the most likely one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


class SampledVae:
    """Stands in for ``vae`` in one request, whose ``generator`` it draws from.

    Qwen-Image's modular block takes the most likely latents; the stock pipeline (``QwenImageImg2ImgPipeline``) draws.
    """

    def __init__(self, vae: Any, generator: torch.Generator) -> None:
        self._vae = vae
        self._generator = generator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, pixels: torch.Tensor) -> Any:
        distribution = self._vae.encode(pixels).latent_dist
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: distribution.sample(self._generator)))
