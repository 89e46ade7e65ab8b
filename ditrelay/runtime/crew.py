"""The worker processes of one head: started, watched, killed, and told of when they end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq

from ditrelay.runtime.control_plane import HeadSockets
from ditrelay.runtime.launcher import Launcher, ProcessHandle, await_end
from ditrelay.runtime.messages import Heartbeat
from ditrelay.runtime.start_messages import StartFailed
from ditrelay.runtime.starter import Starter
from ditrelay.runtime.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)

SILENT_SECONDS = 2.5  # two heartbeats are missing
FIRST_HEARTBEAT_TIMEOUT = 120.0  # a spawned process imports torch before it beats
LAST_WORDS_SECONDS = 0.05  # what a process sent before it ended may arrive a moment after its end is seen


@dataclass
class Process:
    handle: ProcessHandle
    incarnation: int
    last_beat: float
    heartbeat: Heartbeat | None = None
    failure: str = ""
    ended_at: float | None = None


class Crew:
    """Owned by the controller's thread. Nothing here waits but ``end``.

    Args:
        launcher: starts processes.
        sockets: of the head; one pair is opened for each process.
        make_spec: what rank and incarnation are to be started with.
        wake: called by another thread when a start has ended.

    Attributes:
        down_reasons: why the last process of a rank ended.
    """

    def __init__(
        self,
        launcher: Launcher,
        sockets: HeadSockets,
        make_spec: Callable[[int, int], WorkerSpec],
        poller: zmq.Poller,
        wake: Callable[[], None],
    ) -> None:
        self._sockets = sockets
        self._make_spec = make_spec
        self._poller = poller
        self._starter = Starter(launcher, wake)
        self._processes: dict[int, Process] = {}
        self._incarnations: dict[int, int] = {}
        self._awaited: dict[int, int] = {}  # ranks whose start is under way, with their incarnation
        self.down_reasons: dict[int, str] = {}

    def get(self, rank: int) -> Process | None:
        return self._processes.get(rank)

    def restarts(self, rank: int) -> int:
        return self._incarnations.get(rank, 0)

    def was_started(self, rank: int) -> bool:
        return rank in self._incarnations

    def is_well(self, rank: int) -> bool:
        """Whether its process lives and beats, as far as can be told now; its end is reported a moment later."""
        process = self._processes.get(rank)
        return process is not None and not process.ended_at and time.monotonic() - process.last_beat < SILENT_SECONDS

    @property
    def is_dying(self) -> bool:
        return any(process.ended_at for process in self._processes.values())

    # ------------------------------------------------------------ starts

    def spawn(self, rank: int) -> None:
        """Begin a start; ``take_started`` tells how it ended. Raises where the sockets can't be made."""
        incarnation = self._incarnations[rank] = self._incarnations.get(rank, -1) + 1
        self._sockets.open(rank, incarnation)
        self._awaited[rank] = incarnation
        self._starter.start(self._make_spec(rank, incarnation))

    def take_started(self) -> list[StartFailed]:
        """Take over the processes that have started since; the starts that failed are returned."""
        failed = []
        for started in self._starter.ended():
            wanted = self._awaited.get(started.rank) == started.incarnation
            if wanted:
                del self._awaited[started.rank]
            if started.handle is None:
                if wanted:
                    self._sockets.close_rank(started.rank)
                    failed.append(StartFailed(started.rank, started.reason))
            elif wanted:
                self._processes[started.rank] = Process(started.handle, started.incarnation, time.monotonic())
                self._poller.register(started.handle.fileno(), zmq.POLLIN)
            else:
                started.handle.kill()
                started.handle.close()
        return failed

    def tend(self) -> None:
        self._starter.tend()

    # ------------------------------------------------------------ ends

    def kill(self, rank: int, reason: str) -> None:
        """Nothing that it still says counts."""
        self.down_reasons[rank] = reason
        if self._awaited.pop(rank, None) is not None:
            self._sockets.close_rank(rank)
        if process := self._processes.pop(rank, None):
            logger.warning("rank %d is killed: %s", rank, reason)
            process.handle.kill()
            self._let_go(rank, process)

    def note_ended(self, ready: dict[int, int]) -> None:
        """Mark the processes whose descriptors are in ``ready``."""
        for process in self._processes.values():
            if ready and process.ended_at is None and process.handle.fileno() in ready:
                process.ended_at = time.monotonic()
                self._poller.unregister(process.handle.fileno())

    def bury(self, now: float) -> Iterator[tuple[int, str]]:
        """Ranks whose process has ended, and whose last words have arrived, with the reason."""
        for rank, process in list(self._processes.items()):
            if process.ended_at is not None and now - process.ended_at >= LAST_WORDS_SECONDS:
                del self._processes[rank]
                reason = process.failure or f"its process ended without a word ({process.handle.ending()})"
                self._let_go(rank, process)
                yield rank, reason

    def kill_the_silent(self, now: float, usual: float) -> None:
        """A worker's main thread beats, so one that is stopped, or whose main thread hangs, is silent."""
        for process in self._processes.values():
            limit = usual if process.heartbeat else FIRST_HEARTBEAT_TIMEOUT
            if now - process.last_beat > limit:
                process.failure = f"no heartbeat for {limit:g} s: it is stopped or its main thread hangs"
                process.handle.kill()  # its end is noticed like any other
                process.last_beat = now

    def end(self, seconds: float) -> None:
        """Wait for the ends of all, ``seconds`` at most, and kill what is left."""
        until = time.monotonic() + seconds
        self._starter.close(0.0)
        for process in self._processes.values():
            await_end(process.handle, until - time.monotonic())
            process.handle.kill()
            process.handle.close()
        self._processes.clear()
        self._starter.close(max(0.0, until - time.monotonic()))

    def ranks(self) -> list[int]:
        return list(self._processes)

    def _let_go(self, rank: int, process: Process) -> None:
        if process.ended_at is None:
            self._poller.unregister(process.handle.fileno())
        process.handle.close()
        self._sockets.close_rank(rank)
