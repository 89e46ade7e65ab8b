"""Drives a scheduler by hand, one event at a time, with the answers of workers that do as they are told."""

from __future__ import annotations

from fleet_simulation import topology
from simulated_worker import header, request

from ditrelay.runtime.messages import (
    Action,
    CancelRequest,
    Decoded,
    Denoised,
    Dropped,
    EdgeFailed,
    EdgeUp,
    Encoded,
    Finish,
    Launched,
    OpenEdge,
    Received,
    SchedulerEvent,
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
from ditrelay.runtime.request import RequestState
from ditrelay.runtime.scheduler import Scheduler, SchedulerConfig, SchedulerSnapshot
from ditrelay.runtime.scheduling.state import Record

# Fleets: per unit its roles (n: denoise, e: encode, d: decode) and its ranks.
ONE_AND_ONE = (("n", 1), ("ed", 1))
TWO_AND_ONE = (("n", 1), ("n", 1), ("ed", 1))
SPLIT = (("n", 1), ("e", 1), ("d", 1))


class Desk:
    """A scheduler whose units and edges are up. ``actions`` are those of the last event.

    Requests are named by the test (``"a"``); where each of them is, the scheduler's own record tells.
    """

    def __init__(self, *units: tuple[str, int], up: bool = True, **config: object) -> None:
        self.now = 0.0
        self.topology = topology(*units)
        self.scheduler = Scheduler(self.topology, SchedulerConfig(**config))  # type: ignore[arg-type]
        self.log: list[Action] = list(self.scheduler.start(self.now))
        self.actions = list(self.log)
        if up:
            self.bring_up()

    def do(self, event: SchedulerEvent) -> list[Action]:
        self.actions = self.scheduler.on_event(event, self.now)
        self.log += self.actions
        return self.actions

    def bring_up(self, *ranks: int) -> None:
        """Every worker (or these) comes up, and every edge that is then opened."""
        for rank in ranks or range(self.topology.world_size):
            opened = [action for action in self.do(WorkerUp(rank, 1, self.now)) if isinstance(action, OpenEdge)]
            self.edges_up(opened)

    def edges_up(self, opened: list[OpenEdge]) -> None:
        for end in opened:
            self.do(EdgeUp(end.rank, end.src, end.dst, end.generation))

    # ------------------------------------------------------------ requests

    def record(self, name: str) -> Record:
        return self.scheduler._ledger.records[name]

    def rank_of(self, name: str) -> int:
        """Where its stage is or will be computed."""
        station = self.record(name).at
        assert station is not None, f"{name} is nowhere"
        return station.leader

    def state(self, name: str) -> RequestState | None:
        return self.scheduler.state_of(name)

    def submit(self, *names: str, **params: object) -> None:
        for name in names:
            self.do(Submit(request(name, **params)))

    def cancel(self, name: str, reason: str | None = None) -> None:
        self.do(CancelRequest(name, reason))

    def started(self, name: str, stage: Stage) -> None:
        self.do(Started(self.rank_of(name), name, stage, self.now))

    def stepped(self, name: str, step: int, *, after: float = 0.0) -> None:
        """Its denoise reports a step, ``after`` seconds."""
        self.now += after
        self.do(StepDone(self.rank_of(name), name, step, 8, self.now))

    def launched(self, name: str, nbytes: int = 1, rank: int | None = None) -> None:
        self.do(Launched(self.rank_of(name) if rank is None else rank, name, header(name, nbytes)))

    def encoded(self, name: str, nbytes: int = 1) -> None:
        self.do(Encoded(self.rank_of(name), name, header(name, nbytes), 0.0, self.now))

    def denoised(self, name: str, nbytes: int = 1) -> None:
        self.do(Denoised(self.rank_of(name), name, header(name, nbytes), 0.0, self.now))

    def decoded(self, name: str) -> None:
        self.do(Decoded(self.rank_of(name), name, b"", "image/png", 8, 8, 1, 0.0, self.now))

    def received_event(self, name: str) -> Received:
        record = self.record(name)
        edge, seq = (record.edge, record.seq) if record.promise is None else (record.promise.edge, record.promise.seq)
        assert edge is not None
        ends = edge.dst.leader, name, edge.src.leader
        return Received(*ends, edge.generation, seq, 0.0, self.now)

    def received(self, name: str) -> None:
        self.do(self.received_event(name))

    def rejected(self, name: str) -> None:
        event = self.received_event(name)
        self.do(TransferRejected(event.rank, name, event.src, event.generation, event.seq, "checksum differs"))

    def dropped(self, name: str, *ranks: int) -> None:
        for rank in ranks:
            self.do(Dropped(rank, name))

    def stage_failed(self, name: str, stage: Stage, param: str | None = None) -> None:
        self.do(StageFailed(self.rank_of(name), name, stage, "out of memory", self.now, param))

    def bring(self, name: str, state: RequestState | None, **params: object) -> None:
        """Submits ``name`` if it is not there, and leads it to ``state`` (``None``: to its end)."""
        if self.state(name) is None:
            self.submit(name, **params)
        while (now := self.state(name)) is not state:
            assert now is not None, f"{name} never was {state}"
            self.bring_on(name)

    def bring_on(self, name: str) -> None:
        """The next thing that happens to ``name``."""
        stages: dict[RequestState, object] = {
            RequestState.ENCODING: lambda: self.encoded(name),
            RequestState.TO_DIT: lambda: self.received(name),
            RequestState.AT_DIT: lambda: self.started(name, "denoise"),
            RequestState.DENOISING: lambda: self.denoised(name),
            RequestState.TO_DECODER: lambda: self.received(name),
            RequestState.AT_DECODER: lambda: self.started(name, "decode"),
            RequestState.DECODING: lambda: self.decoded(name),
        }
        now = self.state(name)
        assert now is not None, f"{name} has ended"
        stages[now]()  # type: ignore[operator]

    # ------------------------------------------------------------ the fleet

    def down(self, rank: int) -> None:
        self.do(WorkerDown(rank, "exit code -9"))

    def edge_failed(self, src: int, dst: int, rank: int | None = None) -> None:
        generation = self.scheduler._ledger.edges[src, dst].generation
        self.do(EdgeFailed(src if rank is None else rank, src, dst, generation, "connection reset"))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.do(Tick())

    # ------------------------------------------------------------ what came of it

    def of(self, kind: type, actions: list[Action] | None = None) -> list[Action]:
        return [action for action in (self.actions if actions is None else actions) if isinstance(action, kind)]

    def ends(self, name: str) -> list[tuple[str, str | None]]:
        """Every end of ``name``: there must never be two."""
        return [(end.outcome, end.reason) for end in self.log if isinstance(end, Finish) and end.request_id == name]

    def reason(self, name: str) -> str:
        """Why ``name`` failed."""
        ((outcome, reason),) = self.ends(name)
        assert outcome == "failed" and reason is not None
        return reason

    def snapshot(self) -> SchedulerSnapshot:
        return self.scheduler.snapshot()

    def used(self, src: int, dst: int) -> int:
        return self.scheduler._ledger.edges[src, dst].used

    def is_empty(self) -> bool:
        """No request, no credit, no reservation, no kept byte is left."""
        snapshot = self.snapshot()
        units = all(unit.load == unit.reserved == unit.kept_bytes == 0 for unit in snapshot.units)
        return units and all(edge.used == edge.nbytes == 0 for edge in snapshot.edges) and not snapshot.zombies
