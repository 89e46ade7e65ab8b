"""Stand-ins for components, in one request, where a block treats a picture otherwise than the stock pipeline does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from ditrelay.models.quirks import Family


def stand_in(pipeline: Any, family: Family, image: Image.Image, generator: torch.Generator) -> None:
    """Give a request's own pipeline the stand-ins that its family needs.

    Args:
        image: the request's picture as it came.
        generator: the request's.
    """
    if family.whole_picture:
        pipeline.image_processor = WholePicture(pipeline.image_processor, image)
    if family.sampled_picture:
        pipeline.vae = SampledVae(pipeline.vae, generator)


class SampledVae:
    """A VAE whose encoded picture is drawn from its distribution, by ``generator``.

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


class WholePicture:
    """An image processor that prepares ``image``, whatever picture it is called with.

    Wan's modular blocks show the image encoder what the VAE gets, stretched to the clip's size; the stock pipeline
    (``WanImageToVideoPipeline``) shows it the picture as it came.
    """

    def __init__(self, processor: Any, image: Image.Image) -> None:
        self._processor = processor
        self._image = image

    def __call__(self, images: object, **options: Any) -> Any:
        return self._processor(images=self._image, **options)
