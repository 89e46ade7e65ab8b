"""Random scenes made of single emoji, with their captions, and the split that keeps combinations unseen.

A scene names up to five things on a background. Which combinations (two objects together, an object in a colour, in a
number, at a place or before a scenery) are kept for the evaluation is decided by a hash of their names alone: training
never draws a scene that holds one of them, whatever its seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.train_emoji import captions as say
from tools.train_emoji.dataset import Emoji
from tools.train_emoji.words import BACKGROUND_COLOURS, BIG, COLOURS, PLACES, SCENERY, SMALL, Rgb, indefinite

MAX_THINGS = 5
THING_COLUMNS = 7
BACKGROUND_COLUMNS = 11
HELD_OUT_SHARE = 0.08
SCENES_AT_ONCE = 8192
"""A scene is some dozen objects: so many are made before they become arrays."""
COLOUR_NAMES = tuple(COLOURS)
PLAIN_NAMES_WORDS = 3

Kind = Literal["one", "sized", "placed", "turned", "pair", "row", "several"]
Combination = tuple[str, ...]

SHARES: dict[Kind, float] = {
    "one": 0.34,
    "sized": 0.04,
    "placed": 0.08,
    "turned": 0.03,
    "pair": 0.28,
    "row": 0.08,
    "several": 0.15,
}
TESTED: dict[Kind, str] = {"one": "colour", "placed": "place", "pair": "pair", "row": "pair", "several": "count"}
"""Which sort of combination a held-out scene of a kind must show."""

ARRANGEMENTS: dict[int, tuple[tuple[float, float], ...]] = {
    2: ((-0.48, 0), (0.48, 0)),
    3: ((0, -0.46), (-0.48, 0.44), (0.48, 0.44)),
    4: ((-0.48, -0.48), (0.48, -0.48), (-0.48, 0.48), (0.48, 0.48)),
    5: ((-0.62, -0.62), (0.62, -0.62), (0, 0), (-0.62, 0.62), (0.62, 0.62)),
}
"""Centres of several equal things, by their number."""


class Thing(NamedTuple):
    """One object: which emoji, centre (-1..1, y down), half its width, clockwise degrees, tint (0: none), opacity."""

    emoji: int
    x: float
    y: float
    scale: float
    angle: float = 0.0
    tint: int = 0
    opacity: float = 1.0


class Background(NamedTuple):
    """Words ("" when unsaid), the colours drawing.py paints, and the scenery's name if it is one."""

    words: str
    top: Rgb
    bottom: Rgb
    ground: Rgb
    horizon: float = 2.0
    stars: float = 0.0
    scenery: str | None = None

    def row(self) -> tuple[float, ...]:
        """The 11 numbers that drawing.py takes."""
        return (*self.top, *self.bottom, *self.ground, self.horizon, self.stars)


@dataclass(frozen=True)
class Scene:
    """A caption, what it shows, and where the things stand."""

    kind: Kind
    caption: str
    things: tuple[Thing, ...]
    background: Background
    place: str | None = None

    def combinations(self, emoji: tuple[Emoji, ...]) -> Iterator[Combination]:
        """What is put together here, named as the split names it."""
        names = {thing.emoji: emoji[thing.emoji].name for thing in self.things}
        for pair in combinations(sorted(names.values()), 2):
            yield ("pair", *pair)
        for thing in self.things:
            if thing.tint:
                yield ("colour", names[thing.emoji], COLOUR_NAMES[thing.tint - 1])
        if self.kind == "several":
            yield ("count", names[self.things[0].emoji], str(len(self.things)))
        for where in (self.place, self.background.scenery):
            if where:
                yield from (("place", name, where) for name in names.values())


def is_held_out(combination: Combination) -> bool:
    """Whether the evaluation keeps this combination for itself; the same on every machine and in every run."""
    digest = hashlib.blake2b("|".join(combination).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**32


def plain_background(colour: Rgb = (255, 255, 255), words: str = "") -> Background:
    """One colour everywhere (white unless told)."""
    return Background(words, colour, colour, colour)


def scenery_background(name: str) -> Background:
    """The scenery of that name."""
    return Background(name, *SCENERY[name], scenery=name)


def choose_background(random: Random, plain_share: float = 0.5, scenery: bool = True) -> Background:
    """White and mostly unsaid for ``plain_share`` of the scenes, else a colour or a scenery."""
    if random.random() < plain_share:
        return plain_background(words="on a white background" if random.random() < 0.06 else "")
    if scenery and random.random() < 0.38:
        return scenery_background(random.choice(list(SCENERY)))
    name = random.choice(list(BACKGROUND_COLOURS))
    red, green, blue = (min(255.0, max(0.0, level + random.uniform(-8, 8))) for level in BACKGROUND_COLOURS[name])
    ways = [f"on {indefinite(name)} background"] * 4
    ways += [f"with {indefinite(name)} background", f"on {name}", f"{name} background"]
    return plain_background((255, 255, 255) if name == "white" else (red, green, blue), random.choice(ways))


class SceneMaker:
    """Makes up scenes for training, or with ``held_out`` scenes whose tested combination training never saw."""

    def __init__(self, emoji: tuple[Emoji, ...], seed: int, held_out: bool = False) -> None:
        self.emoji = emoji
        self.random = Random(seed)
        self.held_out = held_out
        everything = range(len(emoji))
        self._countable = [k for k in everything if emoji[k].countable] or list(everything)
        self._short = [k for k in everything if len(emoji[k].name.split()) <= PLAIN_NAMES_WORDS] or list(everything)
        self._makers: dict[Kind, Callable[[], Scene]] = {
            "one": self._one,
            "sized": self._sized,
            "placed": self._placed,
            "turned": self._turned,
            "pair": self._pair,
            "row": self._row,
            "several": self._several,
        }

    def scene(self, kind: Kind | None = None) -> Scene:
        """A scene of this side of the split; of any kind in the usual shares unless told."""
        while True:
            chosen = kind or self.random.choices(list(SHARES), list(SHARES.values()))[0]
            scene = self._makers[chosen]()
            if self._belongs(scene):
                return scene

    def _belongs(self, scene: Scene) -> bool:
        mixed = list(scene.combinations(self.emoji))
        if not self.held_out:
            return not any(is_held_out(combination) for combination in mixed)
        return any(c[0] == TESTED[scene.kind] and is_held_out(c) for c in mixed)

    def _near(self, amount: float) -> float:
        return self.random.uniform(-amount, amount)

    def _colour(self, emoji: int, share: float) -> tuple[int, str | None]:
        if not self.emoji[emoji].takes_colour or self.random.random() >= share:
            return 0, None
        tint = self.random.randrange(len(COLOUR_NAMES))
        return tint + 1, COLOUR_NAMES[tint]

    def _object(self, colour_share: float, size: str | None = None, short: bool = False) -> tuple[int, int, str]:
        """An emoji, its tint and its words."""
        chosen = self.random.choice(self._short) if short else self.random.randrange(len(self.emoji))
        tint, colour = self._colour(chosen, colour_share)
        return chosen, tint, say.describe(self.random, self.emoji[chosen], colour, size)

    def _finish(self, kind: Kind, words: str, things: list[Thing], back: Background, place: str | None = None) -> Scene:
        caption = say.add_flourish(self.random, say.add_background(self.random, words, back.words))
        return Scene(kind, caption, tuple(things), back, place)

    def _one(self) -> Scene:
        emoji, tint, words = self._object(0.35)
        thing = Thing(emoji, self._near(0.03), self._near(0.03), 0.84 + self._near(0.03), 0, tint)
        return self._finish("one", words, [thing], choose_background(self.random))

    def _sized(self) -> Scene:
        small = self.random.random() < 0.6
        emoji, tint, words = self._object(0.15, self.random.choice(SMALL if small else BIG))
        scale = (0.40 if small else 1.12) + self._near(0.03)
        thing = Thing(emoji, self._near(0.05), self._near(0.05), scale, 0, tint)
        return self._finish("sized", words, [thing], choose_background(self.random))

    def _placed(self) -> Scene:
        name = self.random.choice(list(PLACES))
        place = PLACES[name]
        emoji, tint, words = self._object(0.2)
        thing = Thing(emoji, place.x + self._near(0.03), place.y + self._near(0.03), 0.46 + self._near(0.02), 0, tint)
        words = f"{words} {self.random.choice(place.phrases)}"
        return self._finish("placed", words, [thing], choose_background(self.random), name)

    def _turned(self) -> Scene:
        emoji, tint, words = self._object(0.15)
        if self.random.random() < 0.6:
            angle, scale, words = 180.0, 0.84, say.upside_down(self.random, words)
        else:
            right = self.random.random() < 0.5
            angle, scale, words = (
                (35.0 if right else -35.0),
                0.74,
                f"{words} tilted to the {'right' if right else 'left'}",
            )
        thing = Thing(emoji, self._near(0.03), self._near(0.03), scale, angle, tint)
        return self._finish("turned", words, [thing], choose_background(self.random))

    def _pair(self) -> Scene:
        sizes: list[str | None] = [None, None]
        if self.random.random() < 0.1:
            sizes = ["big", "small"] if self.random.random() < 0.5 else ["small", "big"]
        objects = [self._object(0.4, size) for size in sizes]
        scales = [{"big": 0.54, "small": 0.28}.get(size or "", 0.46) + self._near(0.015) for size in sizes]
        beside = self.random.random() < 0.68
        join = say.join_beside if beside else say.join_above
        words, swapped = join(self.random, objects[0][2], objects[1][2])
        ends = (0.48, -0.48) if swapped else (-0.48, 0.48)
        spots = [(end, 0.0) if beside else (0.0, end) for end in ends]
        things = [
            Thing(emoji, x + self._near(0.02), y + self._near(0.02), scale, 0, tint)
            for (emoji, tint, _), (x, y), scale in zip(objects, spots, scales, strict=True)
        ]
        return self._finish("pair", words, things, choose_background(self.random, 0.55))

    def _row(self) -> Scene:
        objects = [self._object(0.3, short=True) for _ in range(3)]
        things = [
            Thing(emoji, 0.66 * (k - 1) + self._near(0.01), self._near(0.03), 0.32, 0, tint)
            for k, (emoji, tint, _) in enumerate(objects)
        ]
        words = say.join_row(*(words for _, _, words in objects))
        return self._finish("row", words, things, choose_background(self.random, 0.6, scenery=False))

    def _several(self) -> Scene:
        emoji = self.random.choice(self._countable)
        count = self.random.choice([2, 2, 3, 3, 4, 4, 5])
        tint, colour = self._colour(emoji, 0.3)
        scale = 0.34 if count == 5 else 0.45
        things = [
            Thing(emoji, x + self._near(0.015), y + self._near(0.015), scale, 0, tint) for x, y in ARRANGEMENTS[count]
        ]
        words = say.describe_many(self.random, self.emoji[emoji], count, colour)
        return self._finish("several", words, things, choose_background(self.random, 0.55))


@dataclass(frozen=True)
class SceneTable:
    """Many scenes as arrays: things [n, 5, 7] (emoji -1: none), backgrounds [n, 11], and n captions."""

    things: NDArray[np.float32]
    backgrounds: NDArray[np.float32]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def things_array(things: Sequence[Thing]) -> NDArray[np.float32]:
    """Things as drawing.py takes them, [5, 7]; the rows that are left over hold none (emoji -1)."""
    rows = np.zeros((MAX_THINGS, THING_COLUMNS), np.float32)
    rows[:, 0], rows[:, 3] = -1, 1
    if things:
        rows[: len(things)] = things
    return rows


def tabulate(scenes: Sequence[Scene]) -> SceneTable:
    """The arrays that drawing.py takes, and the captions."""
    things = np.stack([things_array(scene.things) for scene in scenes])
    backgrounds = np.array([scene.background.row() for scene in scenes], np.float32).reshape(-1, BACKGROUND_COLUMNS)
    return SceneTable(things, backgrounds, [scene.caption for scene in scenes])


def make_table(emoji: tuple[Emoji, ...], count: int, seed: int) -> SceneTable:
    """``count`` training scenes of one seed; a longer table of that seed begins with a shorter one's."""
    maker = SceneMaker(emoji, seed)
    parts = (min(SCENES_AT_ONCE, count - start) for start in range(0, count, SCENES_AT_ONCE))
    tables = [tabulate([maker.scene() for _ in range(part)]) for part in parts]
    return SceneTable(
        np.concatenate([table.things for table in tables]),
        np.concatenate([table.backgrounds for table in tables]),
        [caption for table in tables for caption in table.captions],
    )
