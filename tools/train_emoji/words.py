"""The words of the built-in models: colours, places, scenery, and English plurals and articles."""

from __future__ import annotations

import re
from random import Random
from typing import NamedTuple

Rgb = tuple[float, float, float]

COLOURS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 208, 40),
    "green": (52, 160, 70),
    "blue": (45, 105, 220),
    "purple": (130, 65, 190),
    "pink": (245, 130, 180),
    "brown": (125, 80, 48),
    "black": (30, 30, 34),
    "white": (250, 250, 250),
    "gray": (140, 144, 150),
    "turquoise": (45, 190, 185),
}
"""What an object can be painted with, sRGB 0..255; an object's tint is 1 + the index here, 0 leaves it as it is."""

BACKGROUND_COLOURS: dict[str, Rgb] = {
    **COLOURS,
    "light blue": (165, 210, 250),
    "dark blue": (18, 34, 95),
    "light green": (170, 228, 160),
    "dark green": (16, 72, 40),
    "light yellow": (255, 242, 175),
    "dark red": (120, 14, 20),
    "beige": (236, 220, 190),
    "lavender": (205, 190, 240),
}


class Scenery(NamedTuple):
    """The sky goes from ``top`` to ``bottom``; the ground starts at ``horizon`` (-1..1, 2: none)."""

    top: Rgb
    bottom: Rgb
    ground: Rgb
    horizon: float
    stars: float


SCENERY: dict[str, Scenery] = {
    "on the grass": Scenery((120, 190, 250), (205, 232, 255), (92, 176, 70), 0.45, 0),
    "in a meadow": Scenery((120, 190, 250), (205, 232, 255), (92, 176, 70), 0.45, 0),
    "in the snow": Scenery((150, 190, 230), (215, 230, 245), (250, 252, 255), 0.40, 0),
    "in the desert": Scenery((250, 190, 90), (255, 226, 160), (222, 176, 108), 0.45, 0),
    "on the beach": Scenery((70, 170, 240), (180, 225, 250), (240, 216, 160), 0.55, 0),
    "under water": Scenery((90, 200, 230), (8, 62, 140), (8, 62, 140), 2, 0),
    "in the sea": Scenery((90, 200, 230), (8, 62, 140), (8, 62, 140), 2, 0),
    "in space": Scenery((8, 8, 28), (26, 20, 60), (26, 20, 60), 2, 1),
    "at night": Scenery((10, 18, 58), (40, 58, 120), (22, 50, 40), 0.5, 1),
    "at sunset": Scenery((110, 60, 150), (255, 150, 70), (70, 40, 60), 0.5, 0),
    "in the sky": Scenery((80, 165, 245), (225, 242, 255), (225, 242, 255), 2, 0),
}


class Place(NamedTuple):
    """Where a single small object stands (x to the right, y down, both -1..1) and the ways to say it."""

    x: float
    y: float
    phrases: tuple[str, ...]


PLACES: dict[str, Place] = {
    "left": Place(-0.5, 0, ("on the left", "on the left side")),
    "right": Place(0.5, 0, ("on the right", "on the right side")),
    "top": Place(0, -0.5, ("at the top",)),
    "bottom": Place(0, 0.5, ("at the bottom",)),
    "top left": Place(-0.5, -0.5, ("in the top left corner", "in the top left")),
    "top right": Place(0.5, -0.5, ("in the top right corner", "in the top right")),
    "bottom left": Place(-0.5, 0.5, ("in the bottom left corner", "in the bottom left")),
    "bottom right": Place(0.5, 0.5, ("in the bottom right corner", "in the bottom right")),
}

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
SMALL = ("small", "tiny", "little")
BIG = ("big", "large", "huge")

MASS_NOUNS = frozenset(
    "bread butter salt honey ice rice milk fire water fog sushi bacon popcorn spaghetti corn broccoli garlic wood "
    "money chess sake mate dango oden custard coral soap dna poo t-rex".split()
)
SINGULAR_IN_S = frozenset(
    "bus trolleybus minibus octopus cactus hippopotamus rhinoceros hibiscus lotus compass glass dress cross chess "
    "tennis cyclops walrus princess santa claus iris canvas moss grass".split()
)
IRREGULAR_PLURALS = {
    "mouse": "mice",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "goose": "geese",
    "tooth": "teeth",
    "foot": "feet",
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "cherry": "cherries",
    "loaf": "loaves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "bison": "bison",
    "ox": "oxen",
    "squid": "squid",
    "shrimp": "shrimp",
    "octopus": "octopuses",
}


def is_plural(name: str) -> bool:
    """Whether a name is a plural already ("scissors"), judged by its last word."""
    word = name.split()[-1]
    return word.endswith("s") and not word.endswith("ss") and word not in SINGULAR_IN_S


def plural(name: str) -> str:
    """The plural of a name: only its last word changes ("hot dog" -> "hot dogs")."""
    *head, word = name.split()
    if word in IRREGULAR_PLURALS:
        many = IRREGULAR_PLURALS[word]
    elif re.search(r"(s|x|z|ch|sh)$", word):
        many = word + "es"
    elif re.search(r"[^aeiou]y$", word):
        many = word[:-1] + "ies"
    else:
        many = word + "s"
    return " ".join([*head, many])


def is_mass(name: str) -> bool:
    """Whether a name takes no article and no number ("bread")."""
    return name.split()[-1] in MASS_NOUNS


def indefinite(words: str) -> str:
    """``words`` after "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def with_article(random: Random, words: str, name: str) -> str:
    """``words`` as a person would start them: mostly "a" or "an", at times "the" or nothing; ``name`` is the noun."""
    if is_plural(name) or is_mass(name) or random.random() < 0.15:
        return words
    return "the " + words if random.random() < 0.08 else indefinite(words)
