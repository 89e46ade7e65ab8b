"""A dozen pictures at once from 3 DiT ranks and 1 non-DiT rank on the CPU, with a contact sheet and a timeline."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ditrelay import ServerArgs
from ditrelay.__main__ import run
from ditrelay.cli_generate import Order, generate
from ditrelay.cli_run import Outcome
from ditrelay.runtime.topology import Topology

OUTPUT = Path("demo-output")
SHEET = OUTPUT / "contact-sheet.png"
SEED = 1
PROMPTS = (
    "a red apple on a blue background",
    "a cat",
    "a dog on the grass",
    "a rocket in space",
    "three bananas",
    "a small house in the snow",
    "a green elephant",
    "a robot on a purple background",
    "a fox at night",
    "a big ghost on a black background",
    "a cactus in the desert",
    "a unicorn at sunset",
)

COLUMNS = 4
SIDE = 192
GAP = 16
CAPTION_LINES = 2
FONT_SIZE = 15
LINE = FONT_SIZE + 4
CAPTION_CHARS = 24


def main() -> int:
    for old in OUTPUT.glob("*.png"):
        old.unlink()
    OUTPUT.mkdir(exist_ok=True)
    settings = ServerArgs(
        enable_disagg=True,
        num_gpus=4,
        num_non_dit_ranks=1,
        device="cpu",
        warmup=False,
        trace=str(OUTPUT / "timeline.json"),
        log_level="warning",
    )
    print(Topology.build(settings).plan(), end="\n\n", flush=True)
    run = generate(settings, Order(PROMPTS, output=OUTPUT, sampling={"seed": SEED}))
    contact_sheet(run.outcomes).save(SHEET)
    print(f"contact sheet: {SHEET}")
    return run.exit_code


def contact_sheet(outcomes: Sequence[Outcome]) -> Image.Image:
    """The pictures in rows, each with its prompt below."""
    rows = -(-len(outcomes) // COLUMNS)
    cell = (SIDE + GAP, SIDE + GAP + CAPTION_LINES * LINE)
    sheet = Image.new("RGB", (COLUMNS * cell[0] + GAP, rows * cell[1] + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for i, outcome in enumerate(outcomes):
        x, y = GAP + i % COLUMNS * cell[0], GAP + i // COLUMNS * cell[1]
        if outcome.result is not None:
            with Image.open(outcome.job.path) as picture:
                sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        caption = textwrap.wrap(outcome.job.params.prompt, CAPTION_CHARS)[:CAPTION_LINES]
        for number, line in enumerate(caption):
            draw.text((x + SIDE // 2, y + SIDE + 4 + number * LINE), line, "black", font, anchor="ma")
    return sheet


if __name__ == "__main__":
    run(main)
