"""Where a request's time went: spans of work, per-request timings, and how much of a run overlapped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

SpanKind = Literal["encode", "to_dit", "denoise", "to_decoder", "decode", "send", "receive"]
COMPUTE_KINDS: frozenset[SpanKind] = frozenset({"encode", "denoise", "decode"})


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work of one request; times are ``time.monotonic()`` seconds.

    ``to_dit`` and ``to_decoder`` are a hand-off: from the end of the stage that made the tensors until they are usable.
    ``send`` and ``receive`` are what the two ranks of a transfer did for it, once its tensors were made. ``steps``: the
    ends of a denoise's steps.
    """

    request_id: str
    rank: int
    kind: SpanKind
    began: float
    ended: float
    steps: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class Timings:
    """Seconds that one request spent in each place.

    ``to_dit`` and ``to_decoder`` run from the end of the producing stage until the tensors are usable by the consumer.
    ``exposed_transfer`` is the part of ``to_dit`` during which the chosen replica was free and only waited for it.
    """

    queued: float = 0.0
    encode: float = 0.0
    to_dit: float = 0.0
    wait_dit: float = 0.0
    denoise: float = 0.0
    to_decoder: float = 0.0
    wait_decoder: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    exposed_transfer: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class RequestClock:
    """Collects one request's moments as its events arrive; a retried stage overwrites its earlier attempt."""

    submitted: float
    began: dict[SpanKind, float] = field(default_factory=dict)
    ended: dict[SpanKind, float] = field(default_factory=dict)
    replica_free_since: float = 0.0

    def span(self, kind: SpanKind, began: float, ended: float) -> None:
        self.began[kind], self.ended[kind] = began, ended

    def seconds(self, kind: SpanKind) -> float:
        return self.ended[kind] - self.began[kind] if kind in self.ended else 0.0

    def _gap(self, earlier: float | None, later: float | None) -> float:
        return max(0.0, later - earlier) if earlier is not None and later is not None else 0.0

    def exposed_transfer(self) -> float:
        """Seconds that a free replica with this request bound to it waited on the transfer."""
        if "to_dit" not in self.ended:
            return 0.0
        return max(0.0, self.ended["to_dit"] - max(self.began["to_dit"], self.replica_free_since))

    def timings(self, now: float) -> Timings:
        began, ended = self.began, self.ended
        # A request that never leaves its rank has no transfer; it waits from the end of the stage before.
        at_dit = ended.get("to_dit", ended.get("encode"))
        at_decoder = ended.get("to_decoder", ended.get("denoise"))
        return Timings(
            queued=self._gap(self.submitted, began.get("encode")),
            encode=self.seconds("encode"),
            to_dit=self.seconds("to_dit"),
            wait_dit=self._gap(at_dit, began.get("denoise")),
            denoise=self.seconds("denoise"),
            to_decoder=self.seconds("to_decoder"),
            wait_decoder=self._gap(at_decoder, began.get("decode")),
            decode=self.seconds("decode"),
            total=self._gap(self.submitted, now),
            exposed_transfer=self.exposed_transfer(),
        )


def busy_seconds(intervals: Iterable[tuple[float, float]], at_least: int = 1) -> float:
    """Seconds during which at least ``at_least`` of the intervals are open at once."""
    spans = list(intervals)
    edges = sorted([(began, 1) for began, _ in spans] + [(ended, -1) for _, ended in spans])
    total, depth, since = 0.0, 0, 0.0
    for at, change in edges:
        if depth >= at_least:
            total += at - since
        depth, since = depth + change, at
    return total


def overlap(spans: Sequence[Span]) -> float:
    """Share of the working time (any stage computing) during which at least two different stages computed.

    Two denoises side by side on two replicas do not count: the share says how much encode, denoise and decode hid
    behind each other.
    """
    working = busy_seconds((s.began, s.ended) for s in spans if s.kind in COMPUTE_KINDS)
    if working == 0.0:
        return 0.0
    stages = [merged([(s.began, s.ended) for s in spans if s.kind == kind]) for kind in sorted(COMPUTE_KINDS)]
    return busy_seconds((interval for stage in stages for interval in stage), at_least=2) / working


def merged(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of the intervals, as disjoint intervals in order."""
    out: list[tuple[float, float]] = []
    for began, ended in sorted(intervals):
        if out and began <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], ended))
        else:
            out.append((began, ended))
    return out
