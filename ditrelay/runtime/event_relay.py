"""A request's events on their way from the engine's thread to an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from ditrelay.runtime.tickets import Progress

PAUSE_SECONDS = 0.03  # soon enough for people; each wake of the loop takes the interpreter from the engine's thread


class EventRelay:
    """Wakes the loop for the first event and for the end at once, in between at most once in ``PAUSE_SECONDS``.

    Args:
        loop: where ``news`` is read.

    Attributes:
        news: the events, in order.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.news: asyncio.Queue[Progress] = asyncio.Queue()
        self._loop = loop
        self._waiting: deque[Progress] = deque()
        self._resting = False

    def put(self, progress: Progress) -> None:
        """Called by the engine's thread."""
        self._waiting.append(progress)
        if progress.state.ended or not self._resting:
            self._resting = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._pass_on)

    def _pass_on(self) -> None:
        while self._waiting:
            self.news.put_nowait(self._waiting.popleft())
        self._loop.call_later(PAUSE_SECONDS, self._wake)

    def _wake(self) -> None:
        self._resting = False  # first: what comes from now on wakes the loop itself
        if self._waiting and not self._resting:
            self._resting = True
            self._pass_on()
