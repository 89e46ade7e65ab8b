"""What the scheduler knows: requests, stations, units and edges, as plain records without behaviour of their own.

``ledger`` has the methods that change what requests hold; see there for who else may change what.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ditrelay.runtime.messages import Stage
from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.request import Request, RequestState
from ditrelay.runtime.topology import Topology, Unit

_S = RequestState

# Shapes of requests that a station remembers to have computed.
KNOWN_SHAPES = 256

UnitStatus = Literal["starting", "up", "down", "failed"]
EdgeStatus = Literal["closed", "opening", "up"]


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits and time-outs. Times in seconds.

    Attributes:
        max_pending_transfers: window of one edge: payloads on the way plus payloads that wait at the receiver.
        max_pending_bytes: byte budget of one edge for the same.
        max_queue: requests that may wait for an encoder.
        lock_step: one request per encoder unit between its encode and its end, window 1.
        transfer_timeout: for one transfer, and for one edge to open.
        stage_timeout: for a stage without any sign of life; the only limit for the first run of a shape in a process.
        hang_timeout: later, a stage hangs that shows no sign of life for this long and for much longer than usual.
        startup_timeout: from the spawn of a unit until all of its members are up.
        max_attempts: how often a request may be lost with the worker that computes it, or in a failed transfer,
            before it fails.
        max_restarts: a unit that dies once more is given up (and tried again in minutes), where it finished no stage in
            between and was up for no longer than ``restart_window`` in all. Starts that fail are no deaths.
        restart_window: see ``max_restarts``.
    """

    max_pending_transfers: int = 2
    max_pending_bytes: int = 1 << 30
    max_queue: int = 256
    lock_step: bool = False
    transfer_timeout: float = 60.0
    stage_timeout: float = 600.0
    hang_timeout: float = 60.0
    startup_timeout: float = 600.0
    max_attempts: int = 3
    max_restarts: int = 4
    restart_window: float = 60.0

    @property
    def window(self) -> int:
        return 1 if self.lock_step else self.max_pending_transfers


class StageStates(NamedTuple):
    """The states of a request on its way through one stage. An encode comes straight from the queue: it never waits."""

    moving: RequestState
    arrived: RequestState
    running: RequestState
    made: RequestState


Shape = tuple[int | None, int | None, int | None]  # height, width, frames

STATES: dict[Stage, StageStates] = {
    "encode": StageStates(_S.QUEUED, _S.ENCODING, _S.ENCODING, _S.ENCODED),
    "denoise": StageStates(_S.TO_DIT, _S.AT_DIT, _S.DENOISING, _S.DENOISED),
    "decode": StageStates(_S.TO_DECODER, _S.AT_DECODER, _S.DECODING, _S.DONE),
}
NEXT: dict[Stage, Stage] = {"encode": "denoise", "denoise": "decode"}


@dataclass(eq=False, slots=True)
class Promise:
    """The way of a product that is still being made: its transfer is arranged at both ends, and begins when it is made.

    It holds a credit of ``edge`` and counts as load at the edge's destination, where the buffers are.

    Attributes:
        seq: number of the transfer on the edge.
        received: the payload is there; the word that it was made has not come yet.
    """

    edge: EdgeState
    seq: int
    nbytes: int
    received: bool = False

    @property
    def target(self) -> Station:
        return self.edge.dst


@dataclass(eq=False, slots=True)
class Record:
    """One request and everything that is held for it. After its end it stays, a *zombie*, until all of that is back.

    Attributes:
        number: order of submission.
        attempts: how often it was lost with the worker that computed it, or in a transfer that failed or was rejected.
        at: where its stage is or will be computed: the input is on the way there, waits there or is dispatched.
        seq: number of the transfer that is on the way to ``at``, -1 while none is.
        source: has the payload that the stage at ``at`` needs (or that no ``at`` is chosen for yet).
        header: of the payload made last; ``nbytes`` is its size.
        reserved: from whose pool it has a hop credit reserved.
        edge: whose credit it uses.
        promise: while it is encoded: the way that the conditioning will take, where that is arranged already.
        home: lock-step only: the encoder unit that takes no other request before this one ends.
        dropping: units that have not answered ``Drop`` yet; only a zombie has any.
        began: when the worker began its stage, while that is computed.
        step: of its denoise, the one done last.
        ran_out: of memory, once: the next time it fails.
        alone: where it is tried again with nothing else on the unit.
        previews: its previews are made; no more after one whose maker was lost with it, or did not answer.
    """

    request: Request
    number: int
    state: RequestState = RequestState.QUEUED
    attempts: int = 0
    at: Station | None = None
    dispatched: bool = False
    seq: int = -1
    source: Station | None = None
    header: PayloadHeader | None = None
    nbytes: int = 0
    reserved: Station | None = None
    edge: EdgeState | None = None
    promise: Promise | None = None
    home: UnitState | None = None
    dropping: set[UnitState] = field(default_factory=set)
    began: float | None = None
    step: int = 0
    ran_out: bool = False
    alone: Station | None = None
    previews: bool = True

    @property
    def shape(self) -> Shape:
        params = self.request.params
        return params.height, params.width, params.num_frames

    @property
    def size(self) -> int:
        """Pixels in all frames."""
        return math.prod(side or 1 for side in self.shape)

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def on_the_way(self) -> bool:
        return self.seq >= 0

    def holders(self) -> list[UnitState]:
        """The units that have or will have something of it, source first."""
        promised = None if self.promise is None else self.promise.target
        return [station.unit for station in (self.source, self.at, promised) if station is not None]


@dataclass(eq=False, slots=True)
class EdgeState:
    """One directed edge, its credits and its life. A local edge joins two stages of one unit and is always usable.

    ``used`` and ``nbytes`` count payloads on the way and payloads that wait at the receiver for their stage to start.
    ``window`` is at most ``full_window``; while it is smaller, so is the byte budget, in the same proportion. But one
    payload that fits into the whole budget always has room on an empty edge. ``promised`` transfers of them wait for a
    product that is still being made.
    """

    src: Station
    dst: Station
    window: int
    full_window: int
    max_bytes: int
    status: EdgeStatus = "closed"
    generation: int = 0
    ends: set[int] = field(default_factory=set)
    failures: int = 0
    next_seq: int = 0
    used: int = 0
    nbytes: int = 0
    promised: int = 0

    @property
    def local(self) -> bool:
        return self.src.unit is self.dst.unit

    @property
    def usable(self) -> bool:
        return self.status == "up"

    def fits(self, nbytes: int) -> bool:
        if self.status != "up" or self.used >= self.window:
            return False
        budget = self.max_bytes if self.used == 0 else self.max_bytes * self.window // self.full_window
        return self.nbytes + nbytes <= budget

    def __str__(self) -> str:
        return f"{self.src.leader}->{self.dst.leader}"


@dataclass(eq=False, slots=True)
class Station:
    """One stage at one unit: what waits for it, what it computes, what it has made and not yet sent.

    Attributes:
        waiting: inputs are here, not dispatched (encode has the common queue instead).
        dispatched: given to the worker, oldest first; a zombie stays until its ``Dropped``.
        held: products that wait for an edge, oldest request first.
        out: edges that its products may take, by the leader they go to; ``local`` is the only one where it is there.
        free: credits of the usable edges in ``out``; ``reserved`` of these are promised to requests in the making.
        kept: bytes of products that are here until the next stage is complete.
        shapes: of requests that this process has computed, newest last.
    """

    unit: UnitState
    stage: Stage
    states: StageStates
    leader: int
    waiting: deque[Record] = field(default_factory=deque)
    dispatched: list[Record] = field(default_factory=list)
    held: list[Record] = field(default_factory=list)
    out: dict[int, EdgeState] = field(default_factory=dict)
    local: EdgeState | None = None
    free: int = 0
    reserved: int = 0
    kept: int = 0
    shapes: dict[Shape, None] = field(default_factory=dict)

    @property
    def running(self) -> Record | None:
        """The one of the dispatched that the worker works on; of two (one becomes a file already), the older."""
        return next((record for record in self.dispatched if record.began is not None), None)

    def has_run(self, shape: Shape) -> None:
        self.shapes.pop(shape, None)
        self.shapes[shape] = None
        if len(self.shapes) > KNOWN_SHAPES:
            del self.shapes[next(iter(self.shapes))]

    @property
    def may_produce(self) -> bool:
        """Whether a product made now would have a credit; pixels need none."""
        return self.stage == "decode" or self.free > self.reserved


@dataclass(eq=False, slots=True)
class UnitState:
    """One unit and its life.

    Attributes:
        members_up: of the current spawn.
        load: requests at or on the way to any of its stations.
        bound: lock-step only: live requests that were encoded here.
        memory: share of its memory that each member uses, as its newest heartbeat says.
        deaths: in a row, without a finished stage in between, and within the restart window; in seconds of ``lived``.
        died_in: the stages that it computed at these deaths; one of each must be finished for them to be forgotten.
        lived: seconds that it was up, all its processes together; the present one since ``up_since``.
        restarted: how often it was to be restarted.
        failed_starts: in a row, the first of them at ``failing_since``.
        given_up: how often, since it last finished its work.
        reason: why it is down or failed.
        alone: requests that ran out of memory here, to be tried again one by one; until then no other comes.
        preview: the request of which a preview is made here. One that was given up stays until another takes its place:
            should it hold work up, that is found out early.
    """

    unit: Unit
    stations: dict[Stage, Station] = field(default_factory=dict)
    edges: list[EdgeState] = field(default_factory=list)
    boards: list[LoadBoard] = field(default_factory=list)
    status: UnitStatus = "down"
    members_up: set[int] = field(default_factory=set)
    memory: dict[int, float] = field(default_factory=dict)
    load: int = 0
    bound: int = 0
    deaths: deque[float] = field(default_factory=deque)
    died_in: set[Stage] = field(default_factory=set)
    lived: float = 0.0
    up_since: float = 0.0
    restarted: int = 0
    respawn_at: float = 0.0
    failed_starts: int = 0
    failing_since: float = 0.0
    given_up: int = 0
    reason: str | None = None
    alone: deque[Record] = field(default_factory=deque)
    preview: Record | None = None

    @property
    def leader(self) -> int:
        return self.unit.leader

    @property
    def idles(self) -> bool:
        """It has no work, nor is any on the way to it, and no preview is waited for."""
        waited_for = self.preview is not None and self.preview.previews
        return self.status == "up" and not self.load and not self.alone and not waited_for

    @property
    def is_quiet(self) -> bool:
        """It is up and has no request, but for products that are on their way elsewhere."""
        going_on = any(station.held for station in self.stations.values() if station.local is not None)
        return self.status == "up" and not self.load and not going_on

    def makes_alone(self, stage: Stage) -> bool:
        """Whether it computes all that ``stage`` needs of a request."""
        before = list(STATES)[: list(STATES).index(stage) + 1]
        return all(each in self.stations for each in before)

    def has_finished(self, stage: Stage) -> None:
        """It does such work, so what ended it before was no crash loop."""
        self.died_in.discard(stage)
        if not self.died_in:
            self.deaths.clear()
            self.given_up = 0

    def change_load(self, by: int) -> None:
        size = len(self.unit.members)
        old, self.load = self.load, self.load + by
        assert self.load >= 0, f"unit {self.leader} got back more work than it had"
        for board in self.boards:
            board.replace(self.leader, (old + 1) / size, (self.load + 1) / size)


class LoadBoard:
    """The units of one role: least load per rank first, ties to the lowest leader.

    The load is what a unit would have with one request more, so that of two idle units the larger one comes first.
    """

    def __init__(self, units: list[UnitState]) -> None:
        self.order = sorted(((unit.load + 1) / len(unit.unit.members), unit.leader) for unit in units)

    def replace(self, leader: int, old: float, new: float) -> None:
        del self.order[bisect_left(self.order, (old, leader))]
        insort(self.order, (new, leader))


Fleet = tuple[dict[int, UnitState], dict[tuple[int, int], EdgeState], dict[Stage, LoadBoard]]


def build_fleet(topology: Topology, config: SchedulerConfig) -> Fleet:
    """Units by leader, edges by the leaders they join, and per stage the board of the units that compute it."""
    units = {unit.leader: _unit_state(unit) for unit in topology.units}
    edges: dict[tuple[int, int], EdgeState] = {}
    boards: dict[Stage, LoadBoard] = {}
    for stage in STATES:
        workers = [unit for unit in units.values() if stage in unit.stations]
        boards[stage] = board = LoadBoard(workers)
        for unit in workers:
            unit.boards.append(board)
    for src, dst in topology.edges:
        # An encoder that sends does not denoise, so the source's roles say which hop this is.
        stage = "denoise" if "denoise" in units[src].stations else "encode"
        edge = _join(units[src].stations[stage], units[dst].stations[NEXT[stage]], config)
        edges[src, dst] = edge
        units[src].edges.append(edge)
        units[dst].edges.append(edge)
    for unit in units.values():
        for made, used in NEXT.items():
            if {made, used} <= unit.stations.keys():
                _join(unit.stations[made], unit.stations[used], config)
    return units, edges, boards


def _unit_state(unit: Unit) -> UnitState:
    state = UnitState(unit)
    for stage in STATES:
        if stage in unit.roles:
            state.stations[stage] = Station(state, stage, STATES[stage], unit.leader)
    return state


def _join(src: Station, dst: Station, config: SchedulerConfig) -> EdgeState:
    edge = EdgeState(src, dst, config.window, config.window, config.max_pending_bytes)
    src.out[dst.leader] = edge
    if edge.local:
        edge.status = "up"
        src.free = edge.window
        src.local = edge
    return edge
