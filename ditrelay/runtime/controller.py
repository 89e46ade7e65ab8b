"""The head's loop: one thread that owns the scheduler, the control plane and the worker processes.

It only moves things: events from workers and clients go into the scheduler, the actions that come back are carried out.
What is decided is decided in scheduler.py; what is recorded for people is recorded in request_log.py.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import secrets
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

import zmq

from ditrelay.errors import StartupError
from ditrelay.models.card import ModelCard
from ditrelay.runtime.communication.store import StoreServer
from ditrelay.runtime.control_plane import HeadSockets
from ditrelay.runtime.edge_faults import EdgeFaults
from ditrelay.runtime.launcher import Launcher, ProcessHandle, await_end
from ditrelay.runtime.messages import (
    Action,
    CancelRequest,
    EdgeFailed,
    Finish,
    Heartbeat,
    Kill,
    LogLine,
    Reject,
    SchedulerEvent,
    Shutdown,
    Spawn,
    Submit,
    Tick,
    WorkerDown,
    WorkerEvent,
    WorkerFailed,
)
from ditrelay.runtime.request_log import RequestLog
from ditrelay.runtime.run_dir import RunDir
from ditrelay.runtime.scheduler import Scheduler, SchedulerConfig
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.spool import Spool
from ditrelay.runtime.status import ROLES, EngineStatus, WorkerStatus, lost_roles
from ditrelay.runtime.topology import Topology, role_name
from ditrelay.runtime.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
# Silence (s) after which a worker hangs: a share of --dist-timeout, to be found before what is sent to it is late.
HEARTBEAT_SHARE = 0.8
HEARTBEAT_TIMEOUT = 30.0
LEAST_HEARTBEAT_TIMEOUT = 3.0
SILENT_SECONDS = 2.5  # two heartbeats are missing
FIRST_HEARTBEAT_TIMEOUT = 120.0  # a spawned process imports torch before it beats
LAST_WORDS_SECONDS = 0.05  # what a process sent before it ended may arrive a moment after its end is seen
SHUTDOWN_SECONDS = 3.0
COMPILE_SECONDS = 120.0  # a prompt of another length may compile anew, whenever it comes: that is no hang


@dataclass
class _Process:
    handle: ProcessHandle
    incarnation: int
    last_beat: float
    heartbeat: Heartbeat | None = None
    failure: str = ""
    ended_at: float | None = None


class Controller:
    """Runs one fleet of workers.

    Args:
        args, card, topology: what to run and where.
        launcher: starts processes; ``device_type``: ``cpu`` or ``cuda``.
        log: is told of every event that clients care for; called from the controller's thread.
    """

    def __init__(
        self,
        args: ServerArgs,
        card: ModelCard,
        topology: Topology,
        launcher: Launcher,
        device_type: str,
        log: RequestLog,
    ) -> None:
        self.args = args
        self.topology = topology
        self.fleet_up: Future[None] = Future()
        self._card = card
        self._launcher = launcher
        self._device_type = device_type
        self._log = log
        self._scheduler = Scheduler(topology, scheduler_config(args), on_state=log.state_changed)
        self._run_dir = RunDir()
        self._spool = Spool(str(self._run_dir.path)).make()
        self._token = secrets.token_hex(16)
        self._store = StoreServer("127.0.0.1")
        self._sockets = HeadSockets(str(self._run_dir.path), self._token)
        self._processes: dict[int, _Process] = {}
        self._edge_faults = EdgeFaults(self._is_well)
        self._incarnations: dict[int, int] = {}
        self._down_reasons: dict[int, str] = {}
        self._inbox: queue.SimpleQueue[SchedulerEvent] = queue.SimpleQueue()
        self._deadlines: dict[str, float] = {}  # of the live requests, first the one that is due first
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._sockets.events, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)
        self._wake_lock = threading.Lock()
        self._ended = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self.status = self._make_status()

    # ------------------------------------------------------------ called from any thread

    def start(self) -> None:
        self._thread.start()

    def post(self, event: Submit | CancelRequest) -> None:
        """Hand an event of a client to the loop; after the loop's end nothing happens."""
        self._inbox.put(event)
        self._wake_up()

    def stop(self, timeout: float) -> None:
        """End all workers and the loop; the processes are gone on return. May be called again."""
        self._stopping.set()
        self._wake_up()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        elif not self._ended:
            self._end_workers()  # it never started: there are only sockets to close

    def _wake_up(self) -> None:
        with self._wake_lock:
            if not self._ended:
                os.eventfd_write(self._wake, 1)

    # ------------------------------------------------------------ the loop

    def _run(self) -> None:
        try:
            self._perform(self._scheduler.start(time.monotonic()))
            next_tick = time.monotonic() + TICK_SECONDS
            while not self._stopping.is_set():
                self._wait(next_tick)
                self._take_worker_events()
                self._bury_the_dead(time.monotonic())
                self._take_inbox()
                for fault in self._edge_faults.due(time.monotonic()):
                    self._feed(fault)
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK_SECONDS
                    self._tick()
        except Exception as error:  # the loop's own fault must reach every waiting client
            logger.exception("the engine's control loop failed")
            self._log.close(f"the engine's control loop failed: {error}")
            self._fail_startup(f"the engine's control loop failed: {error}")
        finally:
            self._end_workers()
            self._fail_startup("the engine is shut down")
            self._log.close("the engine is shut down")

    def _wait(self, until: float) -> None:
        """Sleep until something happens or ``until`` is reached; notes which processes ended."""
        dying = self._edge_faults or any(process.ended_at for process in self._processes.values())
        timeout = min(max(0.0, until - time.monotonic()), LAST_WORDS_SECONDS if dying else TICK_SECONDS)
        ready = dict(self._poller.poll(round(timeout * 1000)))
        if ready.pop(self._wake, None):
            os.eventfd_read(self._wake)
        ready.pop(self._sockets.events, None)
        for process in self._processes.values():
            if ready and process.handle.fileno() in ready:
                process.ended_at = time.monotonic()
                self._poller.unregister(process.handle.fileno())

    def _take_inbox(self) -> None:
        while not self._inbox.empty():
            event = self._inbox.get()
            if isinstance(event, Submit):
                self._deadlines[event.request.request_id] = time.monotonic() + self.args.request_timeout
            self._feed(event)

    def _take_worker_events(self) -> None:
        for rank, incarnation, event in self._sockets.receive_all():
            process = self._processes.get(rank)
            if process is None or process.incarnation != incarnation:
                continue  # the last words of a process that is already replaced
            process.last_beat = time.monotonic()
            self._on_worker_event(process, event)

    def _on_worker_event(self, process: _Process, event: WorkerEvent) -> None:
        match event:
            case Heartbeat():
                process.heartbeat = event
                self._feed(event)
            case LogLine(logger=name, level=level, text=text):
                logging.getLogger(name).log(level, "%s", text)
            case WorkerFailed(reason=reason):
                process.failure = reason
            case EdgeFailed():
                self._edge_faults.hold(event, process.last_beat)
            case _:
                self._log.observe(event)
                self._feed(event)

    def _is_well(self, rank: int) -> bool:
        """Whether its process lives and beats, as far as can be told now; its end is reported a moment later."""
        process = self._processes.get(rank)
        return process is not None and not process.ended_at and time.monotonic() - process.last_beat < SILENT_SECONDS

    def _feed(self, event: SchedulerEvent) -> None:
        self._perform(self._scheduler.on_event(event, time.monotonic()))
        if self._scheduler.ready and not self.fleet_up.done():
            self.status = self._make_status()
            self.fleet_up.set_result(None)

    def _tick(self) -> None:
        now = time.monotonic()
        for request_id in list(itertools.takewhile(lambda each: self._deadlines[each] <= now, self._deadlines)):
            reason = f"not done within --request-timeout {self.args.request_timeout:g} s"
            self._feed(CancelRequest(request_id, reason))
        self._kill_the_silent(now)
        self._sockets.beat()
        self._launcher.tend()
        self._feed(Tick())
        self.status = self._make_status()

    def _kill_the_silent(self, now: float) -> None:
        """A worker's main thread beats, so one that is stopped, or whose main thread hangs, is silent."""
        usual = max(LEAST_HEARTBEAT_TIMEOUT, min(HEARTBEAT_TIMEOUT, HEARTBEAT_SHARE * self.args.dist_timeout))
        for process in self._processes.values():
            limit = usual if process.heartbeat else FIRST_HEARTBEAT_TIMEOUT
            if now - process.last_beat > limit:
                process.failure = f"no heartbeat for {limit:g} s: it is stopped or its main thread hangs"
                process.handle.kill()  # its end is noticed like any other
                process.last_beat = now

    # ------------------------------------------------------------ actions

    def _perform(self, actions: list[Action]) -> None:
        """Commands first: a rank must not wait for a client to be told of another request's end."""
        for action in actions:
            match action:
                case Finish() | Reject():
                    continue
                case Spawn(rank=rank):
                    self._spawn(rank)
                case Kill(rank=rank, reason=reason):
                    self._forget(rank, reason)
                case _:
                    self._sockets.send(action)
        for action in actions:
            match action:
                case Finish():
                    self._spool.discard(action.request_id)
                    self._deadlines.pop(action.request_id, None)
                    self._log.finish(action.request_id, action.outcome, action.reason, action.invalid_param)
                case Reject():
                    self._deadlines.pop(action.request_id, None)
                    self._log.reject(action.request_id, action.limit)

    def _spawn(self, rank: int) -> None:
        if self._stopping.is_set():
            return
        incarnation = self._incarnations[rank] = self._incarnations.get(rank, -1) + 1
        try:
            self._sockets.open(rank, incarnation)
            handle = self._launcher.start(self._spec(rank, incarnation))
        except (OSError, zmq.ZMQError) as error:  # as where the clients have all file descriptors
            self._lose(rank, f"its process could not be started: {error}")
            return
        self._processes[rank] = _Process(handle, incarnation, time.monotonic())
        self._poller.register(handle.fileno(), zmq.POLLIN)

    def _spec(self, rank: int, incarnation: int) -> WorkerSpec:
        return WorkerSpec(
            rank=rank,
            incarnation=incarnation,
            args=self.args,
            card=self._card,
            topology=self.topology,
            device_type=self._device_type,
            run_dir=str(self._run_dir.path),
            store_host=self._store.host,
            store_port=self._store.port,
            head_pid=os.getpid(),
            token=self._token,
        )

    def _forget(self, rank: int, reason: str) -> None:
        """Kill a process; nothing that it still says counts."""
        self._down_reasons[rank] = reason
        if process := self._processes.pop(rank, None):
            logger.warning("rank %d is killed: %s", rank, reason)
            process.handle.kill()
            self._let_go(rank, process)

    def _bury_the_dead(self, now: float) -> None:
        """Tell the scheduler of processes that ended, once their last words have arrived."""
        for rank, process in list(self._processes.items()):
            if process.ended_at is not None and now - process.ended_at >= LAST_WORDS_SECONDS:
                self._bury(rank, process)

    def _bury(self, rank: int, process: _Process) -> None:
        del self._processes[rank]
        reason = process.failure or f"its process ended without a word ({process.handle.ending()})"
        self._let_go(rank, process)
        self._lose(rank, reason)

    def _lose(self, rank: int, reason: str) -> None:
        """A worker is gone: before the fleet is up the start has failed, later the scheduler copes."""
        if self._stopping.is_set():
            return
        role = role_name(self.topology.roles_of(rank))
        logger.error("rank %d (%s) is down: %s", rank, role, reason)
        self._down_reasons[rank] = reason
        if self.fleet_up.done():
            self._inbox.put(WorkerDown(rank, reason))
        else:
            self._fail_startup(f"rank {rank} ({role}) did not start: {reason}")
            self._stopping.set()

    def _let_go(self, rank: int, process: _Process) -> None:
        if process.ended_at is None:
            self._poller.unregister(process.handle.fileno())
        process.handle.close()
        self._sockets.close_rank(rank)

    def _fail_startup(self, reason: str) -> None:
        if not self.fleet_up.done():
            self.fleet_up.set_exception(StartupError(reason))

    # ------------------------------------------------------------ status and end

    def _make_status(self) -> EngineStatus:
        snapshot = self._scheduler.snapshot()
        failed = {rank for unit in snapshot.units if unit.state == "failed" for rank in unit.unit.members}
        return EngineStatus(
            ready=self._scheduler.ready,
            workers=tuple(self._worker_status(rank, rank in failed) for rank in range(self.topology.world_size)),
            edges=snapshot.edges,
            units=snapshot.units,
            readings=self._log.readings(),
            lost_roles=lost_roles(snapshot.units),
            **self._log.counts(),
        )

    def _worker_status(self, rank: int, failed: bool) -> WorkerStatus:
        process = self._processes.get(rank)
        unit, roles = self.topology.unit_of(rank), self.topology.roles_of(rank)
        state = self._scheduler.worker_state(rank) if rank in self._incarnations else "starting"
        return WorkerStatus(
            rank=rank,
            role=role_name(roles),
            roles=tuple(role for role in ROLES if role in roles),
            replica=self.topology.replicas.index(unit.leader) if "denoise" in roles else None,
            state="failed" if failed else state,
            pid=process.handle.pid if process else None,
            restarts=self._incarnations.get(rank, 0),
            reason=self._down_reasons.get(rank, "") if state == "down" else "",
            memory=process.heartbeat if process else None,
        )

    def _end_workers(self) -> None:
        """Ask every worker to stop, then kill what is left after ``SHUTDOWN_SECONDS``; or at once, where all start."""
        for rank in self._processes:
            self._sockets.send(Shutdown(rank))
        until = time.monotonic() + (SHUTDOWN_SECONDS if self.fleet_up.done() else 0.0)
        for process in self._processes.values():
            await_end(process.handle, until - time.monotonic())
            process.handle.kill()
            process.handle.close()
        self._processes.clear()
        self._sockets.flush_and_close(0.0)
        self._run_dir.close()
        with self._wake_lock:
            self._ended = True
            os.close(self._wake)


def scheduler_config(args: ServerArgs) -> SchedulerConfig:
    return SchedulerConfig(
        max_pending_transfers=args.max_pending_transfers,
        max_pending_bytes=args.max_pending_bytes,
        max_queue=args.max_queue,
        lock_step=not args.use_async_comm,
        transfer_timeout=args.dist_timeout,
        stage_timeout=args.stage_timeout,
        hang_timeout=max(args.dist_timeout, COMPILE_SECONDS) if args.enable_torch_compile else args.dist_timeout,
        startup_timeout=args.startup_timeout,
        max_attempts=args.max_attempts,
    )
