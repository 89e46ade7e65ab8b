"""A fleet of simulated workers that answer the scheduler's actions as real ones do, in any order that real ones could.

The fleet has one FIFO to and one from every rank; what is delivered or computed next is the caller's choice (``moves``,
``make``), so that tests explore interleavings and the benchmark takes them in order. Workers assert what they rely on:
transfers are numbered without a gap and in the same order at both ends, buffers never pass an edge's window and byte
budget, stages get what they need, nothing is left over.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ditrelay.runtime.messages import (
    Action,
    CloseEdge,
    Command,
    Decode,
    Decoded,
    Denoise,
    Denoised,
    Drop,
    Dropped,
    EdgeFailed,
    EdgeUp,
    Encode,
    Encoded,
    Expect,
    Finish,
    Kill,
    OpenEdge,
    Received,
    Reject,
    Release,
    SchedulerEvent,
    Send,
    Sent,
    Spawn,
    Stage,
    StageFailed,
    Started,
    StepDone,
    TransferRejected,
    WorkerDown,
    WorkerUp,
)
from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.scheduler import SchedulerConfig
from ditrelay.runtime.topology import Role, Topology, Unit

Move = tuple[Callable[..., None], tuple[object, ...]]


def request(request_id: str) -> Request:
    return Request(request_id=request_id, params=SamplingParams(prompt="a red apple"))


def header(request_id: str, nbytes: int) -> PayloadHeader:
    return PayloadHeader(batch_id=request_id, request_ids=(request_id,), fields=(), tensors=(), nbytes=nbytes)


def topology(*units: tuple[str, int]) -> Topology:
    """From roles and sizes: ``("e", 1), ("n", 2), ("d", 1)`` is an encoder, a denoise replica of 2 and a decoder."""
    roles: dict[str, Role] = {"e": "encode", "n": "denoise", "d": "decode"}
    made: list[Unit] = []
    first = 0
    for letters, size in units:
        made.append(Unit(first, tuple(range(first, first + size)), frozenset(roles[letter] for letter in letters)))
        first += size
    return Topology(tuple(made), ("localhost",) * first)


@dataclass
class Faults:
    """Chances per opportunity; all zero is a healthy fleet."""

    stage_fails: float = 0.0
    stage_hangs: float = 0.0
    transfer_fails: float = 0.0
    transfer_hangs: float = 0.0
    transfer_rejected: float = 0.0
    open_fails: float = 0.0


@dataclass(eq=False)
class Resident:
    """What one worker has of one request."""

    request_id: str
    nbytes: int = 0
    wire: Wire | None = None  # the input's; None for a product or an input that is being computed on
    here: bool = False  # a payload (input or product) is complete
    stage: Stage | None = None  # queued or running
    transfers: int = 0
    dropped: bool = False

    @property
    def busy(self) -> bool:
        return self.transfers > 0 or self.stage is not None


@dataclass(eq=False)
class Wire:
    """One generation of one edge."""

    src: int
    dst: int
    generation: int
    sends: deque[tuple[int, Resident]] = field(default_factory=deque)
    expects: deque[tuple[int, Resident]] = field(default_factory=deque)
    posted: Counter[int] = field(default_factory=Counter)
    opened: set[int] = field(default_factory=set)
    broken: bool = False
    hung: bool = False


@dataclass(eq=False)
class Worker:
    """One process. Only leaders of units get commands."""

    rank: int
    up: bool = False
    residents: dict[str, Resident] = field(default_factory=dict)
    lanes: dict[Stage, deque[Resident]] = field(default_factory=dict)
    running: dict[Stage, Resident] = field(default_factory=dict)
    hung: set[Stage] = field(default_factory=set)


class SimulatedFleet:
    """All workers and what is on the way between them and the head.

    Attributes:
        finished: outcomes of every request; a request with two is the scheduler's fault.
    """

    def __init__(self, topology: Topology, config: SchedulerConfig, seed: int = 0, payload_bytes: int = 1) -> None:
        self.topology = topology
        self.config = config
        self.random = random.Random(seed)
        self.payload_bytes = payload_bytes
        self.faults = Faults()
        self.workers: dict[int, Worker] = {}
        self.commands: dict[int, deque[Command]] = {rank: deque() for rank in range(topology.world_size)}
        self.events: dict[int, deque[SchedulerEvent]] = {rank: deque() for rank in range(topology.world_size)}
        self.wires: dict[tuple[int, int, int], Wire] = {}
        self.finished: dict[str, list[Finish]] = {}
        self.rejected: list[str] = []
        self._order: dict[str, Counter[tuple[int, int, int]]] = {"Send": Counter(), "Expect": Counter()}

    # ------------------------------------------------------------ the head's side

    def perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(rank=rank):
                    assert rank not in self.workers, f"rank {rank} has a process"
                    self.workers[rank] = Worker(rank)
                case Kill(rank=rank):
                    self._vanish(rank)
                    self.events[rank].clear()
                case Finish():
                    self.finished.setdefault(action.request_id, []).append(action)
                case Reject():
                    self.rejected.append(action.request_id)
                case _:
                    self._check_order(action)
                    if action.rank in self.workers:
                        self.commands[action.rank].append(action)

    def _check_order(self, command: Command) -> None:
        if isinstance(command, Send | Expect):
            ends = (command.rank, command.dst) if isinstance(command, Send) else (command.src, command.rank)
            order = self._order[type(command).__name__]
            assert command.seq == order[*ends, command.generation], f"{command} is out of order"
            order[*ends, command.generation] += 1

    def crash(self, rank: int, last_words: int) -> None:
        """The process ends; at most ``last_words`` of its events still reach the head, then its ``WorkerDown``."""
        self._vanish(rank)
        words = self.events[rank]
        while len(words) > last_words:
            words.pop()
        words.append(WorkerDown(rank, "exit code -9"))

    def _vanish(self, rank: int) -> None:
        self.workers.pop(rank, None)
        self.commands[rank].clear()
        for wire in self.wires.values():
            wire.broken |= rank in (wire.src, wire.dst)

    # ------------------------------------------------------------ what may happen next

    def moves(self) -> list[Move]:
        """Every delivery and every bit of work that is possible now (delivery to the head is ``ready_events``)."""
        made: list[Move] = []
        for rank, worker in self.workers.items():
            if not worker.up:
                made.append((self._come_up, (worker,)))
            elif self.commands[rank]:
                made.append((self._obey_next, (worker,)))
            for stage, lane in worker.lanes.items():
                if stage not in worker.hung and (lane or stage in worker.running):
                    made.append((self._compute, (worker, stage)))
        made += [(self._transfer, (wire,)) for wire in self.wires.values() if self._can_transfer(wire)]
        return made

    def ready_events(self) -> list[int]:
        """Ranks from which an event may be delivered to the head."""
        return [rank for rank, words in self.events.items() if words]

    def make(self, move: Move) -> None:
        move[0](*move[1])

    def _chance(self, chance: float) -> bool:
        return chance > 0 and self.random.random() < chance

    def _say(self, worker: Worker, event: SchedulerEvent) -> None:
        self.events[worker.rank].append(event)

    def _come_up(self, worker: Worker) -> None:
        worker.up = True
        self._say(worker, WorkerUp(worker.rank, 1, 0.0))

    # ------------------------------------------------------------ commands

    def _obey_next(self, worker: Worker) -> None:
        command = self.commands[worker.rank].popleft()
        match command:
            case Encode(request=wanted):
                assert wanted.request_id not in worker.residents, f"{command}: something is left over"
                self._enqueue(worker, self._admit(worker, wanted.request_id), "encode")
            case Denoise(request_id=request_id):
                self._enqueue(worker, worker.residents[request_id], "denoise")
            case Decode(request_id=request_id):
                self._enqueue(worker, worker.residents[request_id], "decode")
            case Send():
                self._send(worker, command)
            case Expect():
                self._expect(worker, command)
            case Drop(request_id=request_id):
                self._drop(worker, request_id)
            case Release(request_id=request_id):
                resident = worker.residents.pop(request_id, None)
                assert resident is None or resident.stage is None, f"{command}: its stage is under way"
            case OpenEdge():
                self._open(worker, command)
            case CloseEdge():
                self._close(worker, command)

    def _admit(self, worker: Worker, request_id: str) -> Resident:
        worker.residents[request_id] = resident = Resident(request_id)
        return resident

    def _enqueue(self, worker: Worker, resident: Resident, stage: Stage) -> None:
        assert stage == "encode" or resident.here, f"{stage} of {resident.request_id} has no input"
        assert resident.stage is None, f"{stage} of {resident.request_id} is dispatched twice"
        resident.stage = stage
        worker.lanes.setdefault(stage, deque()).append(resident)

    def _drop(self, worker: Worker, request_id: str) -> None:
        resident = worker.residents.get(request_id)
        if resident is None:
            self._say(worker, Dropped(worker.rank, request_id))
            return
        resident.dropped = True
        if resident.stage is not None and resident in worker.lanes[resident.stage]:
            worker.lanes[resident.stage].remove(resident)
            resident.stage = None
        self._settle(worker, resident)

    def _settle(self, worker: Worker, resident: Resident) -> None:
        if resident.dropped and not resident.busy:
            if worker.residents.get(resident.request_id) is resident:
                del worker.residents[resident.request_id]
            self._say(worker, Dropped(worker.rank, resident.request_id))

    # ------------------------------------------------------------ computing

    def _compute(self, worker: Worker, stage: Stage) -> None:
        resident = worker.running.get(stage)
        if resident is None:
            worker.running[stage] = resident = worker.lanes[stage].popleft()
            resident.wire = None
            self._say(worker, Started(worker.rank, resident.request_id, stage, 0.0))
        elif resident.dropped:
            self._computed(worker, resident, None)
        elif self._chance(self.faults.stage_hangs):
            worker.hung.add(stage)
        elif self._chance(self.faults.stage_fails):
            self._remove(worker, resident)
            failed = StageFailed(worker.rank, resident.request_id, stage, "out of memory", 0.0)
            self._computed(worker, resident, failed)
        elif stage == "denoise" and self._chance(0.3):
            self._say(worker, StepDone(worker.rank, resident.request_id, 1, 2, 0.0))
        else:
            self._computed(worker, resident, self._product(worker, resident, stage))

    def _product(self, worker: Worker, resident: Resident, stage: Stage) -> SchedulerEvent:
        rank, request_id = worker.rank, resident.request_id
        if stage == "decode":
            self._remove(worker, resident)
            return Decoded(rank, request_id, b"", "image/png", 8, 8, 1, 0.0, 0.0)
        resident.here, resident.nbytes = True, self.random.randint(1, self.payload_bytes)
        made = Encoded if stage == "encode" else Denoised
        return made(rank, request_id, header(request_id, resident.nbytes), 0.0, 0.0)

    def _computed(self, worker: Worker, resident: Resident, event: SchedulerEvent | None) -> None:
        assert resident.stage is not None
        del worker.running[resident.stage]
        resident.stage = None
        if event is not None:
            self._say(worker, event)
        self._settle(worker, resident)

    def _remove(self, worker: Worker, resident: Resident) -> None:
        if worker.residents.get(resident.request_id) is resident:
            del worker.residents[resident.request_id]

    # ------------------------------------------------------------ edges and transfers

    def _wire(self, src: int, dst: int, generation: int) -> Wire:
        return self.wires.setdefault((src, dst, generation), Wire(src, dst, generation))

    def _open(self, worker: Worker, command: OpenEdge) -> None:
        wire = self._wire(command.src, command.dst, command.generation)
        wire.opened.add(worker.rank)
        if wire.broken or self._chance(self.faults.open_fails):
            wire.broken = True
            self._edge_failed(worker, wire, "could not connect")
        elif len(wire.opened) == 2:
            for rank in (wire.src, wire.dst):
                self._say(self.workers[rank], EdgeUp(rank, wire.src, wire.dst, wire.generation))

    def _send(self, worker: Worker, command: Send) -> None:
        resident = worker.residents[command.request_id]
        assert resident.here and resident.stage is None, f"{command}: there is nothing to send"
        wire = self._wire(worker.rank, command.dst, command.generation)
        self._post(worker, wire, command.seq, resident)
        wire.sends.append((command.seq, resident))

    def _expect(self, worker: Worker, command: Expect) -> None:
        resident = self._admit(worker, command.request.request_id)
        resident.nbytes = command.header.nbytes
        wire = self._wire(command.src, worker.rank, command.generation)
        resident.wire = wire
        self._post(worker, wire, command.seq, resident)
        wire.expects.append((command.seq, resident))
        buffers = [r.nbytes for r in worker.residents.values() if r.wire is not None and r.wire.src == command.src]
        assert len(buffers) <= self.config.window, f"{len(buffers)} buffers for edge {wire.src}->{wire.dst}"
        assert sum(buffers) <= self.config.max_pending_bytes, f"{sum(buffers)} bytes for {wire.src}->{wire.dst}"

    def _post(self, worker: Worker, wire: Wire, seq: int, resident: Resident) -> None:
        assert len(wire.opened) == 2, f"{wire.src}->{wire.dst} is used before it is open"
        assert seq == wire.posted[worker.rank], f"transfer {seq} of {wire.src}->{wire.dst} is out of order"
        wire.posted[worker.rank] += 1
        resident.transfers += 1

    def _can_transfer(self, wire: Wire) -> bool:
        if wire.broken:
            return bool(wire.sends or wire.expects)
        return bool(wire.sends and wire.expects) and not wire.hung

    def _transfer(self, wire: Wire) -> None:
        """The oldest transfer ends: done, rejected, or with the whole wire."""
        if wire.broken or self._chance(self.faults.transfer_fails):
            self._break(wire, "connection reset")
        elif self._chance(self.faults.transfer_hangs):
            wire.hung = True
        else:
            self._deliver(wire, self._chance(self.faults.transfer_rejected))

    def _deliver(self, wire: Wire, rejected: bool) -> None:
        (seq, sent), (expected_seq, got) = wire.sends.popleft(), wire.expects.popleft()
        assert (seq, sent.request_id) == (expected_seq, got.request_id), "a payload met another one's buffer"
        src, dst, generation, request_id = wire.src, wire.dst, wire.generation, sent.request_id
        sent.transfers -= 1
        self._say(self.workers[src], Sent(src, request_id, dst, generation, seq, 0.0, 0.0))
        self._settle(self.workers[src], sent)
        got.transfers -= 1
        if rejected:
            self._remove(self.workers[dst], got)
            if not got.dropped:
                self._say(self.workers[dst], TransferRejected(dst, request_id, src, generation, seq, "checksum"))
        else:
            got.here = True
            if not got.dropped:
                self._say(self.workers[dst], Received(dst, request_id, src, generation, seq, 0.0, 0.0))
        self._settle(self.workers[dst], got)

    def _break(self, wire: Wire, reason: str) -> None:
        wire.broken = True
        for rank in (wire.src, wire.dst):
            worker = self.workers.get(rank)
            self._fail_transfers(wire, rank)
            if worker is not None and worker.up and self._chance(0.7):
                self._edge_failed(worker, wire, reason)
                return
        # Nobody noticed: the head's deadline will.

    def _fail_transfers(self, wire: Wire, rank: int) -> None:
        """The end of ``rank`` gives up what it has posted."""
        posted = wire.sends if rank == wire.src else wire.expects
        worker = self.workers.get(rank)
        for _, resident in posted:
            resident.transfers -= 1
            if worker is not None:
                if rank == wire.dst:
                    self._remove(worker, resident)
                self._settle(worker, resident)
        posted.clear()

    def _close(self, worker: Worker, command: CloseEdge) -> None:
        wire = self._wire(command.src, command.dst, command.generation)
        wire.broken = True
        self._fail_transfers(wire, worker.rank)
        self._edge_failed(worker, wire, "closed")  # stale by now: the head must not mind

    def _edge_failed(self, worker: Worker, wire: Wire, reason: str) -> None:
        self._say(worker, EdgeFailed(worker.rank, wire.src, wire.dst, wire.generation, reason))
