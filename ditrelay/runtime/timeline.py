"""A run as lanes of bars: one lane per rank and kind of work, one bar per piece of work, one colour per request."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ditrelay.runtime.metrics import Span, merged, overlap
from ditrelay.runtime.topology import Topology, Unit, role_name

LaneKind = Literal["encode", "send", "receive", "denoise", "decode"]
TRANSFER_KINDS: frozenset[LaneKind] = frozenset({"send", "receive"})

# Twelve hues of one lightness, so ordered that requests of one moment differ most. White text is readable on each.
PALETTE = (
    "#3073c9",
    "#b95624",
    "#24816d",
    "#c34384",
    "#6c7a24",
    "#7563cd",
    "#996b12",
    "#247c99",
    "#ce3f45",
    "#428140",
    "#a154b3",
    "#84705c",
)

_ROLE_TITLES = {"dit": "DiT", "non_dit": "non-DiT", "encode": "encoder", "decode": "decoder"}
_ENCODER_ORDER: tuple[LaneKind, ...] = ("encode", "send")
_REPLICA_ORDER: tuple[LaneKind, ...] = ("encode", "receive", "denoise", "send", "decode")
_DECODER_ORDER: tuple[LaneKind, ...] = ("receive", "decode")

_Bars = dict[tuple[int, str], list["Bar"]]  # by rank and kind


@dataclass(frozen=True, slots=True)
class Bar:
    """One piece of work. Times are seconds since the timeline's zero; ``request`` counts from 1."""

    request: int
    request_id: str
    began: float
    ended: float
    steps: tuple[float, ...] = ()

    @property
    def colour(self) -> str:
        return PALETTE[(self.request - 1) % len(PALETTE)]


@dataclass(frozen=True)
class Lane:
    """What one unit did of one kind, in order of time. ``rank`` is the unit's leader."""

    rank: int
    kind: LaneKind
    bars: tuple[Bar, ...]

    @property
    def is_transfer(self) -> bool:
        return self.kind in TRANSFER_KINDS

    @cached_property
    def tracks(self) -> list[list[Bar]]:
        """The bars in as few rows as show each of them: transfers of several edges may be under way at once."""
        tracks: list[list[Bar]] = []
        for bar in self.bars:
            free = next((track for track in tracks if track[-1].ended <= bar.began), None)
            if free is None:
                tracks.append([bar])
            else:
                free.append(bar)
        return tracks

    def busy(self) -> float | None:
        """Share of the time from the lane's first bar to its last that has a bar; ``None`` without bars."""
        intervals = merged([(bar.began, bar.ended) for bar in self.bars])
        window = intervals[-1][1] - intervals[0][0] if intervals else 0.0
        return sum(ended - began for began, ended in intervals) / window if window > 0 else None


@dataclass(frozen=True)
class Group:
    """The lanes of a unit that stand together: ``rank 3``, ``non-DiT``."""

    title: str
    role: str
    lanes: tuple[Lane, ...]


@dataclass(frozen=True)
class Timeline:
    """A run, ready to be drawn. Only complete work is in it: a stage that failed or was cancelled leaves a gap.

    Attributes:
        model: its name.
        ranks: the topology in words (``3 DiT + 1 non-DiT ranks``).
        groups: in the order in which a request meets them: encode, denoise, decode.
        requests: the number of the last request shown; ``hidden`` before the first one shown are left out.
        overlap: share of the working time in which at least two stages computed (``metrics.overlap``).
    """

    model: str
    ranks: str
    groups: tuple[Group, ...]
    requests: int
    hidden: int
    overlap: float

    @property
    def lanes(self) -> Iterator[Lane]:
        return (lane for group in self.groups for lane in group.lanes)

    @property
    def bars(self) -> Iterator[Bar]:
        return (bar for lane in self.lanes for bar in lane.bars)

    @cached_property
    def began(self) -> float:
        return min((bar.began for bar in self.bars), default=0.0)

    @cached_property
    def ended(self) -> float:
        return max((bar.ended for bar in self.bars), default=0.0)

    @property
    def title(self) -> str:
        return f"{self.model} on {self.ranks}"

    @property
    def summary(self) -> str:
        """How many requests, how long, and how much of it overlapped."""
        count = self.requests - self.hidden
        shown = f"{count:,} request" + ("" if count == 1 else "s")
        if self.hidden:
            shown += f" ({self.hidden + 1} to {self.requests})"
        seconds = format_seconds(self.ended - self.began)
        return f"{shown} in {seconds}; stages overlapped for {self.overlap:.0%} of the working time"


def build_timeline(
    spans: Iterable[Span], topology: Topology, *, model: str, newest: int | None = None, since: float = 0.0
) -> Timeline:
    """The timeline of ``spans``, from zero at the first of them.

    Args:
        spans: what was done (``Engine.spans``); requests are numbered in the order in which work on them began.
        topology: which lanes there are, also where nothing happened.
        model: the model's name.
        newest: show only this many requests, those that began last.
        since: leave out what began before this moment (monotonic seconds).
    """
    kept = sorted((span for span in spans if span.began >= since), key=lambda span: span.began)
    numbers: dict[str, int] = {}
    for span in kept:
        numbers.setdefault(span.request_id, len(numbers) + 1)
    hidden = max(0, len(numbers) - newest) if newest is not None else 0
    shown = [span for span in kept if numbers[span.request_id] > hidden]
    lanes = _bars(shown, numbers, zero=kept[0].began if kept else 0.0)
    return Timeline(
        model=model,
        ranks=describe(topology),
        groups=tuple(_groups(topology, lanes)),
        requests=len(numbers),
        hidden=hidden,
        overlap=overlap(shown),
    )


def describe(topology: Topology) -> str:
    """``3 DiT + 1 non-DiT ranks``, and the sizes of replicas of several ranks: ``... (replicas of 2 and 1)``."""
    counts: Counter[str] = Counter()
    for unit in topology.units:
        counts[_role_title(unit)] += len(unit.members)
    text = " + ".join(f"{count} {role}" for role, count in counts.items())
    text += " rank" if topology.world_size == 1 else " ranks"
    sizes = sorted({len(topology.unit_of(leader).members) for leader in topology.replicas}, reverse=True)
    return f"{text} (replicas of {' and '.join(map(str, sizes))})" if sizes[0] > 1 else text


def lanes_of(topology: Topology) -> list[tuple[int, LaneKind, str, str]]:
    """Every lane, in the order in which a request meets them: leader, kind, the unit's ranks and its role in words."""
    groups = _groups(topology, {})
    return [(lane.rank, lane.kind, group.title, group.role) for group in groups for lane in group.lanes]


def _bars(spans: Iterable[Span], numbers: Mapping[str, int], zero: float) -> _Bars:
    bars: _Bars = defaultdict(list)
    for span in spans:
        steps = tuple(at - zero for at in span.steps)
        bar = Bar(numbers[span.request_id], span.request_id, span.began - zero, span.ended - zero, steps)
        bars[span.rank, span.kind].append(bar)
    return bars


def _groups(topology: Topology, bars: _Bars) -> Iterator[Group]:
    """Encoders first, then replicas, then decoders; a unit that encodes and decodes for others stands at both ends."""
    stages: tuple[list[Group], ...] = ([], [], [])
    for unit in topology.units:
        for stage, kinds in enumerate(_kinds(unit, topology)):
            lanes = tuple(Lane(unit.leader, kind, tuple(bars.get((unit.leader, kind), ()))) for kind in kinds)
            if lanes:
                stages[stage].append(Group(_ranks_title(unit), _role_title(unit), lanes))
    return (group for stage in stages for group in stage)


def _kinds(unit: Unit, topology: Topology) -> tuple[list[LaneKind], list[LaneKind], list[LaneKind]]:
    """The lanes of ``unit`` that stand before, among and after those of the replicas."""
    present: set[LaneKind] = set(unit.roles)
    if any(edge.src == unit.leader for edge in topology.edges):
        present.add("send")
    if any(edge.dst == unit.leader for edge in topology.edges):
        present.add("receive")
    if "denoise" in unit.roles:
        return [], [kind for kind in _REPLICA_ORDER if kind in present], []
    encoding = [kind for kind in _ENCODER_ORDER if kind in present]
    decoding = [kind for kind in _DECODER_ORDER if kind in present]
    return encoding, [], decoding


def _role_title(unit: Unit) -> str:
    role = role_name(unit.roles)
    return _ROLE_TITLES.get(role, role)


def _ranks_title(unit: Unit) -> str:
    """``rank 3``; ``ranks 0-1``: members follow each other."""
    return f"rank {unit.leader}" if len(unit.members) == 1 else f"ranks {unit.members[0]}-{unit.members[-1]}"


def format_seconds(seconds: float) -> str:
    """``0.0123`` -> ``12.3 ms``; ``4.5`` -> ``4.50 s``: three digits, no more."""
    if seconds < 0.9995:
        milliseconds = seconds * 1000
        return f"{milliseconds:.0f} ms" if milliseconds >= 99.95 else f"{milliseconds:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
