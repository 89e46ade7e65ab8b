"""Events a second of the scheduler alone, in one process, over complete request lifecycles.

A discrete-event simulation of a fleet of one-rank units drives the real scheduler: every action is answered by the
events that a worker would send, at the simulated time at which it would send them. The run is recorded, then replayed
into a fresh scheduler under the clock, so that the figure has no part of the simulation in it; the run with the
simulation is timed too. Denoising steps are not reported, as they are not counted.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from common import ROOT, origin, parser, provenance, show, write_json, write_section

from ditrelay.runtime.messages import (
    Action,
    Decode,
    Decoded,
    Denoise,
    Denoised,
    EdgeUp,
    Encode,
    Encoded,
    Expect,
    Finish,
    OpenEdge,
    Received,
    Release,
    SchedulerEvent,
    Send,
    Sent,
    Spawn,
    Stage,
    Started,
    Submit,
    Tick,
    WorkerUp,
)
from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.scheduler import Scheduler, SchedulerConfig
from ditrelay.runtime.topology import DIT, NON_DIT, Topology, Unit

# Seconds. One non-DiT rank feeds seven replicas: 7 * (encode + decode) is just under one denoise.
SECONDS: dict[Stage, float] = {"encode": 0.03, "denoise": 1.0, "decode": 0.1}
TRANSFER_SECONDS = 0.001
QUEUE = 20_000
HEADER = PayloadHeader(batch_id="", request_ids=(), fields=(), tensors=(), nbytes=4 << 20)

Timed = tuple[float, SchedulerEvent]


def fleet_topology(replicas: int, non_dit: int) -> Topology:
    units = [Unit(rank, (rank,), DIT) for rank in range(replicas)]
    units += [Unit(rank, (rank,), NON_DIT) for rank in range(replicas, replicas + non_dit)]
    return Topology(tuple(units), ("localhost",) * len(units))


@dataclass
class Simulation:
    """A healthy fleet in simulated time. ``history`` is every event with its time, in the order of delivery."""

    now: float = 0.0
    history: list[Timed] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    _due: list[tuple[float, int, SchedulerEvent]] = field(default_factory=list)
    _number: Iterator[int] = field(default_factory=itertools.count)
    _free_at: defaultdict[tuple[int, Stage], float] = field(default_factory=lambda: defaultdict(float))

    def run(self, on_event: Callable[[SchedulerEvent, float], list[Action]]) -> None:
        """Until nothing is due any more."""
        while self._due:
            self.now, _, event = heapq.heappop(self._due)
            self.history.append((self.now, event))
            self.answer(on_event(event, self.now))

    def at(self, when: float, event: SchedulerEvent) -> None:
        heapq.heappush(self._due, (when, next(self._number), event))

    def answer(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Encode(rank=rank, request=request):
                    self._compute(rank, request.request_id, "encode")
                case Denoise(rank=rank, request_id=request_id):
                    self._compute(rank, request_id, "denoise")
                case Decode(rank=rank, request_id=request_id):
                    self._compute(rank, request_id, "decode")
                case Send(rank=rank, request_id=request_id, dst=dst, generation=generation, seq=seq):
                    self._after_transfer(Sent(rank, request_id, dst, generation, seq, 0.0, 0.0))
                case Expect(rank=rank, request=request, src=src, generation=generation, seq=seq):
                    self._after_transfer(Received(rank, request.request_id, src, generation, seq, 0.0, 0.0))
                case _:
                    self._answer_other(action)

    def _answer_other(self, action: Action) -> None:
        match action:
            case Spawn(rank=rank):
                self.at(self.now, WorkerUp(rank, 1, 0.0))
            case OpenEdge(rank=rank, src=src, dst=dst, generation=generation):
                self.at(self.now, EdgeUp(rank, src, dst, generation))
            case Finish(request_id=request_id, outcome="done"):
                self.done.append(request_id)
            case Release():
                pass
            case _:
                raise AssertionError(f"a healthy fleet got {action}")

    def _after_transfer(self, event: SchedulerEvent) -> None:
        self.at(self.now + TRANSFER_SECONDS, event)

    def _compute(self, rank: int, request_id: str, stage: Stage) -> None:
        began = max(self.now, self._free_at[rank, stage])
        self._free_at[rank, stage] = ended = began + SECONDS[stage]
        self.at(began, Started(rank, request_id, stage, began))
        if stage == "encode":
            self.at(ended, Encoded(rank, request_id, HEADER, began, ended))
        elif stage == "denoise":
            self.at(ended, Denoised(rank, request_id, HEADER, began, ended))
        else:
            self.at(ended, Decoded(rank, request_id, b"", "image/png", 1, 1, 1, began, ended))


def submissions(count: int) -> list[Submit]:
    params = SamplingParams(prompt="a red apple")
    return [Submit(Request(request_id=f"request-{number}", params=params)) for number in range(count)]


def start(topology: Topology, simulation: Simulation) -> Scheduler:
    """A scheduler whose fleet is up."""
    scheduler = Scheduler(topology, SchedulerConfig(max_queue=QUEUE))
    simulation.answer(scheduler.start(0.0))
    simulation.run(scheduler.on_event)
    assert scheduler.ready
    return scheduler


@dataclass(frozen=True)
class Figures:
    """``seconds`` and ``events_per_second`` are those of the scheduler alone."""

    ranks: int
    requests: int
    all_done: bool
    events: int
    seconds: float
    events_per_second: float
    with_fleet_seconds: float
    with_fleet_events_per_second: float
    replicas_busy: float
    tick_seconds_10000_live: float
    kinds: dict[str, int]

    def show(self) -> None:
        rows = [
            ("scheduler alone", f"{self.seconds:.2f}", f"{self.events_per_second:,.0f}"),
            ("with the simulated fleet", f"{self.with_fleet_seconds:.2f}", f"{self.with_fleet_events_per_second:,.0f}"),
        ]
        title = f"{self.requests} requests done on {self.ranks} ranks, {self.events} events"
        show(title, ("", "seconds", "events/s"), rows)
        show("events by kind", ("event", "count"), [(kind, f"{count}") for kind, count in self.kinds.items()])
        print(f"replicas busy in simulated time: {self.replicas_busy:.1%}")
        print(f"one Tick with 10,000 live requests: {self.tick_seconds_10000_live * 1e6:.0f} us")


def measure(topology: Topology, requests: int) -> Figures:
    """Lifecycles of ``requests`` requests: simulated, then replayed."""
    simulation = Simulation()
    scheduler = start(topology, simulation)
    simulation.history.clear()
    for submit in submissions(requests):
        simulation.at(simulation.now, submit)
    began = time.perf_counter()
    simulation.run(scheduler.on_event)
    simulated = time.perf_counter() - began
    assert len(simulation.done) == len(set(simulation.done)) == requests, "every request ends done, once"
    assert not scheduler.snapshot().states and not scheduler.snapshot().kept_bytes
    seconds = min(replay(topology, simulation.history, requests) for _ in range(3))
    events = len(simulation.history)
    return Figures(
        ranks=topology.world_size,
        requests=requests,
        all_done=True,
        events=events,
        seconds=seconds,
        events_per_second=events / seconds,
        with_fleet_seconds=simulated,
        with_fleet_events_per_second=events / simulated,
        replicas_busy=requests * SECONDS["denoise"] / simulation.now / len(topology.replicas),
        tick_seconds_10000_live=tick_seconds(topology, 10_000),
        kinds=dict(Counter(type(event).__name__ for _, event in simulation.history)),
    )


def replay(topology: Topology, history: list[Timed], requests: int) -> float:
    """Seconds that a fresh scheduler takes for the recorded events."""
    on_event = (scheduler := start(topology, Simulation())).on_event
    gc.collect()
    began = time.perf_counter()
    for now, event in history:
        on_event(event, now)
    seconds = time.perf_counter() - began
    assert scheduler.snapshot().done == requests, "the replay went another way"
    return seconds


def tick_seconds(topology: Topology, live: int) -> float:
    """The time of one ``Tick`` while ``live`` requests are in the books."""
    scheduler = start(topology, Simulation())
    for submit in submissions(live):
        scheduler.on_event(submit, 0.0)
    began = time.perf_counter()
    for _ in range(100):
        scheduler.on_event(Tick(), 1.0)
    return (time.perf_counter() - began) / 100


def sentence(figures: Figures) -> str:
    source = provenance()
    return (
        f"{origin(source)}: "
        f"{figures.events_per_second:,.0f} events a second in one Python process, {figures.ranks} ranks, "
        f"{figures.requests:,} complete request lifecycles, step events not counted. "
        f"One tick with 10,000 live requests takes {figures.tick_seconds_10000_live * 1e6:.0f} us."
    )


def main(arguments: argparse.Namespace) -> None:
    figures = measure(fleet_topology(arguments.replicas, arguments.non_dit), arguments.requests)
    figures.show()
    write_json(arguments.json, asdict(figures))
    if arguments.docs:
        write_section(ROOT / "docs" / "performance.md", "scheduler", sentence(figures))


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--replicas", type=int, default=224, help="DiT replicas of one rank")
    options.add_argument("--non-dit", type=int, default=32, help="ranks that encode and decode")
    options.add_argument("--requests", type=int, default=10_000, help=f"complete lifecycles, at most {QUEUE}")
    options.add_argument("--docs", action="store_true", help="write the figures into docs/performance.md")
    main(options.parse_args())
