"""Scenes on the device: pictures drawn ahead for the VAE, and a pool of encoded scenes for the transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.train_emoji.drawing import Drawer
from tools.train_emoji.layouts import SceneTable

DRAWN_AT_ONCE = 1024


@dataclass(frozen=True)
class DeviceTable:
    """A scene table on the device."""

    things: Tensor
    backgrounds: Tensor

    @classmethod
    def of(cls, table: SceneTable, device: torch.device) -> DeviceTable:
        """Copies the arrays of ``table`` over."""
        return cls(torch.from_numpy(table.things).to(device), torch.from_numpy(table.backgrounds).to(device))

    def __len__(self) -> int:
        return len(self.things)

    def draw(self, drawer: Drawer, rows: Tensor | slice) -> Tensor:
        """The pictures of these rows, [b, 3, size, size] in -1..1."""
        return drawer.draw(self.things[rows], self.backgrounds[rows])


@dataclass(frozen=True)
class LatentPool:
    """Encoded scenes [n, c, h, w] and their captions on the device; the caption after the last is the empty one."""

    latents: Tensor
    tokens: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def random_pictures(table: DeviceTable, drawer: Drawer, batch: int) -> Iterator[Tensor]:
    """Batches of random scenes without end; drawing many at once keeps the device from waiting for Python."""
    at_once = max(batch, min(DRAWN_AT_ONCE, len(table)) // batch * batch)
    while True:
        rows = torch.randint(len(table), (at_once,), device=drawer.device)
        yield from torch.split(table.draw(drawer, rows), batch)


@torch.no_grad()
def encode_table(
    table: DeviceTable, drawer: Drawer, encode: Callable[[Tensor], Tensor], batch: int = DRAWN_AT_ONCE
) -> Tensor:
    """All scenes as latents, bfloat16 [n, c, h, w]; ``encode`` always gets a full batch, so it compiles once."""
    parts = []
    for start in range(0, len(table), batch):
        rows = torch.arange(start, start + batch, device=drawer.device).clamp(max=len(table) - 1)
        parts.append(encode(table.draw(drawer, rows))[: len(table) - start].to(torch.bfloat16))
    return torch.cat(parts)
