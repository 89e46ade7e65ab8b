"""Draws batches of scenes on a device: backgrounds, then each thing scaled, turned, painted and composited."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tools.train_emoji.words import COLOURS

STARS = 26
LUMINANCE = (0.35, 0.5, 0.15)
MIDDLE_TONE = 0.62
"""A painted object has its full colour at this brightness; darker parts fade to black, lighter ones toward white."""
SOFTER_BELOW = (0.62, 0.4)
"""Things drawn smaller than these take a softer copy of their picture, so that resampling does not alias."""


class Drawer:
    """Keeps the pictures on the device, each at three levels of sharpness, and draws scenes of them.

    ``pictures`` is uint8 [N, size, size, 4], premultiplied; scenes are drawn ``size`` pixels wide.
    """

    def __init__(self, pictures: NDArray[np.uint8], device: torch.device, size: int = 128) -> None:
        self.size = size
        self.device = device
        chunks = torch.split(torch.from_numpy(pictures), 256)
        self._pictures = torch.cat([_sharpness_levels(chunk.to(device), size) for chunk in chunks], 1)
        paints = [(255.0, 255.0, 255.0), *COLOURS.values()]
        self._paints = torch.tensor(paints, device=device) / 255
        self._luminance = torch.tensor(LUMINANCE, device=device).view(1, 3, 1, 1)
        self._rows = ((torch.arange(size, device=device) + 0.5) / size * 2 - 1).view(1, 1, size, 1)
        self._stars = _starry_sky(size).to(device).view(1, 1, size, size)

    @torch.no_grad()
    def draw(self, things: Tensor, backgrounds: Tensor) -> Tensor:
        """Scenes [b, k, 7] and [b, 11], as layouts.py tabulates them, to pictures [b, 3, size, size] in -1..1."""
        picture = self._background(backgrounds)
        for slot in things.unbind(1):
            rows = (slot[:, 0] >= 0).nonzero().squeeze(1)
            if len(rows):
                colour, opacity = self.render(slot[rows])
                picture[rows] = picture[rows] * (1 - opacity) + colour
        return picture.clamp(0, 1) * 2 - 1

    def _background(self, backgrounds: Tensor) -> Tensor:
        top, bottom, ground = (backgrounds[:, k : k + 3].view(-1, 3, 1, 1) / 255 for k in (0, 3, 6))
        horizon, stars = (backgrounds[:, k].view(-1, 1, 1, 1) for k in (9, 10))
        fade = ((self._rows + 1) / (horizon.clamp(max=1) + 1)).clamp(0, 1)
        sky = (top * (1 - fade) + bottom * fade + stars * self._stars).clamp(max=1)
        below = ((self._rows - horizon) * 24 + 0.5).clamp(0, 1)
        return (sky * (1 - below) + ground * below).expand(-1, 3, self.size, self.size).clone()

    def render(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Premultiplied colour [m, 3, size, size] and opacity [m, 1, size, size] of one thing in each of m scenes."""
        emoji, x, y, scale, angle, tint, opacity = slot.unbind(1)
        level = sum((scale < limit).long() for limit in SOFTER_BELOW)
        picture = self._pictures[level, emoji.long()].float()
        turn = torch.deg2rad(angle)
        cos, sin = turn.cos() / scale, turn.sin() / scale
        rows = [torch.stack([cos, sin, -(cos * x + sin * y)], -1), torch.stack([-sin, cos, sin * x - cos * y], -1)]
        shape = [len(slot), 4, self.size, self.size]
        grid = F.affine_grid(torch.stack(rows, 1), shape, align_corners=False)
        # Bicubic keeps edges crisp where a picture shrinks by a few per cent; it overshoots, hence the clamps.
        drawn = F.grid_sample(picture, grid, mode="bicubic", align_corners=False).clamp(0, 1)
        alpha = drawn[:, 3:]
        colour = torch.minimum(drawn[:, :3], alpha)
        colour = torch.where((tint > 0).view(-1, 1, 1, 1), self._paint(colour, alpha, tint.long()), colour)
        visible = opacity.view(-1, 1, 1, 1)
        return colour * visible, alpha * visible

    def _paint(self, colour: Tensor, alpha: Tensor, tint: Tensor) -> Tensor:
        """The object in one paint: its brightness stays, its hues go."""
        paint = self._paints[tint].view(-1, 3, 1, 1)
        light = ((colour * self._luminance).sum(1, True) / alpha.clamp(min=1e-3)).clamp(0, 1)
        dark_side = paint * light / MIDDLE_TONE
        light_side = paint + (1 - paint) * (light - MIDDLE_TONE) / (1 - MIDDLE_TONE) * 0.8
        return torch.where(light < MIDDLE_TONE, dark_side, light_side) * alpha


def _sharpness_levels(pictures: Tensor, size: int) -> Tensor:
    """uint8 [n, s, s, 4] to float16 [3, n, 4, size, size]: as it is, and at a half and a third of its detail."""
    whole = pictures.permute(0, 3, 1, 2).float() / 255
    if whole.shape[-1] != size:
        whole = F.interpolate(whole, (size, size), mode="area")
    levels = [whole]
    for shrink in (2, 3):
        less = F.interpolate(whole, (size // shrink, size // shrink), mode="area")
        levels.append(F.interpolate(less, (size, size), mode="bilinear"))
    return torch.stack(levels).half()


def _starry_sky(size: int) -> Tensor:
    """The same stars for every picture of a size: [size, size] in 0..1."""
    random = torch.Generator().manual_seed(7)
    down, across = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    sky = torch.zeros(size, size)
    for _ in range(STARS):
        y, x, spread = torch.rand(3, generator=random).tolist()
        distance = (down - y * size) ** 2 + (across - x * size) ** 2
        sky += torch.exp(-distance / (2 * (0.5 + spread * 0.7) ** 2))
    return sky.clamp(0, 1)
