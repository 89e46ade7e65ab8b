"""The emoji that the models learn: one picture and the names of each, as prepare.py packs them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.train_emoji.words import BACKGROUND_COLOURS, is_mass, is_plural

COLOUR_WORDS = frozenset(" ".join(BACKGROUND_COLOURS).split()) | {"golden", "rainbow", "grey"}
COUNTABLE_GROUPS = frozenset({"Animals & Nature", "Food & Drink", "Activities", "Objects", "Travel & Places"})


@dataclass(frozen=True)
class Emoji:
    """One emoji: its Unicode name, other names in use, and rarer words that mean only this one."""

    name: str
    group: str
    aliases: tuple[str, ...] = ()
    rare: tuple[str, ...] = ()

    @property
    def takes_colour(self) -> bool:
        """Whether it may be painted: not a person, not a symbol, and not named after a colour."""
        return self.group not in ("People & Body", "Symbols") and not COLOUR_WORDS & set(self.name.split())

    @property
    def countable(self) -> bool:
        """Whether "two of it" reads well."""
        name = self.name
        return (
            self.group in COUNTABLE_GROUPS
            and not is_plural(name)
            and not is_mass(name)
            and " with " not in name
            and len(name.split()) <= 3
        )


@dataclass(frozen=True)
class EmojiSet:
    """All emoji and their pictures: uint8 [N, size, size, 4], colour premultiplied with alpha."""

    emoji: tuple[Emoji, ...]
    pictures: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.emoji)

    def index(self, name: str) -> int:
        """The position of the emoji that bears this name; ``KeyError`` if none does."""
        for position, emoji in enumerate(self.emoji):
            if emoji.name == name:
                return position
        raise KeyError(name)

    def first(self, count: int) -> EmojiSet:
        """About ``count`` emoji, taken evenly from the whole, for trials; 0 means all."""
        if not 0 < count < len(self.emoji):
            return self
        chosen = [k * len(self.emoji) // count for k in range(count)]
        return EmojiSet(tuple(self.emoji[k] for k in chosen), self.pictures[chosen])


def load_emoji(path: str | Path) -> EmojiSet:
    """Reads the file that prepare.py wrote (pictures are stored as differences along x, which compress better)."""
    with np.load(path) as packed:
        rows = json.loads(packed["items"].tobytes().decode())
        pictures = np.cumsum(packed["pics_3d"], axis=2, dtype=np.uint8)
    emoji = tuple(Emoji(r["name"], r["group"], tuple(r["alias"]), tuple(r["extra"])) for r in rows)
    return EmojiSet(emoji, pictures)
