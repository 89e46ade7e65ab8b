"""Packs emoji pictures, their names and aliases into the one file that both trainings read.

    npm install --ignore-scripts @lobehub/fluent-emoji-3d@1.1.0 emojilib@4.0.3 unicode-emoji-json@0.9.0
    python -m tools.train_emoji.prepare node_modules emoji.npz

Pictures: Microsoft Fluent Emoji, style "3d" (MIT). Names: unicode-emoji-json (MIT). Rarer words: emojilib (MIT).
dataset.py says how the file is read.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.train_emoji.selection import ALIASES, UNWANTED_WORDS, is_wanted

VISIBLE = 16
"""A pixel less opaque than this (of 255) counts as empty when a picture is cropped."""
VARIATION_SELECTOR = "-fe0f"
RARE_WORDS = 3
GROUPS_WITHOUT_RARE_WORDS = ("People & Body", "Smileys & Emotion", "Symbols")


@dataclass(frozen=True)
class Entry:
    """One emoji with its names, and the words that emojilib files it under."""

    emoji: str
    name: str
    group: str
    aliases: tuple[str, ...]
    words: tuple[str, ...]
    picture: Path

    def packed(self) -> dict[str, object]:
        """What dataset.py reads; ``words`` are by now only those that mean this emoji alone."""
        names = {"alias": self.aliases, "extra": self.words}
        return {"emoji": self.emoji, "name": self.name, "group": self.group, **names}


def plain(words: str) -> str:
    """A name as a person would type it: lower case, no accents, no curly quotes."""
    decomposed = unicodedata.normalize("NFKD", words.replace("’", "'"))
    letters = "".join(c for c in decomposed if not unicodedata.combining(c) and c not in "“”!#*")
    return re.sub(r"\s+", " ", letters.lower().replace(":", " ").replace("_", " ")).strip()


def read_entries(modules: Path) -> list[Entry]:
    """Every wanted emoji that has a picture, in Unicode's order."""
    names = json.loads((modules / "unicode-emoji-json" / "data-by-emoji.json").read_text())
    words = json.loads((modules / "emojilib" / "dist" / "emoji-en-US.json").read_text())
    pictures = {file.stem: file for file in (modules / "@lobehub" / "fluent-emoji-3d" / "assets").glob("*.webp")}
    entries = []
    for emoji, facts in names.items():
        name, group = facts["name"], facts["group"]
        code = "-".join(f"{ord(character):x}" for character in emoji)
        picture = pictures.get(code) or pictures.get(code.replace(VARIATION_SELECTOR, ""))
        if picture and is_wanted(name, group):
            aliases = tuple(map(plain, ALIASES.get(name.lower(), ())))
            entries.append(Entry(emoji, plain(name), group, aliases, tuple(map(plain, words.get(emoji, ()))), picture))
    return entries


def keep_telling_words(entries: list[Entry]) -> list[Entry]:
    """The entries with at most three words each, all of which point at that emoji only."""
    names = {name for entry in entries for name in (entry.name, *entry.aliases)}
    taken = names | {word for name in names for word in name.split()}
    uses = Counter(word for entry in entries for word in set(entry.words))

    def tells(word: str) -> bool:
        well_formed = re.fullmatch(r"[a-z][a-z \-]{2,18}", word) and not UNWANTED_WORDS.search(word)
        return bool(well_formed) and uses[word] == 1 and word not in taken

    kept = []
    for entry in entries:
        words = () if entry.group in GROUPS_WITHOUT_RARE_WORDS else tuple(filter(tells, dict.fromkeys(entry.words)))
        kept.append(replace(entry, words=words[:RARE_WORDS]))
    return kept


def fit(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The visible part centred in a square, so that every emoji fills the frame alike: premultiplied uint8 RGBA."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda level: 255 if level > VISIBLE else 0).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    levels = np.asarray(square).astype(np.float32) / 255
    levels[..., :3] *= levels[..., 3:]
    how = Image.Resampling.BOX if side >= 2 * size else Image.Resampling.LANCZOS
    channels = [np.asarray(Image.fromarray(levels[..., c]).resize((size, size), how)) for c in range(4)]
    levels = np.stack(channels, -1).clip(0, 1)
    levels[..., :3] = np.minimum(levels[..., :3], levels[..., 3:])
    return (levels * 255 + 0.5).astype(np.uint8)


def pack(entries: list[Entry], size: int, path: Path) -> None:
    """Writes the file; pictures as differences along x, which compress better."""
    pictures = np.stack([fit(Image.open(entry.picture), size) for entry in entries])
    differences = np.diff(pictures, axis=2, prepend=np.zeros_like(pictures[:, :, :1])).astype(np.uint8)
    rows = json.dumps([entry.packed() for entry in entries], ensure_ascii=False)
    np.savez_compressed(path, items=np.frombuffer(rows.encode(), np.uint8), pics_3d=differences)


def main(arguments: list[str] | None = None) -> None:
    """Packs a folder of npm packages."""
    parser = argparse.ArgumentParser(description="Pack emoji pictures and names for training.")
    parser.add_argument("modules", type=Path, help="node_modules with the packages of the README")
    parser.add_argument("out", type=Path, help="the .npz file to write")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    args = parser.parse_args(arguments)
    entries = keep_telling_words(read_entries(args.modules))
    pack(entries, args.size, args.out)
    sys.stdout.write(f"{len(entries)} emoji, {args.out.stat().st_size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()
