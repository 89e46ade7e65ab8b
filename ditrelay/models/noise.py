"""Noise that is drawn while a request is computed: from a generator of the request's own, never the process's.

The loops of diffusers call ``scheduler.step`` without a generator, and some VAEs draw noise between their layers. Both
then draw from the process's global generator: the same request would look different each time, and the ranks of a
replica would denoise different latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ditrelay.models.uploads import AsyncUploads


def draw_from(scheduler: Any, generator: torch.Generator) -> None:
    """Let every step of a request's own ``scheduler`` draw from ``generator``, where its class draws noise at all.

    The generator is an attribute of the scheduler from then on, so that a checkpoint keeps its state.
    """
    if "generator" in inspect.signature(scheduler.step).parameters:
        scheduler.noise_generator = generator
        scheduler_class: Any = type(scheduler)
        scheduler.__class__ = _drawing(scheduler_class)


@cache
def _drawing(scheduler_class: type) -> type:
    """The class, with its steps drawing from ``noise_generator`` where they are given no other."""
    plain_step: Callable[..., Any] = scheduler_class.step  # type: ignore[attr-defined]

    @wraps(plain_step)
    def step(self: Any, model_output: torch.Tensor, *args: Any, **options: Any) -> Any:
        # Noise of a CPU generator goes up to the GPU, which must not hold up the thread that launches the steps.
        with AsyncUploads() if model_output.is_cuda else nullcontext():  # type: ignore[no-untyped-call]
            return plain_step(self, model_output, *args, **{"generator": self.noise_generator, **options})

    return type(scheduler_class.__name__, (scheduler_class,), {"step": step})


def draws_noise(vae: Any) -> bool:
    """Whether a VAE's decoder adds noise between its layers (LTX-Video 0.9.1)."""
    inject = vae.config.get("decoder_inject_noise") or ()
    return any(inject) if isinstance(inject, list | tuple) else bool(inject)


class DrawnFrom(TorchFunctionMode):
    """Inside the block, on this thread, ``torch.randn`` without a generator draws from the one given.

    It is a CPU generator: the same noise on every device.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.randn and options.get("generator") is None:
            device = options.pop("device", None)
            return func(*args, **options | {"generator": self._generator}).to(device)
        return func(*args, **options)
