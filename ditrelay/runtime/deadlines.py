"""When ``--request-timeout`` is over for each live request."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass

from ditrelay.runtime.messages import CancelRequest, Started, WorkerEvent
from ditrelay.runtime.request import Request, RequestState

_COMPUTED = (RequestState.ENCODING, RequestState.DENOISING, RequestState.DECODING)
_OLD_ENTRIES = 100  # what the heap may hold of requests that have ended, before it is made anew

OnState = Callable[[str, RequestState], None]


@dataclass
class _Clock:
    """``left`` seconds at ``since``; a clock without ``since`` stands. ``turn`` counts how often it was started."""

    left: float
    patient: bool
    since: float | None = None
    turn: int = 0


class Deadlines:
    """The clocks of the live requests. Belongs to the controller's thread.

    The clock of a request that somebody waits for runs from its submission. That of a patient one, which waits as long
    as it takes, runs only while a stage computes it: neither in a queue nor at a rank that is busy with another.

    Args:
        seconds: that each request has.
        clock: seconds that only grow.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._clocks: dict[str, _Clock] = {}
        self._due: list[tuple[float, str, int]] = []  # a heap: when, which request, in which turn

    def submitted(self, request: Request) -> None:
        clock = self._clocks[request.request_id] = _Clock(self._seconds, request.patient)
        if not request.patient:
            self._run(request.request_id, clock)

    def observe(self, event: WorkerEvent) -> None:
        """A stage that begins is the moment from which a patient request's clock runs."""
        if isinstance(event, Started):
            clock = self._clocks.get(event.request_id)
            if clock is not None and clock.since is None:
                self._run(event.request_id, clock)

    def before(self, then: OnState) -> OnState:
        """``then``, which is told of a request's state once its clock has been."""

        def moved(request_id: str, state: RequestState) -> None:
            clock = self._clocks.get(request_id)
            if clock is not None and clock.patient and clock.since is not None and state not in _COMPUTED:
                clock.left -= self._clock() - clock.since
                clock.since = None
            then(request_id, state)

        return moved

    def ended(self, request_id: str) -> None:
        self._clocks.pop(request_id, None)
        if len(self._due) > 2 * len(self._clocks) + _OLD_ENTRIES:
            self._due = [each for each in self._due if (clock := self._clocks.get(each[1])) and clock.turn == each[2]]
            heapq.heapify(self._due)

    def due(self) -> list[CancelRequest]:
        """The ends of the requests whose time is over, each told once."""
        now, over = self._clock(), []
        reason = f"not done within --request-timeout {self._seconds:g} s"
        while self._due and self._due[0][0] <= now:
            _, request_id, turn = heapq.heappop(self._due)
            clock = self._clocks.get(request_id)
            if clock is not None and clock.since is not None and clock.turn == turn:
                over.append(CancelRequest(request_id, reason))
        return over

    def _run(self, request_id: str, clock: _Clock) -> None:
        clock.since = self._clock()
        clock.turn += 1
        heapq.heappush(self._due, (clock.since + clock.left, request_id, clock.turn))
