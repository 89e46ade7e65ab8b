"""File descriptors: how many this process may have, and how many of them are for what."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable

from ditrelay.errors import ConfigError

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What the system says where a socket or a file can't be had for want of descriptors or of memory."""

# More would only cost: some programs that a process starts close every descriptor that it might have.
_MOST = 1 << 20

# Counted at a running server: 27, and 10 for each rank. One that is replaced needs some of them twice.
_OF_PROCESS, _OF_RANK = 64, 16


def raise_limit() -> int:
    """Raise the soft limit on descriptors to the hard one, as far as that is of use, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return _MOST if soft == resource.RLIM_INFINITY else soft


def left_over(limit: int, ranks: int, *, at_least: int = 0) -> int:
    """Of ``limit`` descriptors, those that a server with so many ranks does not need for itself.

    Raises:
        ConfigError: they are fewer than ``at_least``.
    """
    needed = _OF_PROCESS + _OF_RANK * ranks
    if limit - needed < at_least:
        reason = (
            f"{limit} file descriptors are too few for {ranks} rank{'s' if ranks > 1 else ''}; allowed: at least "
            f"{needed + at_least} (ulimit -n {needed + at_least}, LimitNOFILE= of systemd, --ulimit nofile= of docker)"
        )
        raise ConfigError("ulimit -n", reason)
    return limit - needed


class Spares:
    """Descriptors that are held for the time when there are no others.

    Args:
        count: how many.
        open_one: opens one; for tests.
    """

    def __init__(self, count: int, open_one: Callable[[], int] | None = None) -> None:
        self._count = count
        self._open_one = open_one or (lambda: os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        self._held: list[int] = []
        self.refill()

    def refill(self) -> None:
        """Take back what was given, as far as there is anything to have."""
        with contextlib.suppress(OSError):
            while len(self._held) < self._count:
                self._held.append(self._open_one())

    def give(self) -> bool:
        """Whether there was one: then the next that is opened gets it."""
        if not self._held:
            return False
        os.close(self._held.pop())
        return True

    def give_all(self) -> None:
        while self.give():
            pass

    def close(self) -> None:
        self._count = 0
        self.give_all()
