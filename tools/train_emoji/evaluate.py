"""Measures an image model on prompts whose combinations were never trained, and writes figures and sample sheets.

    python -m tools.train_emoji.evaluate --model ditrelay/assets/emoji --data emoji.npz --out evaluation
    python -m tools.train_emoji.evaluate --data emoji.npz --out evaluation --check-checker 1000
    python -m tools.train_emoji.evaluate --model NEW --against OLD --data emoji.npz --out evaluation

Prompts and seeds are the same for every model. The second form measures the checker itself on drawn scenes whose truth
is known, jittered, blurred and with noise. The third draws the shown prompts with two models side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImagePipeline
from PIL import Image
from torch import Tensor

from tools.train_emoji.checker import Checker
from tools.train_emoji.dataset import EmojiSet, load_emoji
from tools.train_emoji.drawing import Drawer
from tools.train_emoji.layouts import Scene, make_table, tabulate
from tools.train_emoji.measures import features, frechet_distance, sharpness
from tools.train_emoji.pool import DeviceTable
from tools.train_emoji.prompts import SEED, choose_prompts, unjittered
from tools.train_emoji.sheets import SHOWN_PROMPTS, write_sheet

GUIDANCE = 2.0
BATCH = 10
TRAINING_SCENES = 2000
"""Scenes as training draws them, for the Frechet distance."""
NOISE = 0.06
JITTER = 0.03
ASKED = ("object", "colour", "count", "place")
Marks = dict[str, list[bool]]
Figures = dict[str, float | int]


@dataclass(frozen=True)
class Lab:
    """What every measurement needs."""

    emoji: EmojiSet
    drawer: Drawer
    checker: Checker

    def draw(self, scenes: Sequence[Scene]) -> Tensor:
        """The scenes as they should look, [n, 3, size, size] in -1..1."""
        return DeviceTable.of(tabulate(scenes), self.drawer.device).draw(self.drawer, slice(None)).cpu()


def load_pipeline(folder: Path, device: torch.device) -> ZImagePipeline:
    """The stock pipeline in float32."""
    pipeline = ZImagePipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: ZImagePipeline, captions: Sequence[str], steps: int, size: int) -> Tensor:
    """Pictures [n, 3, size, size] in -1..1; caption k is drawn from seed k."""
    parts = []
    for start in range(0, len(captions), BATCH):
        part = list(captions[start : start + BATCH])
        found = pipeline(
            part,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator("cpu").manual_seed(start + k) for k in range(len(part))],
            output_type="pt",
        )
        parts.append(found.images.float().cpu() * 2 - 1)
    return torch.cat(parts)


def mark(checker: Checker, asked: Scene, picture: Tensor) -> Marks:
    """What is right in a picture: a list each for objects, colours, count and place, empty where not asked."""
    scene = unjittered(asked)
    marks: Marks = {name: [] for name in ASKED}
    for thing in scene.things:
        seen = checker.see(picture, thing, scene.background)
        marks["object"].append(seen.emoji == thing.emoji)
        if thing.tint:
            marks["colour"].append(seen.tint == thing.tint)
    first = scene.things[0]
    if scene.kind == "several":
        marks["count"].append(checker.count(picture, first, scene.background) == len(scene.things))
    if scene.place:
        marks["place"].append(checker.place(picture, first, scene.background) == scene.place)
    return marks


def all_right(marks: Marks) -> bool:
    """Whether nothing in the picture is wrong."""
    return all(all(found) for found in marks.values())


def add_up(rows: Iterable[Marks]) -> Figures:
    """Shares of what is right, per object, colour, count, place, and of pictures with everything right."""
    marks = list(rows)
    figures: Figures = {"pictures": len(marks)}
    for name in ASKED:
        found = [one for row in marks for one in row[name]]
        if found:
            figures[f"{name}s asked"] = len(found)
            figures[f"{name} right"] = sum(found) / len(found)
    figures["everything right"] = sum(map(all_right, marks)) / max(1, len(marks))
    return figures


def by_kind(scenes: Sequence[Scene], marks: Sequence[Marks]) -> dict[str, Figures]:
    """The figures of each kind of scene."""
    kinds = dict.fromkeys(scene.kind for scene in scenes)
    return {kind: add_up(row for s, row in zip(scenes, marks, strict=True) if s.kind == kind) for kind in kinds}


def spoil(pictures: Tensor, random: torch.Generator) -> Tensor:
    """Pictures blurred over 3 x 3 pixels and with noise: as hard to read as generated ones, or harder."""
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (soft + NOISE * torch.randn(pictures.shape, generator=random)).clamp(-1, 1)


def jitter(scene: Scene, random: Random) -> Scene:
    """A single object as training jitters it."""
    (thing,) = scene.things
    x, y, scale = (value + random.uniform(-JITTER, JITTER) for value in (thing.x, thing.y, thing.scale))
    return Scene(scene.kind, scene.caption, (thing._replace(x=x, y=y, scale=scale),), scene.background)


def check_checker(lab: Lab, count: int) -> dict[str, Figures]:
    """How often the checker is right about ``count`` drawn held-out scenes and as many single objects."""
    prompts = choose_prompts(lab.emoji, count, count, SEED + 1)
    random = Random(SEED)
    singles = [jitter(scene, random) for scene in prompts.singles]
    noise = torch.Generator().manual_seed(SEED)

    def judge(scene: Scene) -> Marks:
        return mark(lab.checker, scene, spoil(lab.draw([scene]), noise)[0])

    return {"single objects": add_up(map(judge, singles)), "held-out scenes": add_up(map(judge, prompts.held_out))}


def draw_training_scenes(lab: Lab) -> Tensor:
    """The features of scenes as training draws them."""
    table = DeviceTable.of(make_table(lab.emoji.emoji, TRAINING_SCENES, SEED), lab.drawer.device)
    rows = torch.split(torch.arange(len(table), device=lab.drawer.device), 64)
    return torch.cat([features(table.draw(lab.drawer, part).cpu()) for part in rows])


def evaluate(lab: Lab, pipeline: ZImagePipeline, singles: int, held_out: int, steps: Sequence[int]) -> dict[str, Any]:
    """The model's figures for each number of steps, and the distance that perfect pictures would have."""
    prompts = choose_prompts(lab.emoji, singles, held_out)
    scenes = prompts.all
    drawn, training = lab.draw([unjittered(scene) for scene in scenes]), draw_training_scenes(lab)
    result: dict[str, Any] = {"frechet distance of drawn scenes": frechet_distance(features(drawn), training)}
    for number in steps:
        made = generate(pipeline, [scene.caption for scene in scenes], number, lab.drawer.size)
        marks = [mark(lab.checker, scene, picture) for scene, picture in zip(scenes, made, strict=True)]
        asked, given = prompts.held_out, marks[len(prompts.singles) :]
        result[f"{number} steps"] = {
            "single objects": add_up(marks[: len(prompts.singles)]),
            "held-out scenes": add_up(given),
            "by kind": by_kind(asked, given),
            "frechet distance": frechet_distance(features(made), training),
            "sharpness": sharpness(made, drawn),
            "wrong": [scene.caption for scene, row in zip(scenes, marks, strict=True) if not all_right(row)],
        }
    return result


def write_table(result: dict[str, Any], path: Path) -> None:
    """The figures as a Markdown table with a column for each number of steps."""
    columns = [name for name in result if name.endswith(" steps")]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]

    def add(label: str, values: Sequence[float], form: str = ".1%") -> None:
        lines.append(f"| {label} | " + " | ".join(format(value, form) for value in values) + " |")

    add("single objects: the nearest picture is the right one", _column(result, columns, "single objects", "object"))
    for name in ASKED:
        add(f"held-out scenes: {name} right", _column(result, columns, "held-out scenes", name))
    add("held-out scenes: everything right", _column(result, columns, "held-out scenes", "everything"))
    add("Frechet distance to training scenes", [result[c]["frechet distance"] for c in columns], ".3f")
    add("edges, relative to drawn scenes", [result[c]["sharpness"] for c in columns], ".2f")
    lines += ["", f"Drawn scenes of the same prompts: {result['frechet distance of drawn scenes']:.3f} (Frechet)."]
    path.write_text("\n".join(lines) + "\n")


def _column(result: dict[str, Any], columns: Sequence[str], group: str, name: str) -> list[float]:
    return [result[column][group].get(f"{name} right", float("nan")) for column in columns]


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Pictures of -1..1 as images."""
    pixels = ((pictures.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def write_samples(pipeline: ZImagePipeline, steps: int, size: int, path: Path) -> None:
    """A sheet of the shown prompts."""
    write_sheet(to_images(generate(pipeline, SHOWN_PROMPTS, steps, size)), SHOWN_PROMPTS, path)


def write_comparison(old: ZImagePipeline, new: ZImagePipeline, steps: int, size: int, path: Path) -> None:
    """A sheet of the shown prompts by two models, in turns, from the same seeds."""
    made = [to_images(generate(pipeline, SHOWN_PROMPTS, steps, size)) for pipeline in (old, new)]
    pairs = [picture for both in zip(*made, strict=True) for picture in both]
    labels = [label for prompt in SHOWN_PROMPTS for label in (prompt, "after")]
    write_sheet(pairs, labels, path, columns=8)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``--help`` says what each setting does."""
    parser = argparse.ArgumentParser(description="Measure the built-in text-to-image model.")
    parser.add_argument("--model", type=Path, help="a diffusers folder")
    parser.add_argument("--against", type=Path, help="an older one: only draw the shown prompts with both")
    parser.add_argument("--data", type=Path, required=True, help="the file that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--singles", type=int, default=150, help="how many single objects are asked for")
    parser.add_argument("--held-out", type=int, default=200, help="how many scenes that training never shows")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--emoji", type=int, default=0, help="only so many emoji, as trained (trials)")
    parser.add_argument("--check-checker", type=int, metavar="SCENES", help="measure the checker on so many of each")
    args = parser.parse_args(arguments)
    if not args.model and not args.check_checker:
        parser.error("give --model FOLDER, or --check-checker SCENES")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measures, and writes ``image*.json``, a table and sheets to a folder."""
    args = parse_arguments(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.against:
        old, new = (load_pipeline(folder, device) for folder in (args.against, args.model))
        write_comparison(old, new, args.steps[0], args.size, args.out / "before-after.png")
        return
    emoji = load_emoji(args.data).first(args.emoji)
    drawer = Drawer(emoji.pictures, device, args.size)
    lab = Lab(emoji, drawer, Checker(drawer, len(emoji)))
    if args.check_checker:
        found: dict[str, Any] = dict(check_checker(lab, args.check_checker))
        name = "image-checker.json"
    else:
        pipeline = load_pipeline(args.model, device)
        found, name = evaluate(lab, pipeline, args.singles, args.held_out, args.steps), "image.json"
        write_table(found, args.out / "image.md")
        for steps in args.steps:
            write_samples(pipeline, steps, args.size, args.out / f"samples-{steps}.png")
    (args.out / name).write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
