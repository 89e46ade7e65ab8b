"""What every rank does at the moment: told to whoever watches, as it begins, comes further and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ditrelay.runtime.messages import Dropped, StageFailed, Started, StepDone, WorkerEvent
from ditrelay.runtime.metrics import Span
from ditrelay.runtime.request import RequestState

logger = logging.getLogger(__name__)

ActivityKind = Literal["encode", "send", "receive", "denoise", "decode"]

_KINDS: tuple[str, ...] = get_args(ActivityKind)
_STATES: dict[ActivityKind, RequestState] = {
    "encode": RequestState.ENCODING,
    "denoise": RequestState.DENOISING,
    "decode": RequestState.DECODING,
}
_REMEMBERED = 256
_UNREAD = 2000


@dataclass(frozen=True, slots=True)
class Activity:
    """One piece of work of one rank, as far as it has come. Times are ``time.monotonic()`` seconds.

    A stage is told when it begins, a denoise after each step, and both when they end; a transfer when it has ended.

    Attributes:
        rank: the unit's leader.
        ended: ``None`` while it is under way. What a lost rank or a cancel has cut short ends too.
        step, total_steps: steps that a denoise has done; 0 for all else.
    """

    rank: int
    kind: ActivityKind
    request_id: str
    began: float
    ended: float | None = None
    step: int = 0
    total_steps: int = 0

    @property
    def key(self) -> tuple[int, ActivityKind, str, float]:
        """Equal for all that is told of one piece of work."""
        return self.rank, self.kind, self.request_id, self.began


Watcher = Callable[[Activity], None]


class ActivityFeed:
    """``watch`` is for any thread; all else is called by the controller's thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards the three below; a watcher may stop itself while it is told
        self._watchers: list[Watcher] = []
        self._open: dict[str, dict[tuple[int, ActivityKind], Activity]] = {}  # by request
        self._recent: deque[Activity] = deque(maxlen=_REMEMBERED)

    def watch(self, callback: Watcher) -> Callable[[], None]:
        """Call ``callback`` with what ended of late, what is under way, and then with all that happens.

        It is called with a lock held and the engine waits for it: it must be quick. One that raises is told nothing
        more. Returns what ends it.
        """

        def stop() -> None:
            with self._lock:
                self._watchers = [each for each in self._watchers if each is not callback]

        with self._lock:
            for activity in self._recent:
                callback(activity)
            for lanes in self._open.values():
                for activity in lanes.values():
                    callback(activity)
            self._watchers.append(callback)
        return stop

    def observe(self, event: WorkerEvent, now: float) -> None:
        match event:
            case Started(rank=rank, request_id=request_id, stage=stage, at=at):
                self._begin(Activity(rank, stage, request_id, at))
            case StepDone():
                self._step(event)
            case StageFailed(rank=rank, request_id=request_id, stage=stage, at=at):
                self._end(request_id, at, rank, stage)
            case Dropped(rank=rank, request_id=request_id):
                for lane in self._lanes(request_id):
                    if lane[0] == rank:
                        self._end(request_id, now, *lane)
            case _:
                pass

    def done(self, span: Span) -> None:
        """A piece of work is complete, and its moments are known."""
        if span.kind not in _KINDS:
            return
        kind: ActivityKind = span.kind  # type: ignore[assignment]  # checked above
        steps = len(span.steps)
        with self._lock:
            self._take(span.request_id, (span.rank, kind))
            self._tell_end(Activity(span.rank, kind, span.request_id, span.began, span.ended, steps, steps))

    def moved(self, request_id: str, state: RequestState, at: float) -> None:
        """A stage that its request is no longer in has been cut short (its rank was lost)."""
        for rank, kind in self._lanes(request_id):
            if _STATES[kind] is not state:
                self._end(request_id, at, rank, kind)

    def finished(self, request_id: str, at: float) -> None:
        """The request has ended."""
        for rank, kind in self._lanes(request_id):
            self._end(request_id, at, rank, kind)

    # ------------------------------------------------------------ inside

    def _begin(self, activity: Activity) -> None:
        with self._lock:
            self._open.setdefault(activity.request_id, {})[activity.rank, activity.kind] = activity
            self._tell(activity)

    def _step(self, event: StepDone) -> None:
        lanes = self._open.get(event.request_id, {})
        if activity := lanes.get((event.rank, "denoise")):
            self._begin(replace(activity, step=event.step, total_steps=event.total))

    def _end(self, request_id: str, at: float, rank: int, kind: ActivityKind) -> None:
        with self._lock:
            if activity := self._take(request_id, (rank, kind)):
                self._tell_end(replace(activity, ended=max(at, activity.began)))

    def _lanes(self, request_id: str) -> list[tuple[int, ActivityKind]]:
        return list(self._open.get(request_id, ()))

    def _take(self, request_id: str, lane: tuple[int, ActivityKind]) -> Activity | None:
        lanes = self._open.get(request_id)
        activity = lanes.pop(lane, None) if lanes else None
        if lanes is not None and not lanes:
            del self._open[request_id]
        return activity

    def _tell_end(self, activity: Activity) -> None:
        self._recent.append(activity)
        self._tell(activity)

    def _tell(self, activity: Activity) -> None:
        for watcher in list(self._watchers):
            try:
                watcher(activity)
            except BaseException:  # a client's own, SystemExit too: the engine and its other clients' requests go on
                logger.exception("a watcher of the ranks raised; it is told nothing more")
                self._watchers = [each for each in self._watchers if each is not watcher]


async def follow(watch: Callable[[Watcher], Callable[[], None]]) -> AsyncGenerator[Activity, None]:
    """What ``watch`` (``ActivityFeed.watch``) tells, for asyncio, without an end.

    A slow reader holds nothing back: of a piece of work it gets the newest only, and past ``_UNREAD`` pieces the
    oldest are lost to it.
    """
    loop, news, changed = asyncio.get_running_loop(), Newest(_UNREAD), asyncio.Event()

    def relay(activity: Activity) -> None:
        # Waking the loop is what costs: once is enough for all that comes before it has looked.
        if news.put(activity):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(changed.set)

    stop = watch(relay)
    try:
        while True:
            await changed.wait()
            changed.clear()
            for activity in news.take():
                yield activity
    finally:
        stop()


class Newest:
    """News that a reader has not taken yet, at most ``limit``: of one piece of work only the newest. For any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()  # guards what waits
        self._waiting: dict[tuple[int, ActivityKind, str, float], Activity] = {}

    def put(self, activity: Activity) -> bool:
        """Whether it is the only one: those before have been taken."""
        with self._lock:
            first = not self._waiting
            self._waiting.pop(activity.key, None)
            self._waiting[activity.key] = activity
            if len(self._waiting) > self._limit:
                del self._waiting[next(iter(self._waiting))]
            return first

    def take(self) -> list[Activity]:
        """All of them, in the order in which they came."""
        with self._lock:
            taken, self._waiting = list(self._waiting.values()), {}
            return taken
