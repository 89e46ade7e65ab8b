"""The head's own events about the starts of processes; never on the wire."""

from __future__ import annotations

import msgspec


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The process of ``rank`` could not be started, as where the machine has no room for one."""

    rank: int
    reason: str


class Restart(msgspec.Struct, frozen=True, tag=True):
    """Somebody wants a new process for ``rank``, at once and whatever became of those before."""

    rank: int
