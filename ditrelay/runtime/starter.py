"""Starts processes on a thread of its own: a forkserver may import for seconds, and the head's loop must not wait."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ditrelay.runtime.descriptors import Spares
from ditrelay.runtime.launcher import Launcher, ProcessHandle
from ditrelay.runtime.processes import START_DESCRIPTORS
from ditrelay.runtime.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0


class Started(NamedTuple):
    """How a start ended: with a process, or with the reason why there is none."""

    rank: int
    incarnation: int
    handle: ProcessHandle | None
    reason: str = ""


class Starter:
    """Its thread exists from the start, and descriptors are in reserve: when a start needs them there may be none.

    Args:
        launcher: starts the processes.
        on_end: called by the thread when a start has ended; ``ended`` then has it.
    """

    def __init__(self, launcher: Launcher, on_end: Callable[[], None]) -> None:
        self._launcher = launcher
        self._on_end = on_end
        self._orders: queue.SimpleQueue[WorkerSpec | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Started] = queue.SimpleQueue()
        self._spares = Spares(START_DESCRIPTORS)
        self._is_closed = False
        self._renewals: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="starter", daemon=True)
        self._thread.start()

    def start(self, spec: WorkerSpec) -> None:
        self._orders.put(spec)

    def ended(self) -> Iterator[Started]:
        """The starts that have ended since the last call."""
        while not self._ended.empty():
            yield self._ended.get()

    def tend(self) -> None:
        """Look after what processes are started with. To be called often; does not wait."""
        if self._launcher.look_after() and self._renewals.empty():
            self._renewals.put(None)
            self._orders.put(None)

    def close(self, timeout: float) -> None:
        """Take no more orders. What is still started is killed; it is waited for, ``timeout`` seconds at most."""
        self._is_closed = True
        self._orders.put(None)
        self._thread.join(timeout)
        self._kill_unwanted()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._is_closed:
            spec = self._orders.get()
            self._spares.give_all()
            if spec is not None and not self._is_closed:
                self._ended.put(self._start(spec))
                self._on_end()
            elif not self._renewals.empty():
                self._renew()
            self._spares.refill()
        self._spares.close()
        self._kill_unwanted()

    def _start(self, spec: WorkerSpec) -> Started:
        try:
            return Started(spec.rank, spec.incarnation, self._launcher.start(spec))
        except Exception as error:  # whatever the machine lacks, the start has failed and is tried again
            logger.debug("rank %d could not be started", spec.rank, exc_info=True)
            return Started(spec.rank, spec.incarnation, None, str(error) or type(error).__name__)

    def _renew(self) -> None:
        try:
            self._launcher.renew()
        except Exception as error:  # noqa: BLE001 - as above; it is looked after again
            logger.warning("the forkserver could not be started: %s", error)
            time.sleep(RETRY_SECONDS)
        self._renewals.get()

    def _kill_unwanted(self) -> None:
        for started in self.ended():
            if started.handle is not None:
                started.handle.kill()
                started.handle.close()
