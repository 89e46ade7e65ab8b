"""Contact sheets: rows of pictures with a short label under each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

LABEL_HEIGHT = 14
GAP = 4

SHOWN_PROMPTS = (
    "a red apple on a blue background",
    "a cat",
    "a dog on the grass",
    "a cat and a dog",
    "a rocket in space",
    "a blue cat and a red car on a yellow background",
    "three bananas",
    "a small house in the snow",
    "a green elephant",
    "a pizza above a hamburger",
    "an upside down penguin",
    "a robot on a purple background",
    "two purple octopuses under water",
    "a sunflower to the left of a bee",
    "a fox at night",
    "a big ghost on a black background",
    "a pink shark and a yellow duck",
    "a cactus in the desert",
    "four red hearts on a pink background",
    "a birthday cake, a gift and a balloon",
    "a unicorn at sunset",
    "a golden trophy on a green background",
    "a turquoise snail in the bottom right corner",
    "a dragon and a castle in the sky",
)
"""What the sample sheets show, the same for every model."""


def write_sheet(pictures: Sequence[Image.Image], labels: Sequence[str], path: Path, columns: int = 6) -> None:
    """Writes the pictures, all of one size, in rows of ``columns``."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    step_x, step_y = width + GAP, height + LABEL_HEIGHT + GAP
    sheet = Image.new("RGB", (columns * step_x - GAP, rows * step_y - GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = k % columns * step_x, k // columns * step_y
        sheet.paste(picture, (x, y))
        pen.text((x, y + height + 1), _fitting(pen, label, width), fill="black")
    sheet.save(path)


def _fitting(pen: ImageDraw.ImageDraw, label: str, width: int) -> str:
    while pen.textlength(label) > width:
        label = label[:-1]
    return label
