"""The head's loop: one thread that owns the scheduler, the control plane and the worker processes.

It only moves things: events from workers and clients go into the scheduler, the actions that come back are carried out.
What is decided is decided in scheduler.py; what is recorded for people is recorded in request_log.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import zmq

from ditrelay.errors import StartupError
from ditrelay.models.card import ModelCard
from ditrelay.runtime.communication.store import StoreServer
from ditrelay.runtime.control_plane import HeadSockets
from ditrelay.runtime.crew import LAST_WORDS_SECONDS, Crew, Process
from ditrelay.runtime.deadlines import Deadlines
from ditrelay.runtime.edge_faults import EdgeFaults
from ditrelay.runtime.launcher import Launcher
from ditrelay.runtime.messages import (
    Action,
    CancelRequest,
    Command,
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
from ditrelay.runtime.scheduler import Scheduler
from ditrelay.runtime.scheduler_settings import scheduler_config
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.spool import Spool
from ditrelay.runtime.start_messages import Restart, StartFailed
from ditrelay.runtime.status import ROLES, EngineStatus, WorkerStatus, lost_roles
from ditrelay.runtime.topology import Topology, role_name
from ditrelay.runtime.watchdog import Watchdog
from ditrelay.runtime.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
# Silence (s) after which a worker hangs: a share of --dist-timeout, to be found before what is sent to it is late.
HEARTBEAT_SHARE = 0.8
HEARTBEAT_TIMEOUT = 30.0
LEAST_HEARTBEAT_TIMEOUT = 3.0
SHUTDOWN_SECONDS = 3.0


class Controller:
    """Runs one fleet of workers.

    Args:
        args, card, topology: what to run and where.
        launcher: starts processes; ``device_type``: ``cpu`` or ``cuda``.
        log: is told of every event that clients care for; called from the controller's thread.

    Attributes:
        fleet_up: done when all ranks were up for the first time.
        failure: why the loop has ended, where nobody has asked for it.
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
        self._device_type = device_type
        self._log = log
        self._deadlines = Deadlines(args.request_timeout)
        on_state = self._deadlines.before(log.state_changed)
        self._scheduler = Scheduler(topology, scheduler_config(args), on_state=on_state)
        self._run_dir = RunDir()
        self._spool = Spool(str(self._run_dir.path)).make()
        self._token = secrets.token_hex(16)
        self._store = StoreServer("127.0.0.1")
        self._sockets = HeadSockets(str(self._run_dir.path), self._token)
        self._inbox: queue.SimpleQueue[SchedulerEvent] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._sockets.events, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)
        self._wake_lock = threading.Lock()
        self._crew = Crew(launcher, self._sockets, self._spec, self._poller, self._wake_up)
        self._not_started: list[StartFailed] = []  # not even begun
        self._edge_faults = EdgeFaults(self._crew.is_well)
        self._watchdog = Watchdog("the engine's control loop")
        self._ended = False
        self.failure = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self.status = self._make_status()

    # ------------------------------------------------------------ called from any thread

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()

    @property
    def trouble(self) -> str:
        """Why the loop does nothing at the moment, or nothing."""
        return self.failure or self._watchdog.trouble

    def post(self, event: Submit | CancelRequest | Restart) -> None:
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
                self._watchdog.turned()
                self._take_worker_events()
                self._take_started()
                self._bury_the_dead(time.monotonic())
                self._take_inbox()
                for fault in self._edge_faults.due(time.monotonic()):
                    self._feed(fault)
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK_SECONDS
                    self._tick()
        except BaseException as error:  # the loop's own fault must reach every waiting client
            self.failure = f"the engine's control loop failed: {describe(error)}"
            self._log.close(self.failure)
            self._fail_startup(self.failure)
            logger.exception("the engine's control loop failed")
        finally:
            self._watchdog.stop()
            self._log.close("the engine is shut down")
            self._fail_startup("the engine is shut down")
            self._end_workers()

    def _wait(self, until: float) -> None:
        """Sleep until something happens or ``until`` is reached; notes which processes ended."""
        dying = self._edge_faults or self._not_started or self._crew.is_dying
        timeout = min(max(0.0, until - time.monotonic()), LAST_WORDS_SECONDS if dying else TICK_SECONDS)
        ready = self._poll(timeout)
        if ready.pop(self._wake, None):
            os.eventfd_read(self._wake)
        ready.pop(self._sockets.events, None)
        self._crew.note_ended(ready)

    def _poll(self, timeout: float) -> dict[Any, int]:
        try:
            return dict(self._poller.poll(round(timeout * 1000)))
        except (zmq.ZMQError, MemoryError) as error:  # without memory for it: all is looked at again
            logger.error("the head could not wait for its workers: %s", error)
            time.sleep(TICK_SECONDS)
            return {}

    def _take_inbox(self) -> None:
        while not self._inbox.empty():
            event = self._inbox.get()
            if isinstance(event, Submit):
                self._deadlines.submitted(event.request)
            self._feed(event)

    def _take_worker_events(self) -> None:
        for rank, incarnation, event in self._sockets.receive_all():
            process = self._crew.get(rank)
            if process is None or process.incarnation != incarnation:
                continue  # the last words of a process that is already replaced
            process.last_beat = time.monotonic()
            self._on_worker_event(process, event)

    def _on_worker_event(self, process: Process, event: WorkerEvent) -> None:
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
                self._deadlines.observe(event)
                self._feed(event)

    def _feed(self, event: SchedulerEvent) -> None:
        self._perform(self._scheduler.on_event(event, time.monotonic()))
        if self._scheduler.ready and not self.fleet_up.done():
            self.status = self._make_status()
            self.fleet_up.set_result(None)

    def _tick(self) -> None:
        now = time.monotonic()
        for overdue in self._deadlines.due():
            self._feed(overdue)
        usual = max(LEAST_HEARTBEAT_TIMEOUT, min(HEARTBEAT_TIMEOUT, HEARTBEAT_SHARE * self.args.dist_timeout))
        self._crew.kill_the_silent(now, usual)
        self._beat()
        self._crew.tend()
        self._feed(Tick())
        self.status = self._make_status()

    def _beat(self) -> None:
        with contextlib.suppress(zmq.ZMQError, MemoryError):  # a rank waits for two minutes for the next
            self._sockets.beat()

    # ------------------------------------------------------------ actions

    def _perform(self, actions: list[Action]) -> None:
        """Commands first: a rank must not wait for a client to be told of another request's end.

        An action that meets a limit of the machine (threads, descriptors, memory, disk) has failed, and no more.
        """
        for action in actions:
            match action:
                case Finish() | Reject():
                    continue
                case Spawn(rank=rank):
                    self._spawn(rank)
                case Kill(rank=rank, reason=reason):
                    self._kill(rank, reason)
                case _:
                    self._send(action)
        for action in actions:
            match action:
                case Finish():
                    self._deadlines.ended(action.request_id)
                    with contextlib.suppress(MemoryError):  # the folder goes at the end, with all that is left
                        self._spool.discard(action.request_id)
                    self._log.finish(action.request_id, action.outcome, action.reason, action.invalid_param)
                case Reject():
                    self._deadlines.ended(action.request_id)
                    self._log.reject(action.request_id, action.limit)

    def _spawn(self, rank: int) -> None:
        if self._stopping.is_set():
            return
        try:
            self._run_dir.restore()
            self._spool.make()
            self._crew.spawn(rank)
        except Exception as error:  # noqa: BLE001 - as where all file descriptors are taken: it is tried again
            self._not_started.append(StartFailed(rank, describe(error)))

    def _kill(self, rank: int, reason: str) -> None:
        try:
            self._crew.kill(rank, reason)
        except Exception:  # its process is forgotten all the same, and what it says is not heard
            logger.exception("rank %d could not be killed cleanly", rank)

    def _send(self, command: Command) -> None:
        try:
            self._sockets.send(command)
        except Exception as error:  # noqa: BLE001 - a rank that lacks a command can't go on with the next
            reason = f"a command could not be sent to it: {describe(error)}"
            self._kill(command.rank, reason)
            self._lose(command.rank, reason)

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

    def _take_started(self) -> None:
        """Tell the scheduler of the starts that failed."""
        failed, self._not_started = [*self._not_started, *self._crew.take_started()], []
        for event in failed:
            self._lose(event.rank, f"its process could not be started: {event.reason}", event)

    def _bury_the_dead(self, now: float) -> None:
        """Tell the scheduler of processes that ended."""
        for rank, reason in self._crew.bury(now):
            self._lose(rank, reason)

    def _lose(self, rank: int, reason: str, event: StartFailed | None = None) -> None:
        """A worker is gone: before the fleet is up the start has failed, later the scheduler copes."""
        if self._stopping.is_set():
            return
        role = role_name(self.topology.roles_of(rank))
        logger.error("rank %d (%s) is down: %s", rank, role, reason)
        self._crew.down_reasons[rank] = reason
        if self.fleet_up.done():
            self._inbox.put(event or WorkerDown(rank, reason))
        else:
            self._fail_startup(f"rank {rank} ({role}) did not start: {reason}")
            self._stopping.set()

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
            trouble=self.trouble,
            failure=self.failure,
            **self._log.counts(),
        )

    def _worker_status(self, rank: int, failed: bool) -> WorkerStatus:
        process = self._crew.get(rank)
        unit, roles = self.topology.unit_of(rank), self.topology.roles_of(rank)
        state = self._scheduler.worker_state(rank) if self._crew.was_started(rank) else "starting"
        return WorkerStatus(
            rank=rank,
            role=role_name(roles),
            roles=tuple(role for role in ROLES if role in roles),
            replica=self.topology.replicas.index(unit.leader) if "denoise" in roles else None,
            state="failed" if failed else state,
            pid=process.handle.pid if process else None,
            restarts=self._crew.restarts(rank),
            reason=self._crew.down_reasons.get(rank, "") if state == "down" else "",
            memory=process.heartbeat if process else None,
        )

    def _end_workers(self) -> None:
        """Ask every worker to stop, then kill what is left after ``SHUTDOWN_SECONDS``; or at once, where all start."""
        for rank in self._crew.ranks():
            with contextlib.suppress(zmq.ZMQError, MemoryError):  # it is killed then
                self._sockets.send(Shutdown(rank))
        self._crew.end(SHUTDOWN_SECONDS if self.fleet_up.done() else 0.0)
        self.status = replace(self.status, workers=tuple(replace(worker, pid=None) for worker in self.status.workers))
        self._sockets.flush_and_close(0.0)
        self._run_dir.close()
        with self._wake_lock:
            self._ended = True
            os.close(self._wake)


def describe(error: BaseException) -> str:
    return str(error) or type(error).__name__
