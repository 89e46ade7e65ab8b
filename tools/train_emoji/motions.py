"""Clips of moving emoji: what moves how, how it is said, and which emoji never make which motion in training.

A clip is a scene whose things share one motion. A motion is a list of offsets, one a frame: it moves, resizes, turns
or fades a thing that would otherwise stand still. Which emoji make which motion in the evaluation only is decided as in
layouts.py: by a hash of the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.train_emoji import captions as say
from tools.train_emoji.dataset import Emoji
from tools.train_emoji.drawing import Drawer
from tools.train_emoji.layouts import (
    BACKGROUND_COLUMNS,
    COLOUR_NAMES,
    THING_COLUMNS,
    Background,
    Combination,
    Scene,
    Thing,
    choose_background,
    is_held_out,
)

THINGS = 2
PAIR_SHARE = 0.12
PAIR_SCALE = 0.42
COLOUR_SHARE = 0.25
SMALLEST = 0.06
"""The least half width that a thing is drawn with: a growing thing starts as a dot."""

Offsets = tuple[float, float, float, float, float]
"""One frame of a motion: x and y (added, -1..1), scale (a factor), clockwise degrees (added), opacity (a factor)."""


@dataclass(frozen=True)
class Motion:
    """One way to move.

    Attributes:
        phrases: what a caption says after the object; empty strings for the motion that nobody mentions.
        scale: half the width of a single thing that makes it; the picture is 2 wide.
        at: the offsets at a time of 0 (first frame) to 1 (last frame).
        in_place: two things side by side can make it.
    """

    phrases: tuple[str, ...]
    scale: float
    at: Callable[[float], Offsets]
    in_place: bool = False


def _straight(x: float, y: float) -> Callable[[float], Offsets]:
    """From one side to the other; ``x`` and ``y`` say where it ends."""
    return lambda t: (x * (2 * t - 1), y * (2 * t - 1), 1.0, 0.0, 1.0)


def _wave(turns: float, t: float) -> float:
    return float(np.sin(2 * np.pi * turns * t))


def _fade(t: float) -> float:
    return min(1.0, max(0.0, 1.25 * t))


MOTIONS: dict[str, Motion] = {
    "still": Motion(("", "", "standing still", "not moving"), 0.72, lambda t: (0, 0, 1, 0, 1), True),
    "left": Motion(("moving to the left", "moving left", "going left", "flying left"), 0.5, _straight(-0.46, 0)),
    "right": Motion(("moving to the right", "moving right", "going right", "flying right"), 0.5, _straight(0.46, 0)),
    "up": Motion(("moving up", "going up", "rising", "flying up"), 0.5, _straight(0, -0.46)),
    "down": Motion(("moving down", "going down", "falling", "falling down"), 0.5, _straight(0, 0.46)),
    "spin": Motion(("spinning", "turning", "rotating", "spinning around"), 0.66, lambda t: (0, 0, 1, 360 * t, 1), True),
    "swing": Motion(
        ("swinging", "rocking", "wobbling"), 0.62, lambda t: (0.1 * _wave(1, t), 0, 1, 32 * _wave(1, t), 1), True
    ),
    "bounce": Motion(
        ("bouncing", "jumping", "hopping", "bouncing up and down"),
        0.5,
        lambda t: (0, 0.42 - 0.84 * abs(_wave(1, t)), 1, 0, 1),
        True,
    ),
    "shake": Motion(("shaking", "trembling", "shivering"), 0.66, lambda t: (0.16 * _wave(3, t), 0, 1, 0, 1), True),
    "circle": Motion(
        ("moving in a circle", "going in circles", "circling"),
        0.46,
        lambda t: (0.44 * _wave(1, t), -0.44 * _wave(1, t + 0.25), 1, 0, 1),
    ),
    "appear": Motion(("appearing", "fading in"), 0.72, lambda t: (0, 0, 1, 0, _fade(t)), True),
    "vanish": Motion(("disappearing", "fading out", "vanishing"), 0.72, lambda t: (0, 0, 1, 0, _fade(1 - t)), True),
    "grow": Motion(("growing", "getting bigger"), 0.88, lambda t: (0, 0, 0.16 + 0.84 * t, 0, 1), True),
    "shrink": Motion(("shrinking", "getting smaller"), 0.88, lambda t: (0, 0, 1 - 0.84 * t, 0, 1), True),
}
MOTION_NAMES = tuple(MOTIONS)


def motion_table(frames: int) -> NDArray[np.float32]:
    """The offsets of every motion in every frame: [motions, frames, 5]."""
    times = [k / max(1, frames - 1) for k in range(frames)]
    return np.array([[motion.at(time) for time in times] for motion in MOTIONS.values()], np.float32)


@dataclass(frozen=True)
class Clip:
    """A scene and the motion that all its things make; ``scene.caption`` says both."""

    scene: Scene
    motion: str

    def combinations(self, emoji: tuple[Emoji, ...]) -> Iterator[Combination]:
        """What is put together here, named as the split names it."""
        yield from self.scene.combinations(emoji)
        yield from (("motion", emoji[thing.emoji].name, self.motion) for thing in self.scene.things)


class ClipMaker:
    """Makes up clips for training, or with ``held_out`` clips of one emoji in a motion that training never showed."""

    def __init__(self, emoji: tuple[Emoji, ...], seed: int, held_out: bool = False) -> None:
        self.emoji = emoji
        self.random = Random(seed)
        self.held_out = held_out
        self._in_place = [name for name, motion in MOTIONS.items() if motion.in_place]

    def clip(self, motion: str | None = None) -> Clip:
        """A clip of this side of the split; of any motion unless told."""
        while True:
            pair = not self.held_out and self.random.random() < PAIR_SHARE
            name = motion or self.random.choice(self._in_place if pair else MOTION_NAMES)
            clip = self._pair(name) if pair and MOTIONS[name].in_place else self._one(name)
            if self._belongs(clip):
                return clip

    def _belongs(self, clip: Clip) -> bool:
        mixed = list(clip.combinations(self.emoji))
        if self.held_out:
            return any(c[0] == "motion" and is_held_out(c) for c in mixed)
        return not any(is_held_out(combination) for combination in mixed)

    def _near(self, amount: float) -> float:
        return self.random.uniform(-amount, amount)

    def _object(self) -> tuple[int, int, str]:
        """An emoji, its tint and its words."""
        chosen = self.random.randrange(len(self.emoji))
        painted = self.emoji[chosen].takes_colour and self.random.random() < COLOUR_SHARE
        tint = 1 + self.random.randrange(len(COLOUR_NAMES)) if painted else 0
        colour = COLOUR_NAMES[tint - 1] if tint else None
        return chosen, tint, say.describe(self.random, self.emoji[chosen], colour)

    def _one(self, motion: str) -> Clip:
        emoji, tint, words = self._object()
        scale = MOTIONS[motion].scale + self._near(0.03)
        thing = Thing(emoji, self._near(0.02), self._near(0.02), scale, 0, tint)
        return self._finish("one", words, (thing,), motion)

    def _pair(self, motion: str) -> Clip:
        objects = [self._object() for _ in range(2)]
        things = tuple(
            Thing(emoji, side + self._near(0.02), self._near(0.02), PAIR_SCALE + self._near(0.02), 0, tint)
            for side, (emoji, tint, _) in zip((-0.48, 0.48), objects, strict=True)
        )
        return self._finish("pair", f"{objects[0][2]} and {objects[1][2]}", things, motion)

    def _finish(self, kind: str, words: str, things: tuple[Thing, ...], motion: str) -> Clip:
        back: Background = choose_background(self.random)
        phrase = self.random.choice(MOTIONS[motion].phrases)
        caption = say.add_background(self.random, f"{words} {phrase}".strip(), back.words)
        if self.random.random() < 0.05:
            caption = self.random.choice(("a video of ", "a clip of ", "an animation of ")) + caption
        return Clip(Scene("pair" if kind == "pair" else "one", caption, things, back), motion)


@dataclass(frozen=True)
class ClipTable:
    """Many clips as arrays: things [n, 2, 7] (emoji -1: none), backgrounds [n, 11], motions [n], and n captions."""

    things: NDArray[np.float32]
    backgrounds: NDArray[np.float32]
    motions: NDArray[np.int64]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def tabulate_clips(clips: list[Clip]) -> ClipTable:
    """The arrays that ``ClipDrawer`` takes, and the captions."""
    things = np.zeros((len(clips), THINGS, THING_COLUMNS), np.float32)
    things[:, :, 0] = -1
    things[:, :, 3] = 1
    for row, clip in enumerate(clips):
        things[row, : len(clip.scene.things)] = clip.scene.things
    rows = [clip.scene.background.row() for clip in clips]
    backgrounds = np.array(rows, np.float32).reshape(-1, BACKGROUND_COLUMNS)
    motions = np.array([MOTION_NAMES.index(clip.motion) for clip in clips], np.int64)
    return ClipTable(things, backgrounds, motions, [clip.scene.caption for clip in clips])


def make_clip_table(emoji: tuple[Emoji, ...], count: int, seed: int) -> ClipTable:
    """``count`` training clips of one seed."""
    maker = ClipMaker(emoji, seed)
    return tabulate_clips([maker.clip() for _ in range(count)])


class ClipDrawer:
    """Draws batches of clips on a device, with the pictures that its ``Drawer`` keeps there."""

    def __init__(self, drawer: Drawer, frames: int) -> None:
        self.drawer = drawer
        self.frames = frames
        self.device = drawer.device
        self._offsets = torch.from_numpy(motion_table(frames)).to(drawer.device)
        scales = [motion.scale for motion in MOTIONS.values()]
        self._scales = torch.tensor(scales, device=drawer.device)

    @torch.no_grad()
    def draw(self, things: Tensor, backgrounds: Tensor, motions: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Clips [b, 2, 7], [b, 11] and [b], as ``ClipTable`` has them, to [b, 3, frames, size, size] in -1..1.

        ``chosen`` [b, k] are the frames to draw of each clip, all if None.
        """
        placed = self.place(things, motions)
        if chosen is not None:
            placed = placed[torch.arange(len(placed), device=self.device)[:, None], chosen]
        frames = placed.shape[1]
        drawn = self.drawer.draw(placed.flatten(0, 1), backgrounds.repeat_interleave(frames, 0))
        return drawn.unflatten(0, (-1, frames)).transpose(1, 2)

    def place(self, things: Tensor, motions: Tensor) -> Tensor:
        """Where each thing [b, 2, 7] is in each frame: [b, frames, 2, 7]. A smaller thing moves less far."""
        x, y, scale, angle, opacity = self._offsets[motions].unsqueeze(2).unbind(-1)
        placed = things.unsqueeze(1).repeat(1, self.frames, 1, 1)
        reach = placed[..., 3] / self._scales[motions].view(-1, 1, 1)
        placed[..., 1] += x * reach
        placed[..., 2] += y * reach
        placed[..., 3] = (placed[..., 3] * scale).clamp(min=SMALLEST)
        placed[..., 4] += angle
        placed[..., 6] *= opacity
        return placed
