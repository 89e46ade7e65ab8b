"""Measures the video model on emoji in motions that training never showed, and writes figures, a sheet and clips.

    python -m tools.train_emoji.evaluate_video --model ditrelay/assets/emoji-video --data emoji.npz --out evaluation
    python -m tools.train_emoji.evaluate_video --model FOLDER --data emoji.npz --out evaluation --sweep
    python -m tools.train_emoji.evaluate_video --model FOLDER --data emoji.npz --out evaluation --check-checker 1000

The second form tries steps, guidance and flow shifts on fewer prompts; the third measures the checker itself on drawn
clips whose truth is known, after they went through the model's autoencoder and some noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from torch import Tensor

from tools.train_emoji.checker import Checker
from tools.train_emoji.dataset import EmojiSet, load_emoji
from tools.train_emoji.drawing import Drawer
from tools.train_emoji.frames import decode_latents, encode_clips
from tools.train_emoji.motions import MOTION_NAMES, Clip, ClipDrawer, ClipMaker, tabulate_clips
from tools.train_emoji.video_checker import COMPARED_SIZE, ClipChecker
from tools.train_emoji.video_export import (
    FLOW_SHIFT,
    FRAMES_PER_SECOND,
    GUIDANCE,
    SHOWN,
    STEPS,
    generate,
    load_pipeline,
    to_pixels,
    write_animation,
    write_clips,
)
from tools.train_emoji.video_model import FRAMES, SIZE

SEED = 2025
NOISE = 0.05
SWEPT = [*product((8,), (1.5, 2.0, 3.0), (2.0, 3.0, 5.0)), (4, 2.0, 3.0), (6, 2.0, 3.0), (12, 2.0, 3.0)]
"""Steps, guidance and flow shift."""
Figures = dict[str, float | int]


def choose_clips(emoji: EmojiSet, checker: ClipChecker, each: int, seed: int = SEED) -> list[Clip]:
    """``each`` held-out clips of every motion, all different from the same thing in any other motion."""
    maker = ClipMaker(emoji.emoji, seed, held_out=True)
    chosen: list[Clip] = []
    for motion in MOTION_NAMES:
        wanted = len(chosen) + each
        while len(chosen) < wanted:
            clip = maker.clip(motion)
            if checker.is_telling(clip):
                chosen.append(clip)
    return chosen


def mark(checker: ClipChecker, asked: list[Clip], shown: Iterator[Tensor]) -> list[dict[str, bool]]:
    """What is right in each clip [3, frames, size, size] in -1..1; ``colour`` only where one was asked for."""
    marks = []
    for truth, clip in zip(asked, shown, strict=True):
        verdict, thing = checker.judge(clip, truth), truth.scene.things[0]
        right = {"motion": verdict.motion == truth.motion, "object": verdict.emoji == thing.emoji}
        marks.append(right | ({"colour": verdict.tint == thing.tint} if thing.tint else {}))
    return marks


def add_up(marks: list[dict[str, bool]]) -> Figures:
    """Shares of what is right, and of clips with everything right."""
    figures: Figures = {"clips": len(marks)}
    for name in ("motion", "object", "colour"):
        found = [right[name] for right in marks if name in right]
        if found:
            figures[f"{name} right"] = sum(found) / len(found)
    figures["everything right"] = sum(all(right.values()) for right in marks) / max(1, len(marks))
    return figures


def by_motion(asked: list[Clip], marks: list[dict[str, bool]]) -> dict[str, float]:
    """For each motion, how often it was the one that was asked for."""
    rows = {
        name: [m["motion"] for clip, m in zip(asked, marks, strict=True) if clip.motion == name]
        for name in MOTION_NAMES
    }
    return {name: sum(found) / len(found) for name, found in rows.items() if found}


@torch.no_grad()
def real_clips(pipeline: WanPipeline, drawer: ClipDrawer, clips: list[Clip]) -> Iterator[Tensor]:
    """Drawn clips, jittered as in training, after the model's autoencoder and with noise."""
    random = torch.Generator().manual_seed(SEED)
    for clip in clips:
        table = tabulate_clips([clip])
        arrays = (table.things, table.backgrounds, table.motions)
        drawn = drawer.draw(*(torch.from_numpy(array).to(drawer.device) for array in arrays))
        rebuilt = decode_latents(pipeline.vae, encode_clips(pipeline.vae, drawn)[0]).clamp(-1, 1)
        noise = NOISE * torch.randn(rebuilt.shape, generator=random).to(rebuilt.device)
        yield (rebuilt + noise).clamp(-1, 1)[0]


def sweep(pipeline: WanPipeline, checker: ClipChecker, asked: list[Clip]) -> list[Figures]:
    """The figures of every setting that is tried."""
    rows = []
    for steps, guidance, shift in SWEPT:
        pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=shift)
        made = generate(pipeline, [clip.scene.caption for clip in asked], SIZE, FRAMES, steps, guidance)
        figures: Figures = {"steps": steps, "guidance": guidance, "shift": shift}
        rows.append(figures | add_up(mark(checker, asked, iter(made * 2 - 1))))
        sys.stdout.write(f"{json.dumps(rows[-1])}\n")
        sys.stdout.flush()
    return rows


def evaluate(pipeline: WanPipeline, checker: ClipChecker, asked: list[Clip], out: Path) -> dict[str, object]:
    """The model's figures at its own settings; writes the sheet and the clips of the shown prompts."""
    captions = [clip.scene.caption for clip in asked]
    made = generate(pipeline, captions, SIZE, FRAMES)
    marks = mark(checker, asked, iter(made * 2 - 1))
    shown = generate(pipeline, list(SHOWN), SIZE, FRAMES)
    write_clips(shown, SHOWN, out / "samples.png")
    write_animation(shown, out / "samples.webp")
    for caption, clip in zip(SHOWN, shown, strict=True):
        write_movie(clip, out / f"{caption.replace(' ', '-')}.mp4")
    wrong = [caption for caption, right in zip(captions, marks, strict=True) if not all(right.values())]
    settings = {"steps": STEPS, "guidance": GUIDANCE, "flow shift": FLOW_SHIFT, "frames": FRAMES, "size": SIZE}
    return {"settings": settings, "held out": add_up(marks), "motions": by_motion(asked, marks), "wrong": wrong}


def write_movie(clip: Tensor, path: Path) -> None:
    """Writes a clip [3, frames, size, size] in 0..1 as MP4."""
    # Only here: training and measuring go on machines that have no video codecs.
    from ditrelay.runtime.pipelines_core.media import encode_media

    path.write_bytes(encode_media(to_pixels(clip), fps=FRAMES_PER_SECOND).data)


def write_table(figures: Figures, motions: dict[str, float], path: Path) -> None:
    """The figures as Markdown tables."""
    lines = ["| held-out clips | right |", "|---|---|"]
    lines += [f"| {name} | {value:.1%} |" for name, value in figures.items() if isinstance(value, float)]
    lines += ["", "| motion | right |", "|---|---|", *(f"| {name} | {value:.0%} |" for name, value in motions.items())]
    path.write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Measures, and writes ``video*.json`` (and a table, a sheet and clips) to a folder."""
    parser = argparse.ArgumentParser(description="Measure the built-in text-to-video model.")
    parser.add_argument("--model", type=Path, required=True, help="a diffusers folder")
    parser.add_argument("--data", type=Path, required=True, help="the file that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=10, help="clips of every motion")
    parser.add_argument("--emoji", type=int, default=0, help="only so many emoji, as trained (trials)")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--check-checker", type=int, metavar="CLIPS", help="measure the checker on so many drawn clips")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emoji = load_emoji(args.data).first(args.emoji)
    drawer = Drawer(emoji.pictures, device, SIZE)
    small = Drawer(emoji.pictures, device, COMPARED_SIZE)
    checker = ClipChecker(small, Checker(drawer, len(emoji)), FRAMES)
    pipeline = load_pipeline(args.model, device)
    if args.check_checker:
        asked = choose_clips(emoji, checker, -(-args.check_checker // len(MOTION_NAMES)), SEED + 1)
        marks = mark(checker, asked, real_clips(pipeline, ClipDrawer(drawer, FRAMES), asked))
        found: object = {"real clips": add_up(marks), "motions": by_motion(asked, marks)}
        name = "video-checker.json"
    elif args.sweep:
        found, name = sweep(pipeline, checker, choose_clips(emoji, checker, args.each)), "video-sweep.json"
    else:
        result = evaluate(pipeline, checker, choose_clips(emoji, checker, args.each), args.out)
        found, name = result, "video.json"
        write_table(result["held out"], result["motions"], args.out / "video.md")  # type: ignore[arg-type]
    (args.out / name).write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
