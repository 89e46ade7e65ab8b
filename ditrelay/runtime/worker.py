"""One rank's life: start, load its roles' components, obey the head until told to stop or the head is gone.

The main thread is the control thread. Loading happens beside it, so that heartbeats go out meanwhile; computing happens
on the lanes, transfers on the edges' threads.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
import zmq
from torch._C._distributed_c10d import PrefixStore

from ditrelay.models.adapter import Decoder, StageAdapter
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter, resolve_dtype
from ditrelay.runtime.communication.backends import connect_edge, may_send_early
from ditrelay.runtime.communication.communicator import DisaggCommunicator
from ditrelay.runtime.communication.replica import ReplicaLeader, ReplicaPeer
from ditrelay.runtime.communication.store import connect_store, replica_prefix
from ditrelay.runtime.communication.transport import Transport
from ditrelay.runtime.control_plane import RECONNECT_MS, HeadLogHandler, WorkerSockets, replica_address
from ditrelay.runtime.messages import Alive, Command, Heartbeat, Shutdown, WorkerFailed, WorkerUp
from ditrelay.runtime.pipelines_core.executors.checkpoints import Checkpoints
from ditrelay.runtime.pipelines_core.executors.disaggregated_executor import DisaggregatedExecutor
from ditrelay.runtime.pipelines_core.executors.lane import Lane, finish_device_work
from ditrelay.runtime.pipelines_core.executors.memory_gauge import gauge_of, resident_bytes
from ditrelay.runtime.pipelines_core.executors.overlap import OverlapLoop
from ditrelay.runtime.pipelines_core.executors.painter import LearningDecoder, Painter
from ditrelay.runtime.pipelines_core.executors.pipeline_executor import describe
from ditrelay.runtime.pipelines_core.executors.previews import PreviewTaker, SpoolOutlet
from ditrelay.runtime.pipelines_core.executors.replica import LedAdapter, follow
from ditrelay.runtime.pipelines_core.stages import build_pipeline
from ditrelay.runtime.preview_messages import Preview
from ditrelay.runtime.run_dir import remove
from ditrelay.runtime.spool import Spool
from ditrelay.runtime.topology import Edge, Role, Unit
from ditrelay.runtime.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
LINGER_SECONDS = 2.0
LEADER_SECONDS = 1.0  # for a lane to end its step, when all stops
TERMINATED_SECONDS = 5.0  # that a worker with a SIGTERM goes on without a word of its head


def run_worker(spec: WorkerSpec) -> None:
    """The worker process's entry point; returns when the worker is told to stop."""
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C, and the end of the terminal: the head's to handle
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()  # a crash in native code leaves its stack on stderr
    # Control threads wait behind a thread that launches kernels: hand the interpreter over ten times sooner.
    sys.setswitchinterval(0.0005)
    sockets = WorkerSockets(spec.run_dir, spec.rank, spec.incarnation, spec.token)
    _log_to_head(spec, sockets)
    worker = Worker(spec, sockets)
    signal.signal(signal.SIGTERM, lambda *_: worker.leave_end_to_head())
    threading.Thread(target=worker.load, name="load", daemon=True).start()
    try:
        worker.obey()
    except Exception as error:  # as in ``load``: whatever it was, the head must hear of it
        logger.debug("rank %d cannot go on", spec.rank, exc_info=True)
        worker.fail(describe(error))
    sockets.close(LINGER_SECONDS)
    if worker.exit_code:
        os._exit(worker.exit_code)  # a disk, a device or a collective that hangs must not hold up the successor


def _log_to_head(spec: WorkerSpec, sockets: WorkerSockets) -> None:
    root = logging.getLogger()
    root.handlers = [HeadLogHandler(spec.rank, sockets)]
    root.setLevel(logging.WARNING)
    logging.getLogger("ditrelay").setLevel(spec.args.log_level.upper())


class Worker:
    """One rank. ``load`` runs once on its own thread, ``obey`` on the main thread."""

    def __init__(self, spec: WorkerSpec, sockets: WorkerSockets) -> None:
        self.spec = spec
        self.rank = spec.rank
        self.unit: Unit = spec.topology.unit_of(spec.rank)
        self.roles = spec.topology.roles_of(spec.rank)
        self.device = torch.device("cpu") if spec.device_type == "cpu" else torch.device("cuda", spec.rank)
        self.exit_code = 0
        self._head_seconds = spec.head_seconds
        self._beat_at = 0.0
        self._sockets = sockets
        self._stop = threading.Event()
        self._loop: OverlapLoop | None = None
        self._executor: DisaggregatedExecutor | None = None
        self._painter: Painter | None = None
        self._leader: ReplicaLeader | None = None
        self._lanes: set[Lane] = set()
        self._gauge = gauge_of(self.device)

    # ------------------------------------------------------------ loading

    def load(self) -> None:
        """Load the model, then report ``WorkerUp``; on a peer of a replica, then follow its leader."""
        began = time.monotonic()
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            if len(self.unit.members) > 1:
                self._join_replica()
            adapter = load_adapter(self._load_spec())
            if self.rank == self.unit.leader:
                self._become_leader(adapter)
            # What is loaded stays: the collector need not walk it again and again (a full pass takes 100 ms).
            gc.collect()
            gc.freeze()
            finish_device_work(self.device)  # lanes have streams of their own, which wait for nothing on this one
            self._report_up(began)
            if self.rank != self.unit.leader:
                self._follow(adapter)
        except Exception as error:  # a worker that cannot go on says why, whatever it was, and ends
            logger.debug("rank %d cannot go on", self.rank, exc_info=True)
            self.fail(describe(error))

    def _load_spec(self) -> LoadSpec:
        args = self.spec.args
        return LoadSpec(
            card=self.spec.card,
            roles=self.roles,
            device=str(self.device),
            dtype=resolve_dtype(args.dtype, str(self.device)),
            load_format=args.load_format,
            attention_backend=args.attention_backend,
            torch_compile=args.enable_torch_compile,
            offload=args.offload,
            sp=self.unit.sp,
            ring=self.unit.ring,
            tp=self.unit.tp,
            cfg=self.unit.cfg,
        )

    def _join_replica(self) -> None:
        """The replica's default process group: diffusers' context and tensor parallelism work on the default group."""
        timeout = self.spec.args.dist_timeout
        store = connect_store(self.spec.store_host, self.spec.store_port, timeout, self.spec.token)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=PrefixStore(replica_prefix(self.unit.leader, self.spec.incarnation), store),
            rank=self.unit.members.index(self.rank),
            world_size=len(self.unit.members),
            timeout=timedelta(seconds=timeout),
        )

    def _become_leader(self, adapter: StageAdapter) -> None:
        spec, comm = self.spec, self._communicator()
        if len(self.unit.members) > 1:
            peers = [replica_address(spec.run_dir, rank, spec.incarnation) for rank in self.unit.members[1:]]
            self._leader = ReplicaLeader(peers)
            adapter = LedAdapter(adapter, self._leader, self.device)
        edges = [edge for edge in spec.topology.edges if self.rank in edge]
        self._executor = DisaggregatedExecutor(
            spec.args,
            rank=self.rank,
            roles=self.roles,
            communicator=comm,
            device=self.device,
            peers=max(1, len(edges)),
            meanwhile=self._beat,
        )
        lanes = self._make_lanes()
        self._lanes = set(lanes.values())
        self._painter = self._make_painter(adapter, lanes)
        decoder: Decoder = LearningDecoder(adapter, self._painter) if self._painter else adapter
        pipeline = build_pipeline(
            adapter, self.roles, decoder=decoder, fps=spec.card.fps, timeout=spec.args.stage_timeout
        )
        outgoing = [edge for edge in edges if edge.src == self.rank]
        early = may_send_early(outgoing, self.device)
        self._loop = OverlapLoop(
            self._executor,
            pipeline,
            lanes=lanes,
            priority=_priority(self.roles),
            emit=self._sockets.emit,
            announce=early and spec.args.use_async_comm,
            checkpoints=self._checkpoints(),
            previews=self._previews(),
            gauge=self._gauge,
            on_broken=self.fail,
        )

    def _checkpoints(self) -> Checkpoints | None:
        steps = self.spec.args.checkpoint_steps
        return Checkpoints(Spool(self.spec.run_dir), steps) if steps and "denoise" in self.roles else None

    def _make_painter(self, adapter: StageAdapter, lanes: Mapping[Role, Lane]) -> Painter | None:
        if "decode" not in self.roles or not self.spec.card.previews:
            return None
        return Painter(self.rank, adapter, lanes["decode"], Spool(self.spec.run_dir), self._sockets.emit)

    def _previews(self) -> PreviewTaker | None:
        """A rank that decodes, too, has no need of the spool."""
        if "denoise" not in self.roles or not self.spec.card.previews:
            return None
        return PreviewTaker(self._painter or SpoolOutlet(self.rank, Spool(self.spec.run_dir), self._sockets.emit))

    def _communicator(self) -> DisaggCommunicator:
        spec, timeout = self.spec, self.spec.args.dist_timeout

        def connect(edge: Edge, generation: int) -> Transport:
            # A store client of its own: one that waits for a key is locked, and edges are made side by side.
            store = connect_store(spec.store_host, spec.store_port, timeout, spec.token)
            return connect_edge(
                spec.args.transfer_backend,
                store,
                edge,
                generation,
                spec.rank,
                device=self.device,
                timeout=timeout,
                run_dir=spec.run_dir,
            )

        return DisaggCommunicator(spec.rank, spec.topology.roles_of, connect, timeout, device=self.device)

    def _make_lanes(self) -> dict[Role, Lane]:
        """All roles share one lane on a CPU and beside a DiT; on a GPU encode and decode get streams of their own."""
        if self.device.type == "cpu" or "denoise" in self.roles:
            return dict.fromkeys(self.roles, self._lane("compute"))
        return {role: self._lane(role, urgent=role == "encode") for role in self.roles}

    def _lane(self, name: str, *, urgent: bool = False) -> Lane:
        return Lane(name, self.device, urgent=urgent, stall_timeout=self.spec.args.stage_timeout)

    def _report_up(self, began: float) -> None:
        now = time.monotonic()
        self._sockets.emit(WorkerUp(self.rank, os.getpid(), now, now - began, self._gauge.capacity()))

    def _follow(self, adapter: StageAdapter) -> None:
        spec = self.spec
        peer = ReplicaPeer(replica_address(spec.run_dir, spec.rank, spec.incarnation))
        follow(peer, adapter, self.device, self._stop.is_set)

    def fail(self, reason: str) -> None:
        self._sockets.emit(WorkerFailed(self.rank, reason))
        self.exit_code = 1
        self._stop.set()

    # ------------------------------------------------------------ obeying

    def leave_end_to_head(self) -> None:
        """A service is stopped by a SIGTERM to all of its processes: the head still lets the requests that run end."""
        self._head_seconds = min(self._head_seconds, TERMINATED_SECONDS)

    def obey(self) -> None:
        """Carry out commands and send heartbeats until ``Shutdown``, a failure, or the end of the head."""
        poller = zmq.Poller()
        poller.register(self._sockets.commands, zmq.POLLIN)
        head = _open_head(self.spec.head_pid)
        if head is None:
            remove(self.spec.run_dir)
            return
        poller.register(head, zmq.POLLIN)
        heard = time.monotonic()
        while not self._stop.is_set():
            all_sent = self._sockets.flush()
            ready = dict(poller.poll(round(HEARTBEAT_SECONDS * 250) if all_sent else RECONNECT_MS))
            if head in ready:
                remove(self.spec.run_dir)  # nobody else is left to do it, or to report to
                os._exit(1)
            for command in self._sockets.receive_all():
                heard = time.monotonic()
                if isinstance(command, Shutdown):
                    self._shut_down()
                    return
                self._carry_out(command)
            if time.monotonic() - heard > self._head_seconds:
                os._exit(1)  # nobody is there to be told why
            self._beat()

    def _carry_out(self, command: Command) -> None:
        match command:
            case Alive():
                pass
            case Preview(request=request, spare=spare):
                assert self._painter is not None, "the head asks only ranks that decode"
                self._painter.make(request, spare)
            case _:
                assert self._loop is not None, "the head sends no work before WorkerUp"
                self._loop.handle(command)

    def _shut_down(self) -> None:
        self._stop.set()
        if self._leader and self._lanes:
            # By the thread that sends on its sockets. One that still computes leaves them to the process's end.
            self._lanes.pop().finish(self._leader.close, LEADER_SECONDS)
        for lane in self._lanes:
            lane.close(timeout=0.0)
        if self._executor:
            self._executor.comm.close()

    def _beat(self) -> None:
        """Send a heartbeat, where it is time for one. On the control thread."""
        if (now := time.monotonic()) - self._beat_at >= HEARTBEAT_SECONDS:
            self._beat_at = now
            self._sockets.emit(self._heartbeat(now))

    def _heartbeat(self, at: float) -> Heartbeat:
        executor, loop = self._executor, self._loop
        if loop:
            loop.reap()
        # Not only where there is a loop, which the peers of a leader lack.
        cuda = self.device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return Heartbeat(
            self.rank,
            at,
            rss=resident_bytes(),
            device_total=torch.cuda.get_device_properties(self.device).total_memory if cuda else 0,
            device_allocated=torch.cuda.memory_allocated(self.device) if cuda else 0,
            device_peak=self._gauge.highest() if cuda else 0,
            pending_sends=len(executor.pending_sends) if executor else 0,
            pending_recvs=len(executor.pending_recvs) if executor else 0,
            kept=loop.kept_bytes() if loop else 0,
        )


def _priority(roles: frozenset[Role]) -> dict[Role, int]:
    """Which role goes first on a shared lane.

    A non-DiT rank encodes first: that feeds the expensive ranks. A colocated rank finishes what it has begun.
    """
    order: tuple[Role, ...] = ("decode", "denoise", "encode") if "denoise" in roles else ("encode", "decode")
    return {role: position for position, role in enumerate(order)}


def _open_head(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
