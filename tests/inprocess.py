"""A whole fleet in one process: the real scheduler, overlap loops and adapters over the in-memory transport."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from types import TracebackType

from fake_device import SlowDevice

from ditrelay.models.card import load_card
from ditrelay.models.timed import TimedAdapter
from ditrelay.models.timed_options import TimedOptions
from ditrelay.runtime.communication.communicator import DisaggCommunicator
from ditrelay.runtime.communication.local_transport import FaultPlan, LocalNetwork
from ditrelay.runtime.communication.transport import Transport
from ditrelay.runtime.messages import (
    CancelRequest,
    Command,
    Decoded,
    Finish,
    LogLine,
    SchedulerEvent,
    Send,
    Spawn,
    Submit,
    Tick,
    WorkerEvent,
    WorkerUp,
)
from ditrelay.runtime.pipelines_core.executors.disaggregated_executor import DisaggregatedExecutor
from ditrelay.runtime.pipelines_core.executors.lane import Lane
from ditrelay.runtime.pipelines_core.executors.overlap import OverlapLoop
from ditrelay.runtime.pipelines_core.executors.progress import DeviceProgress
from ditrelay.runtime.pipelines_core.stages import build_pipeline
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.scheduler import Scheduler
from ditrelay.runtime.scheduler_settings import scheduler_config
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import Edge, Topology


class Rank:
    """What a worker process is, less the process."""

    def __init__(
        self,
        rank: int,
        args: ServerArgs,
        topology: Topology,
        network: LocalNetwork,
        events: queue.SimpleQueue,
        behind: float,
    ) -> None:
        def connect(edge: Edge, generation: int) -> Transport:
            return network.connect(edge, generation, rank, timeout=args.dist_timeout)

        roles = topology.roles_of(rank)
        self.comm = DisaggCommunicator(rank, topology.roles_of, connect, args.dist_timeout)
        self.executor = DisaggregatedExecutor(args, rank=rank, roles=roles, communicator=self.comm, peers=8)
        lane = Lane(f"rank-{rank}", self.executor.device)
        if behind and "encode" in roles:
            lane.progress = DeviceProgress(f"rank-{rank}", SlowDevice(behind).record, args.stage_timeout)
        adapter = TimedAdapter(TimedOptions.parse(args.model_path))
        self.loop = OverlapLoop(
            self.executor,
            build_pipeline(adapter, roles),
            lanes=dict.fromkeys(roles, lane),
            priority={"encode": 0, "decode": 1, "denoise": 2},
            emit=events.put,
            announce=True,
        )
        self.commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        threading.Thread(target=self._obey, daemon=True).start()

    def _obey(self) -> None:
        while (command := self.commands.get()) is not None:
            self.loop.handle(command)


class Fleet:
    """``with Fleet(args) as fleet: fleet.submit(...); fleet.wait()``.

    Args:
        behind: seconds that the device of a rank that encodes takes for each thing launched, behind the rank's thread.

    Attributes:
        early: transfers that were asked for before their encode was done.
        outcomes: how each request ended; ``finishes`` counts the Finish actions per request.
        media: the file of each request that is done.
    """

    def __init__(self, args: ServerArgs, faults: FaultPlan | None = None, *, behind: float = 0.0) -> None:
        self.args = args
        self.card = load_card(args.model_path)
        self.topology = Topology.build(args)
        self.outcomes: dict[str, Finish] = {}
        self.finishes: Counter[str] = Counter()
        self.media: dict[str, bytes] = {}
        self.scheduler = Scheduler(self.topology, scheduler_config(args))
        self.most_pending_bytes = 0
        self.early = 0
        self._events: queue.SimpleQueue[SchedulerEvent | WorkerEvent | None] = queue.SimpleQueue()
        network = LocalNetwork(faults or FaultPlan())
        ranks = range(self.topology.world_size)
        self.ranks = [Rank(r, args, self.topology, network, self._events, behind) for r in ranks]
        self._ended = threading.Condition()
        self._submitted = 0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Fleet:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.put(None)
        self._thread.join(10)
        for rank in self.ranks:
            rank.commands.put(None)
            rank.comm.close()

    def submit(self, prompt: str, **params: object) -> str:
        request_id = f"r{self._submitted}"
        self._submitted += 1
        resolved = self.card.resolve(SamplingParams(prompt=prompt, **{"seed": self._submitted, **params}))
        self._events.put(Submit(Request(request_id=request_id, params=resolved)))
        return request_id

    def cancel(self, request_id: str) -> None:
        self._events.put(CancelRequest(request_id))

    def wait(self, timeout: float = 60.0) -> None:
        """Until every submitted request has ended."""
        with self._ended:
            ended = self._ended.wait_for(lambda: self._error or len(self.outcomes) == self._submitted, timeout)
        if self._error:
            raise self._error
        assert ended, repr(self.scheduler)

    def settle(self, timeout: float = 10.0) -> None:
        """Until nothing is held anywhere any more."""
        until = time.monotonic() + timeout
        while time.monotonic() < until and self.held():
            time.sleep(0.01)
        assert not self.held(), f"{self.held()}: {self.scheduler!r}"

    def held(self) -> dict[str, int]:
        """Whatever is not zero of what must be zero when no request is left."""
        for rank in self.ranks:
            rank.loop.reap()
        snapshot = self.scheduler.snapshot()
        counts = {
            "kept bytes (ranks)": sum(rank.loop.kept_bytes() for rank in self.ranks),
            "kept bytes (scheduler)": snapshot.kept_bytes,
            "zombies": snapshot.zombies,
            "credits": sum(edge.used for edge in snapshot.edges),
            "pending sends": sum(len(rank.executor.pending_sends) for rank in self.ranks),
            "pending receives": sum(len(rank.executor.pending_recvs) for rank in self.ranks),
        }
        return {name: count for name, count in counts.items() if count}

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # noqa: BLE001 - raised again by wait()
            with self._ended:
                self._error = error
                self._ended.notify_all()

    def _loop(self) -> None:
        for action in self.scheduler.start(time.monotonic()):
            assert isinstance(action, Spawn)
            self._events.put(WorkerUp(action.rank, 0, time.monotonic()))
        while True:
            try:
                event = self._events.get(timeout=0.1)
            except queue.Empty:
                event = Tick()
            if event is None:
                return
            self._feed(event)

    def _feed(self, event: SchedulerEvent | WorkerEvent) -> None:
        if isinstance(event, LogLine):
            return
        if isinstance(event, Decoded):
            self.media[event.request_id] = event.media
        for action in self.scheduler.on_event(event, time.monotonic()):
            if isinstance(action, Finish):
                with self._ended:
                    self.outcomes[action.request_id] = action
                    self.finishes[action.request_id] += 1
                    self._ended.notify_all()
            else:
                self.early += isinstance(action, Send) and action.early
                self.ranks[action.rank].commands.put(action)
        pending = sum(edge.nbytes for edge in self.scheduler.snapshot().edges)
        self.most_pending_bytes = max(self.most_pending_bytes, pending)
