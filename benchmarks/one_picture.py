"""How long a newcomer waits: one picture or clip at a time of a built-in model on a CPU, against the stock pipeline.

At its own size and guidance, one thread a process (``OMP_NUM_THREADS=1``). Every system is warm, as a server is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from common import ROOT, markdown, origin, parser, provenance, show, write_json, write_section

from ditrelay import Engine, ServerArgs
from ditrelay.models.card import load_card


@dataclass(frozen=True)
class Case:
    """What is made, and in how many seconds it should be, with the first number of ``steps``."""

    model: str
    prompt: str
    steps: tuple[int, ...]
    aim: float


CASES = {
    "picture": Case("builtin:emoji", "a red apple above a blue kite", (8, 4), 0.7),
    "clip": Case("builtin:emoji-video", "a cat moving to the left", (8,), 6.0),
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "1 DiT + 1": {"enable_disagg": True, "num_gpus": 2},
    "2 ranks, a branch of the guidance each": {"num_gpus": 2, "cfg_parallel_degree": 2},
}
STOCK = "stock pipeline, one thread"
HEADER = ["system", "steps", "median s", "fastest s", "slowest s", "encode s", "denoise s", "decode s"]
WARM_UP = 3

Figures = dict[str, dict[int, dict[str, float]]]


def timed(draw: Callable[[int], dict[str, float]], rounds: int) -> dict[str, float]:
    """Medians over ``rounds`` pictures; ``draw`` takes a seed and tells the seconds of the stages that it knows."""
    for seed in range(WARM_UP):
        draw(seed)
    seconds, stages = [], []
    for seed in range(rounds):
        began = time.perf_counter()
        stages.append(draw(seed))
        seconds.append(time.perf_counter() - began)
    medians = {name: statistics.median(each[name] for each in stages) for name in stages[0]}
    return {"median": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds), **medians}


def ours(case: Case, settings: dict[str, Any], rounds: int) -> dict[int, dict[str, float]]:
    with Engine(ServerArgs(model_path=case.model, device="cpu", **settings)) as engine:

        def draw(steps: int, seed: int) -> dict[str, float]:
            timings = engine.generate(case.prompt, seed=seed, num_inference_steps=steps).timings
            return {name: getattr(timings, name) for name in ("encode", "denoise", "decode")}

        return {steps: timed(lambda seed, steps=steps: draw(steps, seed), rounds) for steps in case.steps}


def stock(case: Case, rounds: int) -> dict[int, dict[str, float]]:
    """The stock pipeline in this process. It writes no file, which ours does."""
    card = load_card(case.model)
    clip = {"num_frames": card.default_num_frames} if card.media == "video" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(card.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)

    def draw(steps: int, seed: int) -> dict[str, float]:
        pipeline(
            case.prompt,
            height=card.default_height,
            width=card.default_width,
            num_inference_steps=steps,
            guidance_scale=card.default_guidance_scale,
            **clip,
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        return {}

    return {steps: timed(lambda seed, steps=steps: draw(steps, seed), rounds) for steps in case.steps}


def rows(figures: Figures) -> list[list[str]]:
    names = ("median", "fastest", "slowest", "encode", "denoise", "decode")
    return [
        [system, str(steps), *(f"{of[name]:.3f}" if name in of else "" for name in names)]
        for system, by_steps in figures.items()
        for steps, of in by_steps.items()
    ]


def verdict(case: Case, figures: Figures) -> str:
    steps = case.steps[0]
    medians = {name: of[steps]["median"] for name, of in figures.items() if name != STOCK}
    missed = ", ".join(f"{name} ({seconds:.2f} s)" for name, seconds in medians.items() if seconds >= case.aim)
    return f"Aim: {steps} steps in less than {case.aim:g} s: {f'missed by {missed}' if missed else 'reached by all'}."


def main(options: argparse.Namespace) -> None:
    case = CASES[options.what]
    figures = {name: ours(case, settings, options.rounds) for name, settings in SYSTEMS.items()}
    figures[STOCK] = stock(case, options.rounds)
    show(f"one {options.what}", HEADER, rows(figures))
    print(verdict(case, figures))
    write_json(options.json, {"what": options.what, "model": case.model, "rounds": options.rounds, "seconds": figures})
    if options.docs:
        text = f"{origin(provenance())}:\n\n{markdown(HEADER, rows(figures))}\n\n{verdict(case, figures)}"
        write_section(ROOT / "docs" / "performance.md", f"one-{options.what}", text)


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--what", choices=CASES, default="picture")
    made.add_argument("--rounds", type=int, default=20, help="of each kind")
    made.add_argument("--docs", action="store_true", help="write the section of docs/performance.md")
    main(made.parse_args())
