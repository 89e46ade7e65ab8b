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
        state: ``failed`` is a rank that was given up: it died too often and is started again only every few minutes.
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
        lost_roles: roles all of whose ranks were given up, with the reason.
        retry_after: seconds after which a client that is turned away should come back, by the measured rate.
        readings: counts and histograms since the start.
        trouble: what keeps the head itself from working, at the moment.
        failure: why the head's loop has ended for good, where it has.
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
    trouble: str = ""
    failure: str = ""

    def seen(self, *, ready: bool, trouble: str, failure: str) -> EngineStatus:
        """With what the loop itself can't tell: it may stand still, or have ended."""
        return replace(self, ready=ready, trouble=trouble, failure=failure)


def lost_roles(units: tuple[UnitSnapshot, ...]) -> tuple[tuple[Role, str], ...]:
    """Roles all of whose units were given up, each with the reason of the last one."""
    lost = []
    for role in ROLES:
        able = [unit for unit in units if role in unit.unit.roles]
        if able and all(_is_given_up(unit) for unit in able):
            lost.append((role, able[-1].reason or "its ranks died too often"))
    return tuple(lost)


def _is_given_up(unit: UnitSnapshot) -> bool:
    """Also while it is tried again: it is nobody's hope until it is up."""
    return unit.state == "failed" or (unit.state == "starting" and unit.given_up)
