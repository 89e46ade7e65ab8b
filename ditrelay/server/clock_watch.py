"""Whether the computer's clock can be believed."""

from __future__ import annotations

import time
from collections.abc import Callable

_LEAP_SECONDS = 600.0
_GRACE_SECONDS = 24 * 3600.0


def _awake_or_not() -> float:
    """Seconds that nobody can set, those of sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class ClockWatch:
    """Notices when the clock is set ahead while the server runs: all that is kept for a time would seem old at once.

    Args:
        wall: Unix time in seconds.
        steady: seconds of a clock that cannot be set.
        last: Unix time at which the last server was at work; a gap of more than a day counts as such a leap.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = _awake_or_not,
        last: float | None = None,
    ) -> None:
        self._wall, self._steady = wall, steady
        self._ahead = wall() - steady()
        self._leapt = steady() if last is not None and wall() - last > _GRACE_SECONDS else None

    def leap(self) -> float:
        """Seconds by which the clock was set ahead since the last call; 0 for small steps and steps back."""
        before, self._ahead = self._ahead, self._wall() - self._steady()
        if self._ahead - before < _LEAP_SECONDS:
            return 0.0
        self._leapt = self._steady()
        return self._ahead - before

    @property
    def suspect(self) -> bool:
        """Whether that was within the last day, in which somebody can set it right."""
        return self._leapt is not None and self._steady() - self._leapt < _GRACE_SECONDS
