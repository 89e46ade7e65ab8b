"""A picture of the engine at one moment, for /ready, /v1/topology and people."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ditrelay.runtime.messages import Heartbeat
from ditrelay.runtime.meters import Readings
from ditrelay.runtime.scheduler import EdgeSnapshot, UnitSnapshot
from ditrelay.runtime.topology import Role

ROLES: tuple[Role, ...] = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class WorkerStatus:
    """One rank.

    Attributes:
        role: its roles' name; ``roles`` are the roles one by one.
        replica: number of the DiT replica that it is part of, ``None`` for a rank that does not denoise.
        state: ``failed`` is a rank that was given up: it died too often and is not started again.
        restarts: how often its process was replaced.
        reason: why it is down or failed.
        memory: its last heartbeat (bytes).
    """

    rank: int
    role: str
    state: Literal["starting", "up", "down", "failed"]
    pid: int | None = None
    restarts: int = 0
    reason: str = ""
    memory: Heartbeat | None = None
    roles: tuple[Role, ...] = ()
    replica: int | None = None


@dataclass(frozen=True)
class EngineStatus:
    """``ready``: every rank is up, every edge open, and the warm-up done. The counts are of requests since the start.

    Attributes:
        edges: every directed edge between two units.
        units: every unit: its requests in counts.
        lost_roles: roles that no rank can ever compute again, with the reason.
        retry_after: seconds after which a client that is turned away should come back, by the measured rate.
        readings: counts and histograms since the start.
    """

    ready: bool
    workers: tuple[WorkerStatus, ...]
    queued: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    edges: tuple[EdgeSnapshot, ...] = ()
    units: tuple[UnitSnapshot, ...] = ()
    lost_roles: tuple[tuple[Role, str], ...] = ()
    retry_after: int = 1
    readings: Readings = field(default_factory=Readings)

    def with_ready(self, ready: bool) -> EngineStatus:
        return replace(self, ready=ready)


def lost_roles(units: tuple[UnitSnapshot, ...]) -> tuple[tuple[Role, str], ...]:
    """Roles all of whose units were given up, each with the reason of the last one."""
    lost = []
    for role in ROLES:
        able = [unit for unit in units if role in unit.unit.roles]
        if able and all(unit.state == "failed" for unit in able):
            lost.append((role, able[-1].reason or "its ranks died too often"))
    return tuple(lost)
