"""What previews cost: pictures a second, and where their time goes, with and without, in turns.

The model is ``builtin:timed``, whose stages sleep, on a CPU. All requests are submitted at once, so that every rank has
work until the end. The largest number of previews is one after each step but the last.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

from common import ROOT, markdown, origin, parser, provenance, show, write_json, write_section

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.runtime.tickets import Result

TIMED = "builtin:timed?encode=0.05&denoise=0.3&decode=0.03&steps=10&conditioning_mb=1&latents_mb=0.25"
RANKS = {"2 DiT + 1 (DiT-bound)": 3, "3 DiT + 1 (all busy)": 4}
COUNTS = (0, 3, 9)
SECONDS = 300.0
HEADER = ["ranks", "previews wanted", "pictures/s", "against 0", "denoise ms", "waits for decode ms", "shown a picture"]


def turn(engine: Engine, previews: int, requests: int) -> dict[str, float]:
    """One load of ``requests`` pictures."""
    params = [SamplingParams(prompt=f"picture {seed}", seed=seed, previews=previews) for seed in range(requests)]
    began = time.monotonic()
    tickets = [engine.submit(each) for each in params]
    results = [ticket.result(SECONDS) for ticket in tickets]
    rate = requests / (time.monotonic() - began)
    shown = sum(progress.preview is not None for ticket in tickets for progress in ticket.events())
    return {"rate": rate, "shown": shown / requests, **_means(results)}


def _means(results: Sequence[Result]) -> dict[str, float]:
    parts = {"denoise_ms": "denoise", "wait_ms": "wait_decoder"}
    return {
        name: 1000 * statistics.mean(getattr(each.timings, part) for each in results) for name, part in parts.items()
    }


def measure(ranks: int, requests: int, turns: int) -> dict[int, dict[str, float]]:
    """Medians over the turns, by the number of previews; the order changes from turn to turn."""
    args = ServerArgs(model_path=TIMED, device="cpu", enable_disagg=True, num_gpus=ranks, max_queue=requests + 1)
    done: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    with Engine(args) as engine:
        engine.generate([f"first {number}" for number in range(3 * ranks)])
        for number in range(turns):
            for count in COUNTS if number % 2 else reversed(COUNTS):
                done[count].append(turn(engine, count, requests))
    return {count: {key: statistics.median(each[key] for each in got) for key in got[0]} for count, got in done.items()}


def rows(figures: dict[str, dict[int, dict[str, float]]]) -> list[list[str]]:
    return [
        [
            ranks,
            str(count),
            f"{of['rate']:.3f}",
            f"{100 * (of['rate'] / by_count[0]['rate'] - 1):+.1f}%" if count else "",
            f"{of['denoise_ms']:.1f}",
            f"{of['wait_ms']:.1f}",
            f"{of['shown']:.1f}",
        ]
        for ranks, by_count in figures.items()
        for count, of in by_count.items()
    ]


def main(options: argparse.Namespace) -> None:
    figures = {name: measure(ranks, options.requests, options.turns) for name, ranks in RANKS.items()}
    show("previews", HEADER, rows(figures))
    found: dict[str, Any] = {name: {str(count): of for count, of in each.items()} for name, each in figures.items()}
    write_json(options.json, found)
    if options.docs:
        text = f"{origin(provenance())}:\n\n{markdown(HEADER, rows(figures))}"
        write_section(ROOT / "docs" / "performance.md", "previews", text)


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--requests", type=int, default=40, help="of one turn")
    made.add_argument("--turns", type=int, default=5, help="of each kind")
    made.add_argument("--docs", action="store_true", help="write the section of docs/performance.md")
    main(made.parse_args())
