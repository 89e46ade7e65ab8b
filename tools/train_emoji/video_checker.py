"""Says what a clip shows by drawing what it could show and taking the nearest: which motion, which emoji, which colour.

The clip is compared with every motion of the named emoji, frame by frame at 32x32 pixels. Then the frame where the
emoji should be whole and upright goes to the picture checker, which compares the place where it should stand with every
emoji in every colour. A round thing spins as it stands still: such clips are not asked for (``is_telling``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train_emoji.checker import Checker
from tools.train_emoji.drawing import Drawer
from tools.train_emoji.layouts import Thing
from tools.train_emoji.motions import MOTION_NAMES, MOTIONS, Clip, ClipDrawer, motion_table, tabulate_clips

COMPARED_SIZE = 32
TELLING = 0.002
"""The least mean squared difference (of -1..1) between a motion and all others of the same thing."""


@dataclass(frozen=True)
class Verdict:
    """What a clip shows: a motion, the position of an emoji, and a tint (0: its own colours)."""

    motion: str
    emoji: int
    tint: int


class ClipChecker:
    """Judges clips of one thing each.

    ``small`` draws the motions to compare with, at 32 pixels; ``pictures`` knows the emoji at the clips' own size.
    """

    def __init__(self, small: Drawer, pictures: Checker, frames: int) -> None:
        self.device = small.device
        self._motions = ClipDrawer(small, frames)
        self._pictures = pictures
        self._offsets = motion_table(frames)
        self._clearest = [clearest_frame(motion, frames) for motion in MOTION_NAMES]

    def judge(self, clip: Tensor, truth: Clip) -> Verdict:
        """What the clip [3, frames, size, size] in -1..1 shows, where ``truth`` was asked for."""
        clip = clip.to(self.device)
        small = F.interpolate(clip.transpose(0, 1), (COMPARED_SIZE, COMPARED_SIZE), mode="area").transpose(0, 1)
        distances = (self._draw_motions(truth) - small).square().mean((1, 2, 3, 4))
        frame = self._clearest[MOTION_NAMES.index(truth.motion)]
        seen = self._pictures.see(clip[:, frame], self._place(truth, frame), truth.scene.background)
        return Verdict(MOTION_NAMES[int(distances.argmin())], seen.emoji, seen.tint)

    def is_telling(self, truth: Clip) -> bool:
        """Whether the clip that was asked for differs from the same thing in any other motion."""
        drawn = self._draw_motions(truth)
        named = MOTION_NAMES.index(truth.motion)
        distances = (drawn - drawn[named]).square().mean((1, 2, 3, 4))
        distances[named] = torch.inf
        return bool(distances.min() > TELLING)

    def _draw_motions(self, truth: Clip) -> Tensor:
        """The thing that was asked for in each motion: [motions, 3, frames, 32, 32] in -1..1."""
        asked = truth.scene.things[0]
        clips = [
            Clip(replace(truth.scene, things=(asked._replace(x=0, y=0, scale=motion.scale),)), name)
            for name, motion in MOTIONS.items()
        ]
        table = tabulate_clips(clips)
        arrays = (table.things, table.backgrounds, table.motions)
        return self._motions.draw(*(torch.from_numpy(array).to(self.device) for array in arrays))

    def _place(self, truth: Clip, frame: int) -> Thing:
        """Where the thing should be in this frame."""
        x, y, factor, _, _ = self._offsets[MOTION_NAMES.index(truth.motion), frame].tolist()
        return truth.scene.things[0]._replace(x=x, y=y, scale=MOTIONS[truth.motion].scale * factor, angle=0.0)


def clearest_frame(motion: str, frames: int) -> int:
    """The frame where a motion shows its thing upright and largest; of several, the one nearest to the middle."""
    offsets = motion_table(frames)[MOTION_NAMES.index(motion)]
    upright = abs((offsets[:, 3] + 180) % 360 - 180) < 1
    visible = offsets[:, 2] * offsets[:, 4] * upright
    good = [frame for frame in range(frames) if visible[frame] > visible.max() - 1e-3]
    return min(good, key=lambda frame: abs(frame - frames // 2))
