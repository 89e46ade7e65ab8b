"""Whose fault a broken edge is: a transfer that breaks because its peer dies is no fault of its request."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from msgspec import structs

from ditrelay.runtime.messages import EdgeFailed

# A dying process closes its sockets before its end can be seen, and the survivor's word of it is quick.
HOLD_SECONDS = 0.15


class EdgeFaults:
    """Holds every ``EdgeFailed`` back for a moment, so that the end of a process is told before what came of it.

    Args:
        is_well: whether a rank's process lives and beats, as far as can be told.
    """

    def __init__(self, is_well: Callable[[int], bool]) -> None:
        self._is_well = is_well
        self._held: deque[tuple[float, EdgeFailed]] = deque()

    def __bool__(self) -> bool:
        """Whether any is held."""
        return bool(self._held)

    def hold(self, event: EdgeFailed, now: float) -> None:
        self._held.append((now + HOLD_SECONDS, event))

    def due(self, now: float) -> Iterator[EdgeFailed]:
        """Those whose moment is over; they name a request only where both ends are well."""
        while self._held and self._held[0][0] <= now:
            event = self._held.popleft()[1]
            well = self._is_well(event.src) and self._is_well(event.dst)
            yield event if well else structs.replace(event, request_id=None)
