"""An in-memory transport for tests: both ends in one process, and faults on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ditrelay.runtime.communication.device_events import DeviceEvent
from ditrelay.runtime.communication.endpoint import Endpoint, Job, LinkDown
from ditrelay.runtime.topology import Edge

_READY_PAUSE = 1e-3

FaultKind = Literal["delay", "drop", "reorder", "corrupt", "hang"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one transfer.

    ``delay``: arrives ``seconds`` late. ``drop``: the sender believes it was sent, it never arrives. ``reorder``:
    arrives only after the edge's next one. ``corrupt``: one byte is flipped on the way. ``hang``: the sender stands
    still.
    """

    kind: FaultKind
    seconds: float = 0.0


class FaultPlan:
    """Faults by edge and sequence number; each happens once."""

    def __init__(self) -> None:
        self._faults: dict[tuple[Edge, int], Fault] = {}

    def add(self, edge: Edge, seq: int, kind: FaultKind, *, seconds: float = 0.0) -> None:
        self._faults[edge, seq] = Fault(kind, seconds)

    def take(self, edge: Edge, seq: int) -> Fault | None:
        return self._faults.pop((edge, seq), None)


class LocalNetwork:
    """Joins the ends that name the same edge and generation."""

    def __init__(self, faults: FaultPlan | None = None) -> None:
        self._faults = faults or FaultPlan()
        self._lock = threading.Lock()
        self._wires: dict[tuple[Edge, int], _Wire] = {}

    def connect(self, edge: Edge, generation: int, rank: int, *, timeout: float = 10.0) -> Endpoint:
        """One end of an edge. Does not wait for the other end: a transfer does. ``timeout`` bounds each transfer."""
        with self._lock:
            wire = self._wires.setdefault((edge, generation), _Wire(edge, self._faults))
        return Endpoint(edge, rank, _LocalLink(wire, sends=rank == edge.src), timeout)


@dataclass
class _Parcel:
    views: Sequence[torch.Tensor]
    due: float
    taken: bool = False


@dataclass
class _Wire:
    """What both ends of an edge share. ``changed`` guards the rest."""

    edge: Edge
    faults: FaultPlan
    changed: threading.Condition = field(default_factory=threading.Condition)
    parcels: dict[int, _Parcel] = field(default_factory=dict)
    overtaken: dict[int, _Parcel] = field(default_factory=dict)
    closed: bool = False


class _LocalLink:
    """One end of a wire."""

    def __init__(self, wire: _Wire, *, sends: bool) -> None:
        self._wire = wire
        self._sends = sends

    def mark(self) -> None:
        return None

    def move(self, job: Job, deadline: float) -> None:
        with self._wire.changed:
            if self._sends:
                self._send(job, deadline)
            else:
                self._receive(job, deadline)

    def interrupt(self) -> None:
        with self._wire.changed:
            self._wire.closed = True
            self._wire.changed.notify_all()

    def disconnect(self) -> None:
        self.interrupt()

    def _send(self, job: Job, deadline: float) -> None:
        ready: DeviceEvent | None = job.ready
        while ready is not None and not ready.query():
            self._sleep(time.monotonic() + _READY_PAUSE, deadline)
        seq = job.work.seq
        parcel = _Parcel(job.views, time.monotonic())
        fault = self._wire.faults.take(self._wire.edge, seq)
        match fault.kind if fault else None:
            case "drop":
                return
            case "reorder":
                self._wire.overtaken[seq] = _Parcel([view.clone() for view in job.views], parcel.due)
                return
            case "hang":
                self._wait(parcel, deadline)
            case "corrupt":
                parcel.views = _corrupted(job.views)
            case "delay":
                assert fault is not None
                parcel.due += fault.seconds
        self._wire.parcels[seq] = parcel
        self._wire.parcels |= self._wire.overtaken
        self._wire.overtaken.clear()
        self._wire.changed.notify_all()
        self._wait(parcel, deadline)

    def _wait(self, parcel: _Parcel, deadline: float) -> None:
        """Like gloo, a send is complete when the receiver has it."""
        while not parcel.taken:
            self._sleep(deadline, deadline)

    def _receive(self, job: Job, deadline: float) -> None:
        seq = job.work.seq
        while (parcel := self._wire.parcels.get(seq)) is None or parcel.due > time.monotonic():
            self._sleep(deadline if parcel is None else parcel.due, deadline)
        sent, room = ([view.numel() for view in views] for views in (parcel.views, job.views))
        if sent != room:
            raise LinkDown(f"{sent} bytes were sent, the receiver expects {room}")
        for source, target in zip(parcel.views, job.views, strict=True):
            target.copy_(source)
        del self._wire.parcels[seq]
        parcel.taken = True
        self._wire.changed.notify_all()

    def _sleep(self, until: float, deadline: float) -> None:
        """Until something changes or ``until``; never past the deadline or the end of the wire."""
        if self._wire.closed:
            raise LinkDown("the other end closed the edge")
        now = time.monotonic()
        if now >= deadline:
            raise LinkDown("the deadline passed", timed_out=True)
        self._wire.changed.wait(min(until, deadline) - now)


def _corrupted(views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    copies = [view.clone() for view in views]
    if copies:
        copies[0][0] ^= 0xFF
    return copies
