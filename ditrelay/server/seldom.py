"""Log lines for what may happen a thousand times a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class Seldom:
    """Logs a warning now, and once a minute at most while it goes on.

    Args:
        logger: where to.
        seconds: between two lines.
        clock: seconds that only grow.
    """

    def __init__(
        self, logger: logging.Logger, *, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._seconds = seconds
        self._clock = clock
        self._next = float("-inf")
        self._silent = 0

    def warn(self, message: str) -> None:
        """``message``, with how often it was left unsaid since the last line."""
        now = self._clock()
        if now < self._next:
            self._silent += 1
            return
        more = f" ({self._silent} times more in the last minute)" if self._silent else ""
        self._logger.warning("%s%s", message, more)
        self._silent, self._next = 0, now + self._seconds
