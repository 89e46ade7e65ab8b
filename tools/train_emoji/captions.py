"""How a scene is said: the phrases around nouns, colours, counts, places and backgrounds."""

from __future__ import annotations

import re
from random import Random

from tools.train_emoji.dataset import Emoji
from tools.train_emoji.words import NUMBERS, is_plural, plural, with_article

BESIDE = (
    *["{0} and {1}"] * 5,
    "{0} next to {1}",
    "{0} to the left of {1}",
    "{0}, {1}",
    "{0} on the left and {1} on the right",
)
BESIDE_SWAPPED = ("{0} to the right of {1}", "{0} on the right and {1} on the left")
ABOVE = ("{0} above {1}", "{0} on top of {1}", "{0} over {1}")
ABOVE_SWAPPED = ("{0} below {1}", "{0} under {1}")
OPENINGS = ("a picture of ", "an image of ", "an emoji of ", "a 3d render of ", "a photo of ", "draw ")
ENDINGS = (" emoji", ", 3d", ", cute", ", high quality")


def choose_noun(random: Random, emoji: Emoji, rare: bool = True) -> str:
    """One of an emoji's names: mostly the first, often an alias, at times a rarer word."""
    draw = random.random()
    if emoji.aliases and draw < 0.35:
        return random.choice(emoji.aliases)
    if emoji.rare and rare and draw > 0.88:
        return random.choice(emoji.rare)
    return emoji.name


def say_colour(random: Random, colour: str) -> str:
    """A colour as a person may write it."""
    return "grey" if colour == "gray" and random.random() < 0.4 else colour


def describe(random: Random, emoji: Emoji, colour: str | None = None, size: str | None = None) -> str:
    """One object with its adjectives and article: "a small blue cat"."""
    noun = choose_noun(random, emoji)
    adjectives = [size] if size else []
    if colour:
        adjectives.append(say_colour(random, colour))
    return with_article(random, " ".join([*adjectives, noun]), noun)


def describe_many(random: Random, emoji: Emoji, count: int, colour: str | None) -> str:
    """Several of one thing: "three red cars"."""
    noun = choose_noun(random, emoji, rare=False)
    many = noun if is_plural(noun) else plural(noun)
    return " ".join([NUMBERS[count], *([say_colour(random, colour)] if colour else []), many])


def join_beside(random: Random, first: str, second: str) -> tuple[str, bool]:
    """Two things side by side; True when ``second`` is the one on the left."""
    return _join(random, BESIDE, BESIDE_SWAPPED, first, second)


def join_above(random: Random, first: str, second: str) -> tuple[str, bool]:
    """Two things one over the other; True when ``second`` is the one on top."""
    return _join(random, ABOVE, ABOVE_SWAPPED, first, second)


def _join(random: Random, plain: tuple[str, ...], swapped: tuple[str, ...], a: str, b: str) -> tuple[str, bool]:
    pick = random.randrange(len(plain) + len(swapped))
    if pick < len(plain):
        return plain[pick].format(a, b), False
    return swapped[pick - len(plain)].format(a, b), True


def join_row(first: str, second: str, third: str) -> str:
    """Three things from left to right."""
    return f"{first}, {second} and {third}"


def upside_down(random: Random, words: str) -> str:
    """One thing turned on its head."""
    if random.random() < 0.5:
        return f"{words} upside down"
    return "an upside down " + re.sub(r"^(an|a|the) ", "", words)


def add_background(random: Random, caption: str, words: str) -> str:
    """The caption with its background's words, after a comma where they could not follow otherwise."""
    if not words:
        return caption
    needs_comma = words.endswith("background") and words.split()[0] not in ("on", "with")
    return f"{caption}, {words}" if needs_comma or random.random() < 0.2 else f"{caption} {words}"


def add_flourish(random: Random, caption: str) -> str:
    """At times what people put around a prompt, so that it does no harm."""
    draw = random.random()
    if draw < 0.10:
        return random.choice(OPENINGS) + caption
    return caption + random.choice(ENDINGS) if draw > 0.95 else caption
