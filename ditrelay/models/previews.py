"""What a picture will look like before it is done: an estimate of its latents, and their colours without a VAE.

Nothing here knows a family: the estimate comes from the scheduler's noise levels, the colours from pictures that were
decoded before.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ditrelay.runtime.payloads import State, StateValue

if TYPE_CHECKING:
    import numpy.typing as npt

    from ditrelay.models.adapter import Frames

    Grid = npt.NDArray[np.floating[Any]]

LESSONS = 32  # pictures that are learnt from
CELLS = 4096  # of each at most
PIXELS_PER_SPOT = 4  # a latent pixel stands for 8x8 pixels or more; its channels tell more than one colour of them
LEAST_SPOTS = 2
FEW_CHANNELS = 32  # so few are looked at together with those of the eight neighbours
_RIDGE = 1e-4  # share of the features' mean square that keeps apart what few pictures do not


def finished(before: torch.Tensor, scope: object, scheduler: Any) -> torch.Tensor:
    """The latents of a picture without noise, as the model saw it in the last step.

    Flow matching moves along dx/dsigma = v, so x_0 = x - sigma * v: with the latents that the model was given, what it
    said of them, and the noise level at which it was asked. Whatever the scheduler makes of that (two questions a step,
    several steps together, new noise) has no part in it. Nothing waits for the device.

    Args:
        before: the latents before the step.
        scope: the state of the loop after it.
    """
    sigma = scheduler.sigmas[scheduler.step_index - 1]
    velocity = vars(scope)["noise_pred"]
    estimate: torch.Tensor = before.float() - sigma * velocity.float()
    return estimate.to(before.dtype)


def latents_of(scope: object) -> torch.Tensor:
    """Those of a loop, at its last pause."""
    latents = vars(scope)["latents"]
    assert isinstance(latents, torch.Tensor)
    return latents


def in_the_middle(state: State) -> State:
    """The state with one frame of its latents."""
    return {
        name: StateValue(middle_frame(entry.value), entry.kwargs_type)
        if name == "latents" and isinstance(entry.value, torch.Tensor)
        else entry
        for name, entry in state.items()
    }


def middle_frame(latents: torch.Tensor) -> torch.Tensor:
    """[batch, channels, 1, height, width] of a clip's [batch, channels, frames, height, width]; a picture as it is."""
    if latents.ndim != 5:
        return latents
    middle = latents.shape[2] // 2
    return latents[:, :, middle : middle + 1]


def latent_grid(state: State) -> torch.Tensor | None:
    """[height, width, channels] of the latents that decode takes; ``None`` where they are no picture or clip."""
    latents = state["latents"].value if "latents" in state else None
    if not isinstance(latents, torch.Tensor) or latents.ndim not in (4, 5):
        return None
    return middle_frame(latents)[0].reshape(latents.shape[1], *latents.shape[-2:]).permute(1, 2, 0)


def middle_of(frames: Frames, latent_frames: int) -> Frames:
    """The pixels of the latent frame in the middle: the first one makes one frame, the others share the rest."""
    if latent_frames == 1:
        return frames
    each, middle = (len(frames) - 1) // (latent_frames - 1), latent_frames // 2
    return frames[1 + (middle - 1) * each : 1 + middle * each]


class ColourMap:
    """Colours from latents by a linear map, fitted by least squares to pictures that the VAE has decoded.

    A latent pixel's channels (where they are few, its neighbours', too) give the colours of a few spots inside it. The
    sums that the fit needs are kept, the pictures are not. May be used from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lessons = 0
        self._squares: Grid | None = None  # features x features
        self._products: Grid | None = None  # features x colours
        self._map: Grid | None = None

    @property
    def wants_more(self) -> bool:
        return self._lessons < LESSONS

    def learn(self, grid: torch.Tensor, pixels: Frames) -> None:
        """Take in a decoded picture.

        Args:
            grid: its latents [height, width, channels], on the host.
            pixels: uint8 [height, width, 3], a whole multiple of the grid's size; another picture is left out.
        """
        height, width, _ = grid.shape
        cell = pixels.shape[0] // height
        if pixels.shape[:2] != (height * cell, width * cell):
            return
        thin = math.ceil(math.sqrt(height * width / CELLS))
        features, colours = _features(grid, thin), _spots(pixels, cell, thin)
        squares, products = ((features.T @ values).astype(np.float64) for values in (features, colours))
        with self._lock:
            if self._squares is None or self._products is None or self._products.shape != products.shape:
                self._squares, self._products, self._lessons = squares, products, 1
            else:
                self._squares, self._products = self._squares + squares, self._products + products
                self._lessons += 1
            self._map = None

    def draw(self, grid: torch.Tensor) -> Frames | None:
        """uint8 [height, width, 3], as many spots to a latent pixel as were learnt; ``None`` before a lesson."""
        weights = self._solve()
        features = _features(grid)
        if weights is None or weights.shape[0] != features.shape[1]:
            return None
        height, width, _ = grid.shape
        side = math.isqrt(weights.shape[1] // 3)
        spots = (features @ weights).reshape(height, width, side, side, 3)
        pixels = spots.transpose(0, 2, 1, 3, 4).reshape(height * side, width * side, 3)
        drawn: Frames = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
        return drawn

    def _solve(self) -> Grid | None:
        with self._lock:
            if self._map is None and self._squares is not None and self._products is not None:
                ridge = _RIDGE * np.trace(self._squares) / len(self._squares)
                held = self._squares + ridge * np.eye(len(self._squares))
                self._map = np.linalg.solve(held, self._products).astype(np.float32)
            return self._map


def _features(grid: torch.Tensor, thin: int = 1) -> Grid:
    """[cells, features] of every ``thin``-th row and column; the last is 1, for the colour of latents that are 0."""
    values: Grid = grid.float().numpy()
    height, width, channels = values.shape
    views = [values[::thin, ::thin]]
    if channels <= FEW_CHANNELS:
        wide = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
        views = [wide[y : y + height : thin, x : x + width : thin] for y in range(3) for x in range(3)]
    ones = np.ones((*views[0].shape[:2], 1), dtype=np.float32)
    features = np.concatenate([*views, ones], axis=2)
    return features.reshape(-1, features.shape[2])


def _spots(pixels: Frames, cell: int, thin: int) -> Grid:
    """[cells, spots * spots * 3]: the mean colours of the spots of every ``thin``-th row and column of cells."""
    side = min(cell, max(LEAST_SPOTS, cell // PIXELS_PER_SPOT))
    means = np.asarray(Image.fromarray(pixels).reduce(cell // side), dtype=np.float32)
    height, width = pixels.shape[0] // cell, pixels.shape[1] // cell
    spots = means.reshape(height, side, width, side, 3)[::thin, :, ::thin].transpose(0, 2, 1, 3, 4)
    return spots.reshape(-1, side * side * 3)
