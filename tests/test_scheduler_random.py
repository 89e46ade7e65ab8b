"""The scheduler under random fleets, orders of events and faults: what must hold after every single event."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fleet_simulation import SimulatedFleet, topology
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_worker import Faults, request

from ditrelay.runtime.messages import (
    CancelRequest,
    EdgeFailed,
    EdgeUp,
    Heartbeat,
    Received,
    SchedulerEvent,
    Submit,
    Tick,
    TransferRejected,
    WorkerDown,
    WorkerUp,
)
from ditrelay.runtime.preview_messages import Previewed, PreviewTaken
from ditrelay.runtime.request import RequestState
from ditrelay.runtime.scheduler import Scheduler, SchedulerConfig
from ditrelay.runtime.scheduling.ledger import Ledger
from ditrelay.runtime.scheduling.state import Record, Station, UnitState
from ditrelay.runtime.topology import Topology

CONFIG = dict(
    max_queue=5,
    max_pending_bytes=10,
    transfer_timeout=20.0,
    stage_timeout=40.0,
    hang_timeout=15.0,
    startup_timeout=60.0,
)


def records_at(ledger: Ledger) -> list[tuple[str, Record]]:
    """Every live record once for each place where it is."""
    places = [("queue", record) for record in ledger.queue] + [("aside", record) for record in ledger.aside]
    places += [("way", record) for record in ledger.records.values() if record.on_the_way]
    for unit in ledger.units.values():
        for station in unit.stations.values():
            places += [("held", record) for record in station.held]
            places += [("waiting", record) for record in station.waiting]
            places += [("dispatched", record) for record in station.dispatched]
    return [(name, record) for name, record in places if not record.state.ended]


PLACES = {
    RequestState.QUEUED: {"queue", "aside"},
    RequestState.ENCODING: {"dispatched"},
    RequestState.ENCODED: {"held", "aside"},
    RequestState.TO_DIT: {"way"},
    RequestState.AT_DIT: {"waiting", "dispatched"},
    RequestState.DENOISING: {"dispatched"},
    RequestState.DENOISED: {"held", "aside"},
    RequestState.TO_DECODER: {"way"},
    RequestState.AT_DECODER: {"waiting", "dispatched"},
    RequestState.DECODING: {"dispatched"},
}


def check_books(scheduler: Scheduler) -> None:
    """Every count equals what it counts, every limit holds, every request is in one place."""
    ledger = scheduler._ledger
    live = [record for record in ledger.records.values() if not record.state.ended]
    places = records_at(ledger)
    assert sorted(r.number for _, r in places) == [r.number for r in live], "each request is in one place"
    for place, record in places:
        assert place in PLACES[record.state], f"{record.id} is {record.state} and {place}"
    for record in ledger.records.values():
        assert record.promise is None or record.state.ended or record.state is RequestState.ENCODING
        assert bool(record.dropping) == record.state.ended
        assert all(unit.status == "up" for unit in record.holders())
        assert set(record.holders()) >= record.dropping or record.state.ended
    for unit in ledger.units.values():
        assert unit.load == sum(unit in (at_unit(r), promised_unit(r)) for r in ledger.records.values())
        for station in unit.stations.values():
            check_station(ledger, station)
    assert set(ledger.transfers._since) == {r for r in ledger.records.values() if r.on_the_way}
    assert set(ledger.drops._since) == {r for r in ledger.records.values() if r.state.ended}
    for unit in ledger.units.values():
        assert list(unit.alone) == [r for r in unit.alone if r.alone is not None and r.alone.unit is unit]
        assert (unit in ledger.closed) == bool(unit.alone)
    check_previews(scheduler)
    check_nothing_is_missed(scheduler)


def check_previews(scheduler: Scheduler) -> None:
    """At most one of a request is made at a time, and none waits while a decoder idles."""
    ledger, previews = scheduler._ledger, scheduler._previews
    made = [unit.preview for unit in ledger.units.values() if unit.preview is not None]
    assert len(set(made)) == len(made) and set(made) == previews._made
    wait = any(r.previews and r.state is RequestState.DENOISING and r not in made for r in previews._waiting)
    assert not (wait and previews._idle_decoders())


def at_unit(record: Record) -> UnitState | None:
    return None if record.at is None else record.at.unit


def promised_unit(record: Record) -> UnitState | None:
    return None if record.promise is None else record.promise.target.unit


def check_station(ledger: Ledger, station: Station) -> None:
    records = ledger.records.values()
    assert len(station.dispatched) <= 2
    assert (station in ledger.stages._since) == bool(station.dispatched)
    assert station.reserved == sum(r.reserved is station for r in records)
    assert station.kept == sum(r.nbytes for r in records if r.source is station)
    assert station.free == sum(edge.window - edge.used for edge in station.out.values() if edge.usable)
    for edge in station.out.values():
        users = [record.nbytes for record in records if record.edge is edge]
        promised = [r.promise.nbytes for r in records if r.promise is not None and r.promise.edge is edge]
        assert edge.promised == len(promised)
        assert edge.used == len(users) + len(promised) <= edge.full_window
        assert 1 <= edge.window <= edge.full_window
        assert edge.nbytes == sum(users) + sum(promised) <= edge.max_bytes


def check_nothing_is_missed(scheduler: Scheduler) -> None:
    """Whatever could be dispatched or sent has been."""
    ledger, flow = scheduler._ledger, scheduler._flow
    assert not ledger.queue or flow._free_encoder() is None
    for unit in ledger.units.values():
        for station in unit.stations.values():
            may_dispatch = len(station.dispatched) < 2 and station.may_produce and station.stage != "encode"
            assert not (station.waiting and may_dispatch), f"{station.stage} of unit {unit.leader} idles"
            for record in station.held[:1]:
                edge = flow._way_home(record, station) or flow._free_edge(station, record.nbytes)
                assert edge is None or not edge.fits(record.nbytes), f"{record.id} could be sent"


def check_all_is_given_back(scheduler: Scheduler, fleet: SimulatedFleet) -> None:
    snapshot, ledger = scheduler.snapshot(), scheduler._ledger
    assert not ledger.records and not ledger.queue and not ledger.aside and not ledger.closed
    assert snapshot.kept_bytes == snapshot.zombies == 0
    assert all(unit.load == unit.reserved == unit.dispatched == unit.held == 0 for unit in snapshot.units)
    assert all(edge.used == edge.nbytes == 0 for edge in snapshot.edges)
    assert all(unit.bound == 0 for unit in ledger.units.values())
    left = {rank: list(worker.residents) for rank, worker in fleet.workers.items() if worker.residents}
    assert not left, f"workers still have {left}"
    assert not scheduler._previews._waiting and not scheduler._previews._made


@dataclass
class Run:
    """One random run of one fleet."""

    fleet: SimulatedFleet
    scheduler: Scheduler
    now: float = 0.0
    submitted: int = 0
    history: list[SchedulerEvent] = field(default_factory=list)

    def feed(self, event: SchedulerEvent) -> None:
        self.history.append(event)
        self.fleet.perform(self.scheduler.on_event(event, self.now))
        check_books(self.scheduler)

    def submit(self) -> None:
        self.feed(Submit(request(f"r{self.submitted}")))
        self.submitted += 1

    def step(self) -> bool:
        """One random thing that can happen without a client or a fault. False: nothing can."""
        fleet, choose = self.fleet, self.fleet.random
        ready, moves = fleet.ready_events(), fleet.moves()
        self.now += choose.random() * 0.1
        if ready and (not moves or choose.random() < 0.5):
            self.feed(fleet.events[choose.choice(ready)].popleft())
        elif moves:
            fleet.make(choose.choice(moves))
        return bool(ready or moves)

    def trouble(self, crashes: float, cancels: float) -> None:
        fleet, choose = self.fleet, self.fleet.random
        if choose.random() < crashes and fleet.workers:
            rank = choose.choice(sorted(fleet.workers))
            fleet.crash(rank, choose.randint(0, len(fleet.events[rank])))
        if choose.random() < cancels and self.submitted:
            reason = choose.choice([None, "not done in time"])
            self.feed(CancelRequest(f"r{choose.randrange(self.submitted)}", reason))
        if choose.random() < 0.05:
            self.feed(Tick())
        if choose.random() < 0.1:
            rank = choose.choice(sorted(self.fleet.events))
            self.feed(Heartbeat(rank, self.now, device_total=100, device_allocated=choose.choice([70, 85, 95])))
        event = choose.choice(self.history)
        if self._is_stale(event):
            before = self.scheduler.snapshot()
            assert self.scheduler.on_event(event, self.now) == []
            assert self.scheduler.snapshot() == before
            check_books(self.scheduler)

    def _is_stale(self, event: SchedulerEvent) -> bool:
        """Of an older generation of its edge, or of a request that is gone."""
        if isinstance(event, EdgeUp | EdgeFailed):
            return event.generation != self.scheduler._ledger.edges[event.src, event.dst].generation
        if isinstance(event, Submit | Tick | WorkerUp | WorkerDown | Heartbeat | Previewed | PreviewTaken):
            return False
        return isinstance(event, Received | TransferRejected) or event.request_id not in self.scheduler._ledger.records

    def settle(self) -> None:
        """Healthy from now on: every request must end, whatever hangs now."""
        self.fleet.heal()
        for _ in range(200):
            while self.step():
                pass
            if not self.scheduler._ledger.records:
                return
            self.now += 7.0
            self.feed(Tick())
        raise AssertionError(f"requests never ended: {self.scheduler!r}")

    def check_ends(self) -> None:
        ends = Counter({request_id: len(finishes) for request_id, finishes in self.fleet.finished.items()})
        ends.update(self.fleet.rejected)
        assert ends == {f"r{number}": 1 for number in range(self.submitted)}


SPLIT = st.lists(st.sampled_from([("n", 1), ("n", 2), ("n", 3)]), min_size=1, max_size=3).flatmap(
    lambda replicas: st.sampled_from(
        [
            [*replicas, ("ed", 1)],
            [*replicas, ("ed", 1), ("ed", 1)],
            [*replicas, ("e", 1), ("d", 1)],
            [*replicas, ("e", 1), ("e", 1), ("d", 1), ("d", 1)],
            [*replicas, ("e", 1), ("ed", 1)],
        ]
    )
)
OTHER = st.sampled_from(
    [
        [("end", 1)],
        [("end", 2), ("end", 1)],
        [("en", 1), ("en", 2), ("d", 1)],
        [("e", 1), ("nd", 1), ("nd", 2)],
    ]
)
TOPOLOGIES = st.one_of(SPLIT, OTHER).map(lambda units: topology(*units))
CHANCE = st.sampled_from([0.0, 0.0, 0.02, 0.1])
FAULTS = st.builds(Faults, CHANCE, CHANCE, CHANCE, CHANCE, CHANCE, CHANCE)
CONFIGS = st.builds(
    lambda window, lock_step, attempts, restarts: SchedulerConfig(
        max_pending_transfers=window, lock_step=lock_step, max_attempts=attempts, max_restarts=restarts, **CONFIG
    ),
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 4),
    st.sampled_from([0, 2, 100]),
)
SEEDS = st.integers(0, 2**32)
LAUNCHED = st.sampled_from([0.0, 0.3, 1.0])  # how likely it is that an encode is announced before it is done
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def start(shape: Topology, config: SchedulerConfig, seed: int, launched: float) -> Run:
    fleet = SimulatedFleet(shape, config, seed, payload_bytes=12 if seed % 4 == 0 else 6)
    fleet.world.launched = launched
    fleet.world.previews = fleet.random.choice([0.0, 0.5, 1.0])
    run = Run(fleet, Scheduler(shape, config))
    fleet.perform(run.scheduler.start(0.0))
    return run


@settings(RELAXED, max_examples=150)
@given(TOPOLOGIES, CONFIGS, SEEDS, LAUNCHED)
def test_a_healthy_fleet_finishes_every_request_in_every_order(
    shape: Topology, config: SchedulerConfig, seed: int, launched: float
):
    run = start(shape, config, seed, launched)
    run.fleet.world.payload_bytes = 6
    for _ in range(12):
        run.submit()
        for _ in range(run.fleet.random.randint(0, 60)):
            run.step()
    run.settle()
    run.check_ends()
    assert {finish.outcome for ends in run.fleet.finished.values() for finish in ends} <= {"done"}
    assert run.scheduler.ready
    check_all_is_given_back(run.scheduler, run.fleet)


@settings(RELAXED, max_examples=400)
@given(TOPOLOGIES, CONFIGS, SEEDS, LAUNCHED, FAULTS, CHANCE, CHANCE)
def test_every_request_ends_once_and_everything_comes_back_whatever_fails(
    shape: Topology,
    config: SchedulerConfig,
    seed: int,
    launched: float,
    faults: Faults,
    crashes: float,
    cancels: float,
):
    run = start(shape, config, seed, launched)
    run.fleet.world.faults = faults
    for _ in range(12):
        run.submit()
        for _ in range(run.fleet.random.randint(0, 60)):
            run.step()
            run.trouble(crashes / 4, cancels)
    run.settle()
    run.check_ends()
    check_all_is_given_back(run.scheduler, run.fleet)
