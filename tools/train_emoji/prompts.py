"""What the evaluation asks for: single objects, and scenes whose combinations training never shows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

from tools.train_emoji.dataset import EmojiSet
from tools.train_emoji.layouts import ARRANGEMENTS, Kind, Scene, SceneMaker, Thing, plain_background
from tools.train_emoji.words import PLACES, indefinite, is_mass, is_plural

SEED = 2024
MIX: dict[Kind, int] = {"pair": 60, "one": 50, "several": 40, "placed": 30, "row": 20}
"""How many held-out prompts of each kind there are in 200."""
SPOTS: dict[Kind, tuple[tuple[float, float], ...]] = {
    "one": ((0, 0),),
    "placed": tuple((place.x, place.y) for place in PLACES.values()),
    "pair": ((-0.48, 0), (0.48, 0), (0, -0.48), (0, 0.48)),
    "row": ((-0.66, 0), (0, 0), (0.66, 0)),
    "several": tuple(spot for spots in ARRANGEMENTS.values() for spot in spots),
}
SCALES: dict[Kind, tuple[float, ...]] = {
    "one": (0.84,),
    "placed": (0.46,),
    "pair": (0.46, 0.54, 0.28),
    "row": (0.32,),
    "several": (0.34, 0.45),
}
"""Where things stand and how wide they are, without the jitter that training adds."""


@dataclass(frozen=True)
class Prompts:
    """Single objects as they are, and scenes with combinations that training never shows."""

    singles: list[Scene]
    held_out: list[Scene]

    @property
    def all(self) -> list[Scene]:
        """Both, singles first."""
        return self.singles + self.held_out


def choose_prompts(emoji: EmojiSet, singles: int, held_out: int, seed: int = SEED) -> Prompts:
    """The evaluation's prompts: the same for the same numbers and seed."""
    chosen = Random(seed).sample(range(len(emoji)), min(singles, len(emoji)))
    maker = SceneMaker(emoji.emoji, seed, held_out=True)
    scenes = [maker.scene(kind) for kind, share in MIX.items() for _ in range(round(share * held_out / 200))]
    return Prompts([single_scene(emoji, k) for k in chosen], scenes)


def single_scene(emoji: EmojiSet, index: int) -> Scene:
    """One object as it is on white: "a cat"."""
    name = emoji.emoji[index].name
    caption = name if is_plural(name) or is_mass(name) else indefinite(name)
    return Scene("one", caption, (Thing(index, 0, 0, SCALES["one"][0]),), plain_background())


def unjittered(scene: Scene) -> Scene:
    """The scene with its things exactly at the spots of its kind: where the checker looks."""

    def at_its_spot(thing: Thing) -> Thing:
        x, y = min(SPOTS[scene.kind], key=lambda spot: math.dist(spot, (thing.x, thing.y)))
        return thing._replace(x=x, y=y, scale=min(SCALES[scene.kind], key=lambda scale: abs(scale - thing.scale)))

    return replace(scene, things=tuple(at_its_spot(thing) for thing in scene.things))
