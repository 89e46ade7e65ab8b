"""Says what a picture shows, by analysis through synthesis: the nearest of all that the drawer could have drawn.

Where things may stand follows from the kind of scene, and the asked background is known. In each slot every emoji in
every paint is composited over that background and compared with the picture's crop; the nearest is what stands there.
Counts and places are read by drawing the asked object in each possible number or at each possible place and taking the
nearest whole picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train_emoji.drawing import Drawer
from tools.train_emoji.layouts import ARRANGEMENTS, Background, Thing, things_array
from tools.train_emoji.words import COLOURS, PLACES

CROP = 24
"""A slot is compared at this many pixels a side, a whole picture at WHOLE."""
WHOLE = 32
FINE = 4
"""Crops are sampled this many times finer first, so that shrinking does not alias."""
SHORTLIST = 96
SHIFTS = (-0.04, 0.0, 0.04)
"""How far (in half widths of the slot) things may stand beside their spot."""
TINTS = 1 + len(COLOURS)


@dataclass(frozen=True)
class Seen:
    """What stands in a slot: the nearest emoji, and the nearest tint of the emoji that was asked for (0: its own)."""

    emoji: int
    tint: int


class Checker:
    """Compares pictures [3, size, size] in -1..1 with what ``drawer`` can draw of its first ``count`` emoji."""

    def __init__(self, drawer: Drawer, count: int) -> None:
        self.drawer, self.device = drawer, drawer.device
        spots = [things_array([Thing(emoji, 0, 0, 1, 0, tint)])[0] for emoji in range(count) for tint in range(TINTS)]
        candidates = torch.from_numpy(np.stack(spots)).to(self.device)
        parts = [self._bank_rows(part) for part in torch.split(candidates, 64)]
        self._bank = torch.cat([rows for rows, _ in parts])
        self._constants = torch.cat([constants for _, constants in parts])

    @torch.no_grad()
    def see(self, picture: Tensor, asked: Thing, background: Background) -> Seen:
        """What stands where ``asked`` should; its emoji and tint serve only to read the colour."""
        shifts = [(dx, dy) for dx in SHIFTS for dy in SHIFTS]
        crops = self._crops(picture, asked, shifts)
        empty = self._crops(self._draw([], background), asked, shifts)
        middle = slice(len(shifts) // 2, len(shifts) // 2 + 1)
        distances = self._distances(slice(None), crops[middle], empty[middle])
        shortlist = distances.topk(min(SHORTLIST, len(distances)), largest=False).indices
        nearest = self._distances(shortlist, crops, empty).argmin()
        painted = slice(asked.emoji * TINTS, (asked.emoji + 1) * TINTS)
        tint = self._distances(painted, crops, empty).argmin()
        return Seen(int(shortlist[nearest]) // TINTS, int(tint))

    @torch.no_grad()
    def count(self, picture: Tensor, asked: Thing, background: Background) -> int:
        """How many of the asked object there are, 1 to 5."""
        scenes = [[asked._replace(x=0, y=0, scale=0.84)]]
        for number, spots in ARRANGEMENTS.items():
            scale = 0.34 if number == 5 else 0.45
            scenes.append([asked._replace(x=x, y=y, scale=scale) for x, y in spots])
        return 1 + self._nearest_scene(picture, scenes, background)

    @torch.no_grad()
    def place(self, picture: Tensor, asked: Thing, background: Background) -> str:
        """At which place of words.PLACES the asked object stands, or "centre"."""
        spots = {"centre": (0.0, 0.0)} | {name: (place.x, place.y) for name, place in PLACES.items()}
        scenes = [[asked._replace(x=x, y=y, scale=0.46)] for x, y in spots.values()]
        return list(spots)[self._nearest_scene(picture, scenes, background)]

    def _nearest_scene(self, picture: Tensor, scenes: list[list[Thing]], background: Background) -> int:
        small = F.adaptive_avg_pool2d(picture.to(self.device), WHOLE)
        drawn = torch.stack([F.adaptive_avg_pool2d(self._draw(things, background), WHOLE) for things in scenes])
        return int((drawn - small).square().sum((1, 2, 3)).argmin())

    def _draw(self, things: list[Thing], background: Background) -> Tensor:
        rows = torch.from_numpy(things_array(things))[None].to(self.device)
        return self.drawer.draw(rows, torch.tensor([background.row()], device=self.device))[0]

    def _crops(self, picture: Tensor, spot: Thing, shifts: list[tuple[float, float]]) -> Tensor:
        """The square around a spot, moved by each shift: [n, 3, CROP, CROP] in 0..1; beyond the frame its border."""
        scale = spot.scale
        moved = [[[scale, 0.0, spot.x + dx * scale], [0.0, scale, spot.y + dy * scale]] for dx, dy in shifts]
        shape = [len(shifts), 3, CROP * FINE, CROP * FINE]
        grid = F.affine_grid(torch.tensor(moved, device=self.device), shape, align_corners=False)
        source = picture.to(self.device).expand(len(shifts), -1, -1, -1)
        found = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
        return F.adaptive_avg_pool2d(found, CROP) / 2 + 0.5

    # A candidate of colour C and opacity A over the empty background E differs from a crop P by C - A E + D, where
    # D = E - P. Squared and multiplied out, what depends on the candidate alone stands apart from what depends on the
    # crop alone, so that the distances to all candidates are one matrix product.

    def _bank_rows(self, things: Tensor) -> tuple[Tensor, Tensor]:
        """What ``_distances`` multiplies with, [m, 8 CROP CROP], and adds, [m]."""
        colour, alpha = (F.adaptive_avg_pool2d(part, CROP) for part in self.drawer.render(things))
        columns = [colour.flatten(1), (colour * alpha).flatten(1), alpha.square().flatten(1), alpha.flatten(1)]
        return torch.cat(columns, 1), colour.square().sum((1, 2, 3))

    def _distances(self, which: slice | Tensor, crops: Tensor, empty: Tensor) -> Tensor:
        """Squared distances of the candidates ``which`` over the empty background to the nearest of the crops."""
        apart = empty - crops
        columns = [2 * apart, -2 * empty, empty.square().sum(1), -2 * (apart * empty).sum(1)]
        query = torch.cat([column.flatten(1) for column in columns], 1)
        products = self._bank[which] @ query.T + apart.square().sum((1, 2, 3))
        return self._constants[which] + products.min(1).values
