"""Counts and histograms since the start, for /metrics. What one request took is in ``metrics.Timings``."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from ditrelay.runtime.messages import Decoded, Denoised, Encoded, Stage, StageFailed, Started, StepDone, WorkerEvent
from ditrelay.runtime.metrics import Timings
from ditrelay.runtime.request import RequestState

# Seconds. From a hand-off between two GPUs (half a millisecond) to a long clip on one of them (minutes).
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_POSITION = {state: number for number, state in enumerate(RequestState)}


@dataclass(frozen=True, slots=True)
class HistogramReading:
    """How many durations were at most each of ``BOUNDS`` but not at most the one before; last, those above them all.

    ``total`` is the sum of all durations in seconds.
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    total: float = 0.0


@dataclass(frozen=True)
class Readings:
    """All meters at one moment.

    Attributes:
        seconds: per field of ``Timings``, over the requests that are done.
        busy: seconds that a stage computed at a rank (of a replica: its leader), a denoise up to its newest step.
        retries: how often a request was set back, by the state that it was in.
    """

    seconds: Mapping[str, HistogramReading] = field(default_factory=lambda: MappingProxyType({}))
    busy: Mapping[tuple[int, Stage], float] = field(default_factory=lambda: MappingProxyType({}))
    retries: Mapping[RequestState, int] = field(default_factory=lambda: MappingProxyType({}))


class _Histogram:
    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds

    def read(self) -> HistogramReading:
        return HistogramReading(tuple(self._counts), self._total)


class Meters:
    """Owned by one thread; ``read`` makes a copy that any thread may keep."""

    def __init__(self) -> None:
        self._seconds = {each.name: _Histogram() for each in fields(Timings)}
        self._busy: defaultdict[tuple[int, Stage], float] = defaultdict(float)
        self._counted_to: dict[int, float] = {}  # by rank: the moment up to which its present denoise is in ``_busy``
        self._retries: Counter[RequestState] = Counter()

    def finished(self, timings: Timings) -> None:
        """A request is done."""
        for name, seconds in timings.as_dict().items():
            self._seconds[name].add(seconds)

    def moved(self, old: RequestState, new: RequestState) -> None:
        """A request changed its state; one that went back is tried again."""
        if _POSITION[new] < _POSITION[old]:
            self._retries[old] += 1

    def observe(self, event: WorkerEvent) -> None:
        """Adds up how long the stages computed."""
        match event:
            case Encoded(rank=rank, began=began, at=at):
                self._busy[rank, "encode"] += at - began
            case Decoded(rank=rank, began=began, at=at):
                self._busy[rank, "decode"] += at - began
            case Started(rank=rank, stage="denoise", at=at):
                self._counted_to[rank] = at
            case StepDone(rank=rank, at=at):
                self._count_denoise(rank, at)
                self._counted_to[rank] = at
            case Denoised(rank=rank, at=at) | StageFailed(rank=rank, stage="denoise", at=at):
                self._count_denoise(rank, at)
                self._counted_to.pop(rank, None)

    def _count_denoise(self, rank: int, at: float) -> None:
        self._busy[rank, "denoise"] += max(0.0, at - self._counted_to.get(rank, at))

    def read(self) -> Readings:
        seconds = {name: histogram.read() for name, histogram in self._seconds.items()}
        return Readings(seconds, dict(self._busy), dict(self._retries))
