"""Requests, latents and pictures for the tests of previews."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from ditrelay.runtime.payloads import State, StateValue
from ditrelay.runtime.request import Request, SamplingParams

SECONDS = 10.0


def request(previews: int = 10, side: int = 16, name: str = "r") -> Request:
    params = SamplingParams(prompt="a red apple", height=side, width=side, num_frames=1, previews=previews)
    return Request(request_id=name, params=params)


def picture(seed: int, side: int = 4, channels: int = 3, corners: int = 2) -> tuple[torch.Tensor, np.ndarray]:
    """A latent grid [side, side, channels], and what a VAE would make of it that is linear: pixels of 4 a cell."""
    few = torch.rand(1, channels, corners, corners, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(few, (side, side), mode="bilinear", align_corners=True)
    values = smooth[0].permute(1, 2, 0)
    colours = 200 * values.numpy()[..., [2, 0, 1]] + 20
    return values, np.repeat(np.repeat(np.rint(colours).astype(np.uint8), 4, axis=0), 4, axis=1)


def as_state(grid: torch.Tensor) -> State:
    return {"latents": StateValue(grid.permute(2, 0, 1)[None])}


def wait_until(met: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while not met():
        assert time.monotonic() < until, f"it did not happen within {SECONDS:g} s"
        time.sleep(0.005)
