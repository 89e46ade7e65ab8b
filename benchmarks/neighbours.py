"""What a killed DiT rank costs the requests on other replicas: the gaps between their steps, before and after.

    python benchmarks/neighbours.py [--kills 10] [--json FILE] [--docs]

Three DiT ranks and one non-DiT rank, with the model whose stages sleep: a step takes the same time on any machine, so
what a gap has more is the fault's. ``--docs`` writes the section "neighbours" of docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from common import ROOT, markdown, origin, parser, provenance, show, write_json, write_section

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.engine import Progress, Ticket
from ditrelay.errors import RequestFailed

PAGE = ROOT / "docs" / "reliability.md"
STEP_SECONDS = 0.05
STEPS = 40
MODEL = (
    f"builtin:timed?encode=0.02&denoise={STEP_SECONDS * STEPS:g}&decode=0.02&steps={STEPS}"
    "&conditioning_mb=2&latents_mb=0.2"
)
IN_FLIGHT = 8
SETTLE_SECONDS = 3.0
AFTER_SECONDS = 3.0  # a kill is felt within this, if at all


@dataclass(frozen=True)
class Gap:
    """Between two steps of one request, or from the start of its denoise to the first. Monotonic seconds."""

    request_id: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Load:
    """Keeps requests in flight and notes when their steps were done."""

    def __init__(self, engine: Engine) -> None:
        self.steps: dict[str, list[float]] = defaultdict(list)
        self.failed: list[str] = []
        self._engine = engine
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(IN_FLIGHT)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)

    def _client(self) -> None:
        while not self._stopping.is_set():
            ticket: Ticket = self._engine.submit(SamplingParams(prompt="a cat"))
            ticket.subscribe(self._note)
            try:
                ticket.result(60)
            except RequestFailed as error:
                self.failed.append(error.reason)

    def _note(self, progress: Progress) -> None:
        if progress.step:
            self.steps[progress.request_id].append(progress.at)

    def gaps(self) -> list[Gap]:
        return [
            Gap(request_id, early, late)
            for request_id, moments in list(self.steps.items())
            for early, late in zip(moments, moments[1:], strict=False)
        ]


def ranks_of(engine: Engine) -> dict[str, set[int]]:
    """The DiT ranks on which each finished denoise ran."""
    ranks: dict[str, set[int]] = defaultdict(set)
    for span in engine.spans:
        if span.kind == "denoise":
            ranks[span.request_id].add(span.rank)
    return ranks


def kill(engine: Engine, rank: int) -> float:
    """When it was done."""
    pid = engine.status().workers[rank].pid
    assert pid is not None, "the engine is at full strength"
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def await_full_strength(engine: Engine, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not engine.ready:
        if time.monotonic() > until:
            raise SystemExit(f"not at full strength after {seconds:g} s: {engine.status()}")
        time.sleep(0.05)


def measure(kills: int, seed: int) -> dict[str, Any]:
    """The step gaps of requests on replicas that were not hit, away from kills and just after them."""
    choose = random.Random(seed)
    args = ServerArgs(model_path=MODEL, device="cpu", enable_disagg=True, num_gpus=4, log_level="error")
    hits: list[tuple[float, int]] = []
    with Engine(args) as engine:
        with Load(engine) as load:
            for _ in range(kills):
                time.sleep(SETTLE_SECONDS)
                await_full_strength(engine)
                rank = choose.choice(engine.topology.replicas)
                hits.append((kill(engine, rank), rank))
                time.sleep(AFTER_SECONDS)
        ranks = ranks_of(engine)
    return {
        "step_seconds": STEP_SECONDS,
        "kills": kills,
        "failed": load.failed,
        **split(load.gaps(), ranks, hits),
    }


def split(gaps: list[Gap], ranks: dict[str, set[int]], hits: list[tuple[float, int]]) -> dict[str, Any]:
    """Gaps just after a kill, on other ranks than the killed one, and those of all other times."""
    quiet, after = [], []
    for gap in gaps:
        near = [rank for at, rank in hits if gap.ended > at and gap.began < at + AFTER_SECONDS]
        if not near:
            quiet.append(gap.seconds)
        elif not ranks[gap.request_id] & set(near) and ranks[gap.request_id]:
            after.append(gap.seconds)
    return {"quiet": figures(quiet), "after": figures(after)}


def figures(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    return {
        "count": len(values),
        "median": values[len(values) // 2],
        "p99": values[int(len(values) * 0.99)],
        "max": values[-1],
    }


def rows(result: dict[str, Any]) -> list[list[str]]:
    names = {"quiet": "no rank away", "after": f"{AFTER_SECONDS:g} s after another replica's rank was killed"}
    return [
        [text, f"{result[name]['count']:.0f}", *(f"{result[name][key] * 1000:.1f}" for key in ("median", "p99", "max"))]
        for name, text in names.items()
    ]


HEADER = ("steps of requests on other replicas", "count", "median ms", "99% ms", "largest ms")


def section(result: dict[str, Any]) -> str:
    failed = len(result["failed"])
    return (
        f"{origin(provenance())}: a step sleeps "
        f"{result['step_seconds'] * 1000:g} ms, a DiT rank is killed {result['kills']} times, {failed} requests "
        f"failed.\n\n{markdown(HEADER, rows(result))}"
    )


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--kills", type=int, default=10)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--docs", action="store_true", help="write the section of docs/reliability.md")
    given = arguments.parse_args()
    result = measure(given.kills, given.seed)
    show("Neighbours of a killed rank", HEADER, rows(result))
    write_json(given.json, result)
    if given.docs:
        write_section(PAGE, "neighbours", section(result))
    worst = result["after"]["max"] - result["step_seconds"]
    with contextlib.suppress(BrokenPipeError):
        print(f"{len(result['failed'])} requests failed; the largest delay of a step was {worst * 1000:.1f} ms")
    return 1 if result["failed"] or worst > result["step_seconds"] else 0


if __name__ == "__main__":
    sys.exit(main())
