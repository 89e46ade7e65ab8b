"""A picture of the engine at one moment, for /ready, /health and people."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ditrelay.runtime.messages import Heartbeat


@dataclass(frozen=True)
class WorkerStatus:
    """One rank: ``state``, how often it was restarted, why it is down, and its last heartbeat (memory in bytes)."""

    rank: int
    role: str
    state: Literal["starting", "up", "down"]
    pid: int | None = None
    restarts: int = 0
    reason: str = ""
    memory: Heartbeat | None = None


@dataclass(frozen=True)
class EngineStatus:
    """``ready``: every rank is up, every edge open, and the warm-up done. The rest counts requests since the start."""

    ready: bool
    workers: tuple[WorkerStatus, ...]
    queued: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0

    def with_ready(self, ready: bool) -> EngineStatus:
        return replace(self, ready=ready)
