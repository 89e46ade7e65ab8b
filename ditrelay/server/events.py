"""What happened to a job, as numbered events that any number of readers follow, each at its own pace."""

from __future__ import annotations

import asyncio
import secrets
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from operator import attrgetter

from ditrelay.server.job_schemas import (
    Cancelled,
    Completed,
    Decoding,
    Denoising,
    Encoding,
    Failed,
    JobEvent,
    Preview,
    Queued,
)

_NAMES: dict[type[JobEvent], str] = {
    Queued: "queued",
    Encoding: "encoding",
    Denoising: "denoising",
    Preview: "preview",
    Decoding: "decoding",
    Completed: "completed",
    Failed: "failed",
    Cancelled: "cancelled",
}
_LAST = Completed | Failed | Cancelled
_KEPT_EVENTS = 5000  # a bound, not a usual number: the most steps that a model takes are 1,000


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """One event. ``number`` counts from 1."""

    number: int
    data: JobEvent

    @property
    def name(self) -> str:
        return _NAMES[type(self.data)]


@dataclass
class EventLog:
    """The events of one job, all of them but for old previews. Belongs to the event loop's thread.

    Readers take from the log when they are ready for more: a slow one holds nothing back and needs no queue. Of the
    previews only the newest is kept, and none once the job has ended.

    Attributes:
        mark: tells this log from all others, also from one of the same job in an earlier life of the server.
        readers: how many follow it now.
        ended_at: when its last event came, by ``clock``.
    """

    clock: Callable[[], float] = time.monotonic
    mark: str = field(default_factory=lambda: secrets.token_hex(4))
    readers: int = 0
    ended_at: float | None = None
    _events: list[LoggedEvent] = field(default_factory=list)
    _number: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ended(self) -> bool:
        return self.ended_at is not None

    @property
    def last(self) -> JobEvent | None:
        """What happened last, previews aside."""
        return next((each.data for each in reversed(self._events) if not isinstance(each.data, Preview)), None)

    def add(self, event: JobEvent) -> None:
        """Tell an event; after the last one nothing more is told."""
        if self.ended:
            return
        if isinstance(event, Preview | _LAST):
            self._events = [each for each in self._events if not isinstance(each.data, Preview)]
        self._number += 1
        self._events.append(LoggedEvent(self._number, event))
        del self._events[:-_KEPT_EVENTS]
        if isinstance(event, _LAST):
            self.ended_at = self.clock()
        news, self._news = self._news, asyncio.Event()
        news.set()

    def id_of(self, event: LoggedEvent) -> str:
        return f"{self.mark}-{event.number}"

    def number_of(self, event_id: str | None) -> int:
        """The number of the event with that id; 0 for an id that is not of this log."""
        mark, _, number = (event_id or "").partition("-")
        if mark != self.mark or not (number.isascii() and number.isdecimal()) or len(number) > 9:
            return 0
        return int(number) if int(number) <= self._number else 0

    def is_over_after(self, number: int) -> bool:
        """Whether nothing follows event ``number``, ever."""
        return self.ended and number >= self._number

    async def read(self, after: int) -> AsyncIterator[LoggedEvent]:
        """The events behind event ``after``: those there are, then each as it comes, up to the job's end."""
        self.readers += 1
        try:
            while not self.is_over_after(after):
                news = self._news
                following = bisect_right(self._events, after, key=attrgetter("number"))
                if following == len(self._events):
                    await news.wait()
                    continue
                event = self._events[following]
                after = event.number
                yield event
        finally:
            self.readers -= 1


class EventLogs:
    """The logs of many jobs, by id: those that ended of late, and those that have not.

    Args:
        lifetime: seconds that the log of an ended job is kept.
        limit: logs kept at most; those that are followed are kept all the same.
        clock: seconds that only grow.
    """

    def __init__(
        self, *, lifetime: float = 600.0, limit: int = 1000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifetime = lifetime
        self._limit = limit
        self._clock = clock
        self._logs: dict[str, EventLog] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._logs)

    def open(self, job_id: str) -> EventLog:
        """The job's log, a new one where there is none."""
        if job_id not in self._logs:
            self._drop_old()
            self._logs[job_id] = EventLog(self._clock)
        return self._logs[job_id]

    def followed(self) -> list[tuple[str, EventLog]]:
        """Those that have readers, with their jobs' ids."""
        return [(job_id, log) for job_id, log in self._logs.items() if log.readers]

    def _drop_old(self) -> None:
        oldest = self._clock() - self._lifetime
        surplus = len(self._logs) + 1 - self._limit
        for job_id, log in list(self._logs.items()):
            expired = log.ended_at is not None and log.ended_at <= oldest
            if not log.readers and (expired or surplus > 0):
                del self._logs[job_id]
                surplus -= 1
