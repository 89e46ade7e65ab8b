"""Notices that a loop stands still, whatever it hangs in."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback

logger = logging.getLogger(__name__)

STALL_SECONDS = 5.0
_LOOK_SECONDS = 0.5


class Watchdog:
    """A thread that looks whether a loop turns. All that waits for the loop is at most as old as its last turn.

    Args:
        what: the loop's name for messages.
        limit: seconds that one turn may take.
    """

    def __init__(self, what: str, limit: float = STALL_SECONDS) -> None:
        self._what = what
        self._limit = limit
        self._turned_at = time.monotonic()
        self._trouble = ""
        self._has_dumped = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self.turned()
        self._thread.start()

    def stop(self) -> None:
        self._end.set()

    def turned(self) -> None:
        """Called by the loop in each of its turns."""
        self._turned_at = time.monotonic()

    @property
    def trouble(self) -> str:
        """Why nothing goes on at the moment, or nothing."""
        return self._trouble

    def _run(self) -> None:
        slept_from = time.monotonic()
        while not self._end.wait(_LOOK_SECONDS):
            late = time.monotonic() - slept_from > 2 * _LOOK_SECONDS
            slept_from = time.monotonic()
            if not late:  # else the whole process was stopped, and the loop has not had its turn yet
                self.look(slept_from)

    def look(self, now: float) -> None:
        """Judge by the time ``now``; separate for tests."""
        age = now - self._turned_at
        if age <= self._limit:
            if self._trouble:
                logger.warning("%s goes on", self._what)
            self._trouble = ""
            return
        if not self._trouble:
            logger.error("%s has stood still for %.0f s%s", self._what, age, self._stacks())
        self._trouble = f"{self._what} has stood still for {age:.0f} s"

    def _stacks(self) -> str:
        """Of all threads, the first time only: the log must not fill up with them."""
        if self._has_dumped:
            return ""
        self._has_dumped = True
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"\nThread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
        ]
        return "; all threads:" + "".join(stacks)
