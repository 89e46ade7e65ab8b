"""The scheduler: a pure state machine. It takes events and returns actions; the caller does the I/O and has the clock.

Rooms, in scheduling/: ``state`` (what there is), ``ledger`` (what requests hold), ``flow`` (requests forward),
``recovery`` (requests back and out), ``liveness`` (units, edges, deadlines), ``previews`` (who makes them). What the
caller and the workers owe it:

- Events of one rank arrive in the order in which that rank sent them, and commands to one rank are delivered in the
  order of the actions. Nothing is delivered from a process after its ``WorkerDown`` or ``Kill``.
- ``CloseEdge`` frees what its generation had not delivered yet. ``Release`` frees whatever the rank has of the request,
  also an input that arrived over a generation that is closed by now.
- After ``Dropped`` a worker says nothing more of that request, except perhaps ``Sent``, and of its previews.
- Payloads between two stages of one unit stay in the worker: no ``Send``, ``Expect`` or ``Release``.
- ``Launched`` may be left out. An ``early`` transfer that it led to moves nothing before the encode is done. Encodes of
  one rank are launched and done in the order in which they were asked for.
- ``Tick`` comes about once a second.
- ``Preview`` is answered with ``Previewed``, once nothing else is to do there; nothing waits for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ditrelay.runtime.messages import (
    Action,
    CancelRequest,
    Decoded,
    Denoised,
    Dropped,
    EdgeFailed,
    EdgeUp,
    Encoded,
    Heartbeat,
    Launched,
    Received,
    SchedulerEvent,
    Sent,
    Stage,
    StageFailed,
    Started,
    StepDone,
    Submit,
    Tick,
    TransferRejected,
    WorkerDown,
    WorkerUp,
)
from ditrelay.runtime.preview_messages import Previewed, PreviewTaken
from ditrelay.runtime.request import RequestState
from ditrelay.runtime.scheduling.flow import Flow
from ditrelay.runtime.scheduling.ledger import Ledger, OnState
from ditrelay.runtime.scheduling.liveness import Liveness
from ditrelay.runtime.scheduling.previews import Previews
from ditrelay.runtime.scheduling.recovery import Recovery
from ditrelay.runtime.scheduling.state import EdgeState, SchedulerConfig, Station, UnitState, UnitStatus
from ditrelay.runtime.start_messages import Restart, StartFailed
from ditrelay.runtime.topology import Edge, Topology, Unit

__all__ = ["EdgeSnapshot", "Scheduler", "SchedulerConfig", "SchedulerSnapshot", "UnitSnapshot"]


WorkerState = Literal["starting", "up", "down"]


@dataclass(frozen=True)
class UnitSnapshot:
    """One unit: its life, its requests in counts, and the bytes of products that it has (held or kept for recovery).

    ``stalled`` are the stages that have work here and no credit for what they would make of it. ``given_up``: it died
    too often, and has finished no work since.
    """

    unit: Unit
    state: UnitStatus
    reason: str | None
    restarts: int
    waiting: int
    dispatched: int
    held: int
    reserved: int
    load: int
    kept_bytes: int
    stalled: tuple[Stage, ...] = ()
    given_up: bool = False


@dataclass(frozen=True)
class EdgeSnapshot:
    """One edge: ``used`` credits and their bytes count payloads on the way and those that wait at the receiver."""

    edge: Edge
    up: bool
    generation: int
    used: int
    window: int
    nbytes: int


@dataclass(frozen=True)
class SchedulerSnapshot:
    """Everything that metrics and ``/health`` show. Totals count since the start."""

    units: tuple[UnitSnapshot, ...]
    edges: tuple[EdgeSnapshot, ...]
    queued: int
    states: dict[RequestState, int]
    zombies: int
    kept_bytes: int
    done: int
    failed: int
    cancelled: int


class Scheduler:
    """Owns every request's state, every edge's credits and every unit's liveness.

    Args:
        topology: the units and edges.
        config: limits and time-outs.
        on_state: told of every change of a request's state, ends included, at the moment it is decided.
    """

    def __init__(self, topology: Topology, config: SchedulerConfig, on_state: OnState | None = None) -> None:
        self._ledger = Ledger(topology, config, on_state)
        recovery = Recovery(self._ledger)
        self._previews = Previews(self._ledger)
        self._liveness = Liveness(self._ledger, recovery, self._previews)
        self._flow = Flow(self._ledger, recovery)
        self._handlers = self._event_table(self._flow, recovery, self._liveness, self._previews)

    @staticmethod
    def _event_table(
        flow: Flow, recovery: Recovery, liveness: Liveness, previews: Previews
    ) -> dict[type, Callable[[Any], None]]:
        return {
            Submit: flow.submit,
            Started: flow.started,
            StepDone: flow.step_done,
            PreviewTaken: previews.taken,
            Previewed: previews.made,
            Launched: flow.launched,
            Encoded: flow.encoded,
            Sent: lambda event: None,  # the source keeps its payload until the next stage is complete
            Received: flow.received,
            Denoised: flow.denoised,
            Decoded: flow.decoded,
            CancelRequest: recovery.cancel,
            StageFailed: recovery.stage_failed,
            TransferRejected: recovery.rejected,
            Dropped: recovery.dropped,
            WorkerUp: liveness.worker_up,
            Heartbeat: liveness.heartbeat,
            WorkerDown: liveness.worker_down,
            StartFailed: liveness.start_failed,
            Restart: liveness.restart,
            EdgeUp: liveness.edge_up,
            EdgeFailed: liveness.edge_failed,
            Tick: lambda event: liveness.tick(),
        }

    def start(self, now: float) -> list[Action]:
        """Spawns every rank. Call once."""
        self._ledger.now = now
        self._liveness.start()
        return self._take_actions()

    def on_event(self, event: SchedulerEvent, now: float) -> list[Action]:
        """What follows from ``event``, in the order in which it must be done. ``now``: monotonic seconds."""
        self._ledger.now = now
        self._handlers[type(event)](event)
        self._flow.pump()
        self._previews.pump()
        return self._take_actions()

    def _take_actions(self) -> list[Action]:
        actions, self._ledger.out = self._ledger.out, []
        return actions

    @property
    def ready(self) -> bool:
        """Every unit is up and every edge is open."""
        return self._liveness.ready

    def worker_state(self, rank: int) -> WorkerState:
        """That of the rank's unit; a unit that waits for its restart or was given up is down."""
        status = self._liveness.status_of(rank)
        return "down" if status == "failed" else status

    def state_of(self, request_id: str) -> RequestState | None:
        """``None`` for a request that is unknown, rejected, or ended with everything given back."""
        record = self._ledger.records.get(request_id)
        return None if record is None else record.state

    def snapshot(self) -> SchedulerSnapshot:
        ledger = self._ledger
        units = tuple(_unit_snapshot(unit, bool(ledger.queue)) for unit in ledger.units.values())
        states = Counter(record.state for record in ledger.records.values())
        return SchedulerSnapshot(
            units=units,
            edges=tuple(_edge_snapshot(edge) for edge in ledger.edges.values()),
            queued=states[RequestState.QUEUED],
            states={state: count for state, count in states.items() if not state.ended},
            zombies=sum(count for state, count in states.items() if state.ended),
            kept_bytes=sum(unit.kept_bytes for unit in units),
            done=ledger.finished["done"],
            failed=ledger.finished["failed"],
            cancelled=ledger.finished["cancelled"],
        )

    def __repr__(self) -> str:
        ledger = self._ledger
        up = sum(unit.status == "up" for unit in ledger.units.values())
        states = Counter(record.state for record in ledger.records.values())
        requests = ", ".join(f"{states[state]} {state}" for state in RequestState if states[state])
        ended = ", ".join(f"{ledger.finished[outcome]} {outcome}" for outcome in ("done", "failed", "cancelled"))
        fleet = f"{up}/{len(ledger.units)} units, {ledger.up_edges}/{len(ledger.edges)} edges up"
        return f"<Scheduler {fleet}; {requests or 'no requests'}; ended: {ended}>"


def _unit_snapshot(unit: UnitState, queued: bool) -> UnitSnapshot:
    stations = unit.stations.values()
    return UnitSnapshot(
        unit=unit.unit,
        state=unit.status,
        reason=unit.reason,
        restarts=unit.restarted,
        waiting=sum(len(station.waiting) for station in stations),
        dispatched=sum(len(station.dispatched) for station in stations),
        held=sum(len(station.held) for station in stations),
        reserved=sum(station.reserved for station in stations),
        load=unit.load,
        kept_bytes=sum(station.kept for station in stations),
        stalled=tuple(station.stage for station in stations if _is_stalled(station, queued)),
        given_up=unit.given_up > 0,
    )


def _is_stalled(station: Station, queued: bool) -> bool:
    has_work = queued if station.stage == "encode" else bool(station.waiting)
    return station.unit.status == "up" and has_work and not station.may_produce


def _edge_snapshot(edge: EdgeState) -> EdgeSnapshot:
    ends = Edge(edge.src.leader, edge.dst.leader)
    return EdgeSnapshot(ends, edge.usable, edge.generation, edge.used, edge.window, edge.nbytes)
