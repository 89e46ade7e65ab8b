"""How much of the bound asynchronous disaggregation reaches, against lock-step, with stages that sleep.

The timed model's stages take exactly e, d and v seconds of a rank and no CPU, so what is measured is everything else:
scheduling, the control plane, and 8 MB out and 1 MB back per request through real processes and gloo. The baseline is
lock-step (--use-async-comm false) in the same run. Encode and decode of a rank never run at once (one lock), e = v,
p = e + v. With k non-DiT and M DiT ranks the bound of async is min(k/p, M/d), of lock-step k/(p + d) requests/s.

Throughput is counted in the steady state: requests keep waiting until the last counted one is done.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import ROOT, markdown, origin, parser, provenance, show, write_json, write_section
from handoff import measure_handoff

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.runtime.metrics import Span

LEAD_IN = 8  # requests before the counted ones: the pipeline fills
LEAD_OUT = 10  # requests after them: the pipeline stays full
# p/d and the d that keeps a point short; d is at most 0.3 s.
POINTS = ((0.05, 0.3), (0.2, 0.3), (0.5, 0.3), (1.0, 0.2), (2.0, 0.15))


@dataclass(frozen=True)
class Point:
    """One measured point. Rates: requests a second; ``in_flight``: most payloads on one edge, on the way or waiting."""

    non_dit: int
    dit: int
    ratio: float
    d: float
    p: float
    async_rate: float
    async_bound: float
    lock_step_rate: float
    lock_step_bound: float
    in_flight: int
    exposed_ms: float

    @property
    def async_share(self) -> float:
        return self.async_rate / self.async_bound

    @property
    def lock_step_share(self) -> float:
        return self.lock_step_rate / self.lock_step_bound

    @property
    def speedup(self) -> float:
        return self.async_rate / self.lock_step_rate


def measure_rate(args: ServerArgs, count: int) -> tuple[float, list[Span], float]:
    """(requests a second in the steady state, spans, median exposed transfer in seconds)."""
    with Engine(args) as engine:
        total = LEAD_IN + count + LEAD_OUT
        tickets = [engine.submit(SamplingParams(prompt=f"request {i}", seed=i)) for i in range(total)]
        results = [ticket.result(timeout=600) for ticket in tickets]
        spans = engine.spans
    ends = sorted(span.ended for span in spans if span.kind == "decode")[-total:]
    rate = count / (ends[LEAD_IN + count - 1] - ends[LEAD_IN - 1])
    return rate, spans, statistics.median(result.timings.exposed_transfer for result in results)


def most_in_flight(spans: Sequence[Span]) -> int:
    """The most payloads between the end of their encode and the start of their denoise, at one replica."""
    encoded = {span.request_id: span.ended for span in spans if span.kind == "encode"}
    changes: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for span in spans:
        if span.kind == "denoise" and span.request_id in encoded:
            changes[span.rank] += [(encoded[span.request_id], 1), (span.began, -1)]
    most = 0
    for moments in changes.values():
        depth = 0
        for _, change in sorted(moments):
            depth += change
            most = max(most, depth)
    return most


def measure_point(dit: int, ratio: float, d: float, count: int) -> Point:
    p = ratio * d
    model = f"builtin:timed?encode={p / 2:g}&denoise={d:g}&decode={p / 2:g}&conditioning_mb=8&latents_mb=1&steps=1"
    common = dict(model_path=model, device="cpu", enable_disagg=True, num_gpus=dit + 1, log_level="warning")
    async_rate, spans, exposed = measure_rate(ServerArgs(**common), count)
    lock_step_rate, _, _ = measure_rate(ServerArgs(**common, use_async_comm=False), count)
    return Point(
        non_dit=1,
        dit=dit,
        ratio=ratio,
        d=d,
        p=p,
        async_rate=async_rate,
        async_bound=min(1 / p, dit / d),
        lock_step_rate=lock_step_rate,
        lock_step_bound=1 / (p + d),
        in_flight=most_in_flight(spans),
        exposed_ms=exposed * 1000,
    )


HEADER = ("ranks", "p/d", "d ms", "async req/s", "of bound", "lock-step req/s", "of bound", "async/lock-step")
HEADER += ("in flight per edge", "exposed ms")


def row(point: Point) -> list[str]:
    return [
        f"{point.non_dit}+{point.dit}",
        f"{point.ratio:g}",
        f"{point.d * 1000:.0f}",
        f"{point.async_rate:.2f}",
        f"{point.async_share:.1%}",
        f"{point.lock_step_rate:.2f}",
        f"{point.lock_step_share:.1%}",
        f"{point.speedup:.2f}x",
        str(point.in_flight),
        f"{point.exposed_ms:.1f}",
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=60, help="requests counted a point (default 60)")
    arguments.add_argument("--dit", type=int, nargs="+", default=[1, 3], help="DiT ranks beside one non-DiT rank")
    arguments.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    options = arguments.parse_args()
    began = time.monotonic()
    handoff = measure_handoff()
    points = []
    for dit in options.dit:
        for ratio, d in POINTS:
            points.append(measure_point(dit, ratio, d, options.requests))
            print(f"[{time.monotonic() - began:5.0f} s] " + "  ".join(row(points[-1])), flush=True)
    rows = [row(point) for point in points]
    show("Throughput of async and lock-step, against their bounds", HEADER, rows)
    handoff.show()
    figures = {"points": [asdict(point) for point in points], "handoff": asdict(handoff)}
    write_json(options.json, figures)
    if options.docs:
        source = provenance()
        caption = f"{origin(source)}:"
        text = f"{caption}\n\n{markdown(HEADER, rows)}\n\n{handoff.sentence()}"
        write_section(Path(ROOT / "docs" / "performance.md"), "overlap", text)


if __name__ == "__main__":
    main()
