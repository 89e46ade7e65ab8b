"""A fleet of simulated workers that answer the scheduler's actions as real ones do, in any order that real ones could.

The fleet has one FIFO to and one from every rank; what is delivered, computed or transferred next is the caller's
choice (``moves``, ``make``). Edges assert that transfers are numbered without a gap and in the same order at both ends,
and that the buffers at the receiver never pass the window and the byte budget.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence

from simulated_worker import Faults, Resident, Wire, Worker, World

from ditrelay.runtime.messages import (
    Action,
    CloseEdge,
    Command,
    EdgeFailed,
    EdgeUp,
    Expect,
    Finish,
    Kill,
    OpenEdge,
    Received,
    Reject,
    SchedulerEvent,
    Send,
    Sent,
    Shutdown,
    Spawn,
    TransferRejected,
    WorkerDown,
)
from ditrelay.runtime.scheduling.state import SchedulerConfig
from ditrelay.runtime.topology import Role, Topology, Unit

Move = tuple[Callable[..., None], tuple[object, ...]]


def topology(*units: tuple[str, int]) -> Topology:
    """From roles and sizes: ``("e", 1), ("n", 2), ("d", 1)`` is an encoder, a denoise replica of 2 and a decoder."""
    roles: dict[str, Role] = {"e": "encode", "n": "denoise", "d": "decode"}
    made: list[Unit] = []
    first = 0
    for letters, size in units:
        made.append(Unit(first, tuple(range(first, first + size)), frozenset(roles[letter] for letter in letters)))
        first += size
    return Topology(tuple(made), ("localhost",) * first)


class SimulatedFleet:
    """All workers, all edges, and what is on the way between them and the head.

    Attributes:
        finished: every ``Finish`` of every request; a request with two is the scheduler's fault.
    """

    def __init__(self, topology: Topology, config: SchedulerConfig, seed: int, payload_bytes: int) -> None:
        self.config = config
        self.random = random.Random(seed)
        self.world = World(self.random, payload_bytes)
        self.workers: dict[int, Worker] = {}
        self.commands: dict[int, deque[Command]] = {rank: deque() for rank in range(topology.world_size)}
        self.events: dict[int, deque[SchedulerEvent]] = {rank: deque() for rank in range(topology.world_size)}
        self.wires: dict[tuple[int, int, int], Wire] = {}
        self.finished: dict[str, list[Finish]] = {}
        self.rejected: list[str] = []
        self._issued: dict[str, Counter[tuple[int, int, int]]] = {"Send": Counter(), "Expect": Counter()}

    # ------------------------------------------------------------ the head's side

    def perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(rank=rank):
                    assert rank not in self.workers, f"rank {rank} has a process"
                    self.workers[rank] = Worker(rank, self.world, self.events[rank])
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
            issued = self._issued[type(command).__name__]
            assert command.seq == issued[*ends, command.generation], f"{command} is out of order"
            issued[*ends, command.generation] += 1

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
        """Every bit of work that is possible now; deliveries to the head are ``ready_events``."""
        made: list[Move] = []
        for rank, worker in self.workers.items():
            if not worker.up:
                made.append((worker.come_up, ()))
            elif self.commands[rank]:
                made.append((self._obey_next, (worker,)))
            made += [(worker.compute, (stage,)) for stage in worker.busy_stages()]
            made += [(worker.show, ())] if worker.preview is not None else []
        made += [(self._transfer, (wire,)) for wire in self.wires.values() if wire.can_move]
        return made

    def ready_events(self) -> list[int]:
        """Ranks from which an event may be delivered to the head."""
        return [rank for rank, words in self.events.items() if words]

    def make(self, move: Move) -> None:
        move[0](*move[1])

    def heal(self) -> None:
        self.world.faults = Faults()

    # ------------------------------------------------------------ edges

    def _obey_next(self, worker: Worker) -> None:
        command = self.commands[worker.rank].popleft()
        match command:
            case Send():
                self._send(worker, command)
            case Expect():
                self._expect(worker, command)
            case OpenEdge():
                self._open(worker, command)
            case CloseEdge():
                self._close(worker, command)
            case Shutdown():
                raise AssertionError("the scheduler shuts nobody down")
            case _:
                worker.obey(command)

    def _wire(self, src: int, dst: int, generation: int) -> Wire:
        return self.wires.setdefault((src, dst, generation), Wire(src, dst, generation))

    def _open(self, worker: Worker, command: OpenEdge) -> None:
        wire = self._wire(command.src, command.dst, command.generation)
        wire.opened.add(worker.rank)
        if wire.broken or self.world.chance(self.world.faults.open_fails):
            wire.broken = True
            self._say_failed(worker, wire, "could not connect")
        elif len(wire.opened) == 2:
            for rank in (wire.src, wire.dst):
                self.events[rank].append(EdgeUp(rank, wire.src, wire.dst, wire.generation))

    def _send(self, worker: Worker, command: Send) -> None:
        wire = self._wire(worker.rank, command.dst, command.generation)
        resident = worker.residents.get(command.request_id)
        if resident is None and command.early:
            wire.posted[worker.rank] += 1
            wire.broken = True
            self._say_failed(worker, wire, "nothing held")  # its stage failed after it was launched
            return
        assert resident is not None, f"{command}: nothing is held"
        made = resident.here and resident.stage is None
        assert made or (command.early and resident.launched), f"{command}: there is nothing to send"
        self._post(worker, wire, command.seq, resident)
        wire.sends.append((command.seq, resident))

    def _expect(self, worker: Worker, command: Expect) -> None:
        resident = worker.admit(command.request.request_id)
        resident.nbytes = command.header.nbytes
        resident.wire = wire = self._wire(command.src, worker.rank, command.generation)
        self._post(worker, wire, command.seq, resident)
        wire.expects.append((command.seq, resident))
        buffers = [r.nbytes for r in worker.residents.values() if r.wire is not None and r.wire.src == command.src]
        assert len(buffers) <= self.config.window, f"{len(buffers)} buffers for {wire.src}->{wire.dst}"
        assert sum(buffers) <= self.config.max_pending_bytes, f"{sum(buffers)} bytes for {wire.src}->{wire.dst}"

    def _post(self, worker: Worker, wire: Wire, seq: int, resident: Resident) -> None:
        assert len(wire.opened) == 2, f"{wire.src}->{wire.dst} is used before it is open"
        assert seq == wire.posted[worker.rank], f"transfer {seq} of {wire.src}->{wire.dst} is out of order"
        wire.posted[worker.rank] += 1
        resident.transfers += 1

    def _close(self, worker: Worker, command: CloseEdge) -> None:
        wire = self._wire(command.src, command.dst, command.generation)
        wire.broken = True
        self._fail_transfers(wire, worker.rank)
        self._say_failed(worker, wire, "closed")  # stale by now: the head must not mind

    def _say_failed(self, worker: Worker, wire: Wire, reason: str) -> None:
        worker.said.append(EdgeFailed(worker.rank, wire.src, wire.dst, wire.generation, reason))

    # ------------------------------------------------------------ transfers

    def _transfer(self, wire: Wire) -> None:
        """The oldest transfer ends, done or rejected; or it hangs, or the whole wire breaks."""
        faults = self.world.faults
        if wire.broken or self.world.chance(faults.transfer_fails):
            self._break(wire)
        elif self.world.chance(faults.transfer_hangs):
            wire.hung = True
        else:
            self._deliver(wire, rejected=self.world.chance(faults.transfer_rejected))

    def _deliver(self, wire: Wire, rejected: bool) -> None:
        (seq, sent), (expected_seq, got) = wire.sends.popleft(), wire.expects.popleft()
        assert (seq, sent.request_id) == (expected_seq, got.request_id), "a payload met another one's buffer"
        src, dst, generation, request_id = wire.src, wire.dst, wire.generation, sent.request_id
        source, target = self.workers[src], self.workers[dst]
        sent.transfers -= 1
        source.said.append(Sent(src, request_id, dst, generation, seq, 0.0, 0.0))
        source.settle(sent)
        got.transfers -= 1
        got.here = not rejected
        if rejected:
            target.remove(got)
        if not got.dropped:
            rejection = TransferRejected(dst, request_id, src, generation, seq, "checksum")
            target.said.append(rejection if rejected else Received(dst, request_id, src, generation, seq, 0.0, 0.0))
        target.settle(got)

    def _break(self, wire: Wire) -> None:
        """At most one end notices by itself; where none does, the head's deadline must."""
        wire.broken = True
        for rank in (wire.src, wire.dst):
            self._fail_transfers(wire, rank)
            worker = self.workers.get(rank)
            if worker is not None and worker.up and self.world.chance(0.7):
                self._say_failed(worker, wire, "connection reset")
                return

    def _fail_transfers(self, wire: Wire, rank: int) -> None:
        """The end of ``rank`` gives up what it has posted."""
        posted = wire.sends if rank == wire.src else wire.expects
        worker = self.workers.get(rank)
        for _, resident in posted:
            resident.transfers -= 1
            if worker is not None:
                if rank == wire.dst:
                    worker.remove(resident)
                worker.settle(resident)
        posted.clear()
