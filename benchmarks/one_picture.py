"""How long a newcomer waits: one picture at a time of the built-in model on a CPU, against the stock pipeline.

128x128 pixels, guidance 2, one thread a process (``OMP_NUM_THREADS=1``). Every system is warm, as a server is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from common import ROOT, markdown, origin, parser, provenance, show, write_json, write_section

from ditrelay import Engine, ServerArgs
from ditrelay.models.card import load_card

AIM_SECONDS = 0.7  # for 8 steps
STEPS = (8, 4)
PROMPT = "a red apple above a blue kite"
SYSTEMS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "1 DiT + 1": {"enable_disagg": True, "num_gpus": 2},
    "2 ranks, a branch of the guidance each": {"num_gpus": 2, "cfg_parallel_degree": 2},
}
STOCK = "stock ZImagePipeline, one thread"
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


def ours(settings: dict[str, Any], rounds: int) -> dict[int, dict[str, float]]:
    with Engine(ServerArgs(device="cpu", **settings)) as engine:

        def draw(steps: int, seed: int) -> dict[str, float]:
            timings = engine.generate(PROMPT, seed=seed, num_inference_steps=steps).timings
            return {name: getattr(timings, name) for name in ("encode", "denoise", "decode")}

        return {steps: timed(lambda seed, steps=steps: draw(steps, seed), rounds) for steps in STEPS}


def stock(rounds: int) -> dict[int, dict[str, float]]:
    """The stock pipeline in this process. It writes no file, which ours does."""
    card = load_card("builtin:emoji")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(card.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)

    def draw(steps: int, seed: int) -> dict[str, float]:
        pipeline(
            PROMPT,
            height=card.default_height,
            width=card.default_width,
            num_inference_steps=steps,
            guidance_scale=card.default_guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        return {}

    return {steps: timed(lambda seed, steps=steps: draw(steps, seed), rounds) for steps in STEPS}


def rows(figures: Figures) -> list[list[str]]:
    names = ("median", "fastest", "slowest", "encode", "denoise", "decode")
    return [
        [system, str(steps), *(f"{of[name]:.3f}" if name in of else "" for name in names)]
        for system, by_steps in figures.items()
        for steps, of in by_steps.items()
    ]


def verdict(figures: Figures) -> str:
    slow = {name: of[8]["median"] for name, of in figures.items() if name != STOCK and of[8]["median"] >= AIM_SECONDS}
    missed = ", ".join(f"{name} ({seconds:.2f} s)" for name, seconds in slow.items())
    return (
        f"Aim: 8 steps in less than {AIM_SECONDS:g} s: {f'missed by {missed}' if slow else 'reached by every system'}."
    )


def main(options: argparse.Namespace) -> None:
    figures = {name: ours(settings, options.rounds) for name, settings in SYSTEMS.items()}
    figures[STOCK] = stock(options.rounds)
    show("one picture", HEADER, rows(figures))
    print(verdict(figures))
    write_json(options.json, {"rounds": options.rounds, "seconds": figures})
    if options.docs:
        text = f"{origin(provenance())}:\n\n{markdown(HEADER, rows(figures))}\n\n{verdict(figures)}"
        write_section(ROOT / "docs" / "performance.md", "one-picture", text)


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=20, help="pictures of each kind")
    made.add_argument("--docs", action="store_true", help="write the section of docs/performance.md")
    main(made.parse_args())
