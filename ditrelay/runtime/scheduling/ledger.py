"""The scheduler's books: what every request holds, and what every edge still has room for.

Nothing here decides anything. A resource (a credit, a reservation, a place at a station, a kept payload) is entered by
one method of ``Ledger`` and struck by one other, so that no path can give something back twice or forget it.

Ownership: only ``Ledger``'s methods change what a ``Record`` holds and the counts of stations, edges and units.
``flow`` owns the queue and what is ``waiting``, ``held``, ``dispatched`` and ``running`` (it fills them, ``Ledger``
takes out); ``recovery`` puts requests back and ends them; ``liveness`` owns the status of units and edges.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from operator import attrgetter

from ditrelay.runtime.messages import Action, Finish, Received, Stage, TransferRejected
from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.request import LEGAL, Request, RequestState
from ditrelay.runtime.scheduling.state import (
    EdgeState,
    EdgeStatus,
    Promise,
    Record,
    SchedulerConfig,
    Station,
    UnitState,
    build_fleet,
)
from ditrelay.runtime.scheduling.watches import StageWatch, Watch
from ditrelay.runtime.topology import Topology

OnState = Callable[[str, RequestState], None]


def _discard(records: list[Record] | deque[Record], record: Record) -> None:
    if record in records:
        records.remove(record)


class Ledger:
    """All state of the scheduler, and the only methods that enter and strike what requests hold.

    Attributes:
        now: seconds, of the present event.
        out: actions that the present event has led to.
        edges: by the leaders they join; local edges are not among them.
        records: live requests and zombies, in order of submission.
        queue: live requests that no encoder has.
        aside: live requests that neither wait in the queue nor are held, until the given time.
        closed: units where a request is to be alone.
        dirty: stations where something became possible since ``Flow.pump`` last looked.
        queue_dirty: an encoder, or a request for one, became free since then.
        lost_roles: why a stage can never be computed again.
    """

    def __init__(self, topology: Topology, config: SchedulerConfig, on_state: OnState | None) -> None:
        self._on_state = on_state
        self.config = config
        self.now = 0.0
        self.out: list[Action] = []
        self.units, self.edges, self.boards = build_fleet(topology, config)
        self.up_edges = 0
        self.records: dict[str, Record] = {}
        self.queue: deque[Record] = deque()
        self.aside: dict[Record, float] = {}
        self.closed: dict[UnitState, None] = {}
        self.dirty: dict[Station, None] = {}
        self.queue_dirty = False
        self.submitted = 0
        self.finished: Counter[str] = Counter()
        self.lost_roles: dict[Stage, str] = {}
        self.transfers: Watch[Record] = Watch(config.transfer_timeout)
        self.stages = StageWatch(config)
        self.drops: Watch[Record] = Watch(config.stage_timeout + config.transfer_timeout)

    def set_edge(self, edge: EdgeState, status: EdgeStatus) -> None:
        """An edge's credits are in its source's pool while it is up."""
        was, edge.status = edge.usable, status
        if edge.usable != was:
            sign = 1 if edge.usable else -1
            self.up_edges += sign
            edge.src.free += sign * (edge.window - edge.used)
        self.dirty[edge.src] = None

    def resize(self, edge: EdgeState, window: int) -> None:
        """Gives an edge another window. With more credits out than that, none is given until enough are back."""
        if edge.usable:
            edge.src.free += window - edge.window
        edge.window = window
        self.dirty[edge.src] = None

    # ------------------------------------------------------------ requests come, change state and go

    def accept(self, request: Request) -> None:
        record = Record(request, self.submitted)
        self.submitted += 1
        self.records[record.id] = record
        self.queue.append(record)
        self.queue_dirty = True

    def move(self, record: Record, state: RequestState) -> None:
        assert state in LEGAL[record.state], f"{record.id}: {record.state} -> {state}"
        record.state = state
        if self._on_state is not None:
            self._on_state(record.id, state)

    def finish(self, action: Finish) -> None:
        self.finished[action.outcome] += 1
        self.out.append(action)

    def forget(self, record: Record) -> None:
        held = record.at or record.source or record.reserved or record.edge or record.promise
        assert not held, f"{record.id} still holds something"
        self.drops.stop(record)
        self.leave_home(record)
        del self.records[record.id]

    def hold(self, record: Record) -> None:
        """Its payload waits at the source for an edge."""
        assert record.source is not None and record.reserved is record.source, f"{record.id} has nothing to send"
        insort(record.source.held, record, key=attrgetter("number"))
        self.dirty[record.source] = None

    def set_back(self, record: Record, until: float) -> None:
        """To its payload where there still is one, else as if it had never been encoded; it goes on at ``until``."""
        self.leave_alone(record)
        if record.source is not None:
            self.move(record, record.source.states.made)
            self.reserve(record, record.source)
        else:
            self.move(record, RequestState.QUEUED)
            self.leave_home(record)
        self.aside[record] = until
        if until <= self.now:
            self.go_on(record)

    def go_on(self, record: Record) -> None:
        """No longer aside: to those that are held, or to the front of the queue."""
        del self.aside[record]
        if record.source is not None:
            self.hold(record)
        else:
            self.queue.appendleft(record)
            self.queue_dirty = True

    def claim_alone(self, record: Record, station: Station) -> None:
        """Closes the unit of ``station`` to others until ``record`` was computed there."""
        assert record.alone is None, f"{record.id} is to be alone somewhere else"
        record.alone = station
        station.unit.alone.append(record)
        self.closed[station.unit] = None

    def leave_alone(self, record: Record) -> None:
        """Does nothing where it has no such claim."""
        station, record.alone = record.alone, None
        if station is None:
            return
        station.unit.alone.remove(record)
        if not station.unit.alone:
            del self.closed[station.unit]
            self.queue_dirty = True
            self.dirty.update((edge.src, None) for edge in station.unit.edges)

    def withdraw(self, record: Record) -> None:
        """Takes it off every list that would lead it on. What it holds stays held."""
        self.aside.pop(record, None)
        self.leave_alone(record)
        if record.at is not None:
            _discard(record.at.waiting, record)
        elif record.source is not None:
            _discard(record.source.held, record)
            self.dirty[record.source] = None  # those behind it may go
        else:
            _discard(self.queue, record)

    def enter_home(self, record: Record, unit: UnitState) -> None:
        record.home = unit
        unit.bound += 1

    def leave_home(self, record: Record) -> None:
        if record.home is not None:
            record.home.bound -= 1
            self.dirty[record.home.stations["encode"]] = None
            record.home = None

    # ------------------------------------------------------------ what requests hold

    def reserve(self, record: Record, station: Station) -> None:
        assert record.reserved is None, f"{record.id} has a reservation"
        record.reserved = station
        station.reserved += 1

    def unreserve(self, record: Record) -> None:
        station, record.reserved = record.reserved, None
        assert station is not None and station.reserved > 0, f"{record.id} has no reservation"
        station.reserved -= 1
        self.dirty[station] = None

    def take_credit(self, record: Record, edge: EdgeState) -> None:
        """Turns the reservation into a credit of ``edge``."""
        self._spend_reservation(record, edge, record.nbytes)
        record.edge = edge

    def return_credit(self, record: Record) -> None:
        edge, record.edge = record.edge, None
        assert edge is not None, f"{record.id} has no credit"
        self._get_back(edge, record.nbytes)

    def _spend_reservation(self, record: Record, edge: EdgeState, nbytes: int) -> None:
        assert record.reserved is edge.src and edge.fits(nbytes), f"{record.id} may not use edge {edge}"
        record.reserved = None
        edge.src.reserved -= 1
        edge.src.free -= 1
        edge.used += 1
        edge.nbytes += nbytes

    def _get_back(self, edge: EdgeState, nbytes: int) -> None:
        assert edge.used > 0, f"edge {edge} gave no credit"
        edge.used -= 1
        edge.nbytes -= nbytes
        if edge.usable:
            edge.src.free += 1
            self.dirty[edge.src] = None

    def promise(self, record: Record, edge: EdgeState, nbytes: int) -> Promise:
        """Turns the reservation into a credit of ``edge`` for a product that is still being made."""
        assert record.promise is None and not edge.local, f"{record.id} can not be promised to edge {edge}"
        self._spend_reservation(record, edge, nbytes)
        edge.promised += 1
        edge.dst.unit.change_load(1)
        record.promise = Promise(edge, self._next_seq(edge), nbytes)
        return record.promise

    def break_promise(self, record: Record) -> None:
        """Its way is lost before its product was made. A live record needs a reservation again."""
        promise = self._end_promise(record)
        promise.target.unit.change_load(-1)
        self._get_back(promise.edge, promise.nbytes)

    def redeem(self, record: Record) -> Promise:
        """The product is made, so its transfer is under way: as after ``take_credit``, ``bind`` and ``depart``."""
        promise = self._end_promise(record)
        assert record.at is None and record.nbytes == promise.nbytes, f"{record.id} is not what was promised"
        record.at, record.edge, record.seq = promise.target, promise.edge, promise.seq
        self.transfers.start(record, self.now)
        return promise

    def _end_promise(self, record: Record) -> Promise:
        promise, record.promise = record.promise, None
        assert promise is not None, f"{record.id} has no promise"
        promise.edge.promised -= 1
        self.dirty[promise.edge.src] = None  # products that are ready may take this edge again
        return promise

    def bind(self, record: Record, station: Station) -> None:
        assert record.at is None, f"{record.id} is somewhere else"
        record.at = station
        station.unit.change_load(1)

    def unbind(self, record: Record) -> None:
        """Takes it off its station, on the way, waiting or dispatched. The credit it used is returned by then."""
        station, record.at = record.at, None
        assert station is not None and record.edge is None, f"{record.id} cannot leave"
        self.landed(record)
        if record.dispatched:
            self._leave_worker(record, station)
        else:
            _discard(station.waiting, record)
        station.unit.change_load(-1)
        self.dirty[station] = None

    def dispatch(self, record: Record, station: Station) -> None:
        """Gives it to the worker; a credit for the product is reserved."""
        record.dispatched = True
        station.dispatched.append(record)
        if station.stage != "decode":
            self.reserve(record, station)
        if len(station.dispatched) == 1:
            self.stages.start(station, self.now)

    def _leave_worker(self, record: Record, station: Station) -> None:
        record.dispatched = False
        record.began = None
        station.dispatched.remove(record)
        self.stages.news(station, self.now)
        if not station.dispatched:
            self.stages.stop(station)

    def depart(self, record: Record, edge: EdgeState) -> int:
        """Its transfer is under way; returns the transfer's number on the edge."""
        record.seq = self._next_seq(edge)
        self.transfers.start(record, self.now)
        return record.seq

    def _next_seq(self, edge: EdgeState) -> int:
        edge.next_seq += 1
        return edge.next_seq - 1

    def landed(self, record: Record) -> None:
        """Its transfer is over, in whatever way."""
        if record.seq >= 0:
            record.seq = -1
            self.transfers.stop(record)

    def keep(self, record: Record, station: Station, header: PayloadHeader) -> None:
        """``station`` made a payload and has it until ``unkeep``."""
        assert record.source is None and record.edge is None, f"{record.id} has an older payload"
        record.source, record.header, record.nbytes = station, header, header.nbytes
        station.kept += header.nbytes

    def unkeep(self, record: Record) -> None:
        station, record.source = record.source, None
        assert station is not None, f"{record.id} is kept nowhere"
        station.kept -= record.nbytes
        _discard(station.held, record)

    def strike(self, record: Record, unit: UnitState) -> None:
        """Everything of ``record`` on ``unit`` is free: the unit said so, or it is lost."""
        if record.at is not None and record.at.unit is unit:
            if record.edge is not None:
                self.return_credit(record)
            self.unbind(record)
        if record.promise is not None and record.promise.target.unit is unit:
            self.break_promise(record)
        if record.reserved is not None and record.reserved.unit is unit:
            self.unreserve(record)
        if record.source is not None and record.source.unit is unit:
            self.unkeep(record)


# ---------------------------------------------------------------- what an event is about


def at_worker(ledger: Ledger, rank: int, request_id: str, stage: Stage) -> tuple[Record, Station] | None:
    """The record, live or zombie, if that stage of it is dispatched to ``rank``."""
    record = ledger.records.get(request_id)
    if record is None or not record.dispatched:
        return None
    station = record.at
    assert station is not None
    return (record, station) if station.leader == rank and station.stage == stage else None


def on_edge(ledger: Ledger, event: Received | TransferRejected) -> Record | None:
    """The record, live or zombie, whose present (or promised) transfer the event is about; ``None`` if it is over."""
    record = ledger.records.get(event.request_id)
    if record is None:
        return None
    edge, seq = (record.promise.edge, record.promise.seq) if record.promise else (record.edge, record.seq)
    if edge is None or seq < 0 or seq != event.seq:
        return None
    known = edge.src.leader == event.src and edge.dst.leader == event.rank and edge.generation == event.generation
    return record if known else None
