"""From samples to figures: percentiles, the steady window, busy shares, and the bounds of performance.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving_load import Sample
from serving_workloads import System

STAGES = ("encode", "denoise", "decode")


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest values (numpy's default). ``share`` from 0 to 1."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def latency_figures(latencies: Sequence[float]) -> dict[str, float]:
    """Seconds. With few samples P99 is hardly more than the slowest: ``count`` says how many there are."""
    return {
        "count": len(latencies),
        "mean": statistics.fmean(latencies),
        "p50": percentile(latencies, 0.5),
        "p95": percentile(latencies, 0.95),
        "p99": percentile(latencies, 0.99),
    }


def stage_medians(samples: Sequence[Sample]) -> dict[str, float]:
    """Median seconds of every stage that the samples report."""
    names = {name for sample in samples for name in sample.done.stages}
    return {
        name: statistics.median(sample.done.stages[name] for sample in samples if name in sample.done.stages)
        for name in sorted(names)
    }


@dataclass(frozen=True)
class Window:
    """The steady part of a saturated phase: from the end of the lead's last request to the end of the last counted.

    With ``units`` requests denoising at once, ends come in bursts; lead and count are multiples of ``units``, so both
    edges are at the same place of a burst.
    """

    began: float
    ended: float
    counted: int

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def rate(self) -> float:
        return self.counted / self.seconds


def lead_and_count(units: int, requests: int, lead: int) -> tuple[int, int]:
    """At least ``lead`` requests before the counted ones, and at least ``requests`` counted, both in whole bursts.

    The lead should be all that are there at once: those that came together at the start are encoded ahead of time, and
    a window with their denoises and without their encodes shows a rate that no system can hold.
    """
    return units * math.ceil(lead / units), units * math.ceil(requests / units)


def steady_window(samples: Sequence[Sample], lead: int, count: int) -> Window:
    """Raises ``ValueError`` where fewer than ``lead + count`` requests have ended."""
    ends = sorted(sample.done.ended for sample in samples)
    if len(ends) < lead + count:
        raise ValueError(f"{len(ends)} requests ended; {lead} before the window and {count} in it are needed")
    return Window(ends[lead - 1], ends[lead + count - 1], count)


def seconds_inside(intervals: Iterable[tuple[float, float]], window: Window) -> float:
    """The sum of the intervals' parts inside the window."""
    inside = (min(ended, window.ended) - max(began, window.began) for began, ended in intervals)
    return sum(seconds for seconds in inside if seconds > 0)


def busy_share(intervals: Iterable[tuple[float, float]], window: Window, lanes: int) -> float:
    """Share of the window that the lanes were busy. ``intervals`` of one lane must not overlap each other."""
    return seconds_inside(intervals, window) / (window.seconds * lanes)


def bound(system: System, stages: Mapping[str, float], own_denoise: float) -> float:
    """Requests a second that the system can reach at most, by the formulas of performance.md.

    Args:
        stages: seconds of encode, denoise and decode of one request on one rank.
        own_denoise: seconds of one denoise on this system's replica (with its sequence parallel degree).
    """
    p = stages["encode"] + stages["decode"]
    match system.kind:
        case "async":
            return min(system.non_dit / p, system.units / own_denoise)
        case "lock-step":
            return 1 / (p + own_denoise)
    return system.units / (p + own_denoise)


def reference_stages(records: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, float]] | None:
    """(system, its e, d, v): one rank's stage times at low load, from ditrelay where it was measured."""
    order = ("colocated", "async", "stock-replicas")
    found = [
        (order.index(record["kind"]), record)
        for record in records
        if record["kind"] in order and record["sp"] == 1 and all(s in low_stages(record) for s in STAGES)
    ]
    if not found:
        return None
    record = min(found, key=lambda pair: pair[0])[1]
    return record["name"], {stage: low_stages(record)[stage] for stage in STAGES}


def low_stages(record: Mapping[str, Any]) -> dict[str, float]:
    """Median stage seconds at low load; empty where they were not measured."""
    stages: dict[str, float] = (record.get("low") or {}).get("stages", {})
    return stages
