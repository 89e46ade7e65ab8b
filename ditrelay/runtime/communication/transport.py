"""What a transfer is to the rest of ditrelay: a ``Transport`` per end of an edge, a ``Work`` per payload on its way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ditrelay.errors import TransferError, TransferTimeout
from ditrelay.runtime.topology import Edge


@dataclass(frozen=True)
class Early:
    """A transfer is asked for before its tensors are made: within ``seconds`` they will be.

    Only then the transfer's own time counts. ``ready``, at the sender: the event that is complete when they are.
    """

    seconds: float
    ready: torch.cuda.Event | None = None


class Work:
    """One payload on its way over one end of an edge. Any thread may wait for it.

    Attributes:
        edge, seq, request_id: what is moved, as error messages name it.
        began: when the transfer was asked for (``time.monotonic()``).
        ended: when it was complete or failed; 0.0 before.
    """

    def __init__(self, edge: Edge, seq: int, request_id: str | None = None) -> None:
        self.edge = edge
        self.seq = seq
        self.request_id = request_id
        self.began = time.monotonic()
        self.ended = 0.0
        self._changed = threading.Condition()
        self._error: TransferError | None = None
        self._posted: torch.cuda.Event | None = None
        self._callbacks: list[Callable[[Work], None]] = []

    def __repr__(self) -> str:
        state = "failed" if self._error else "done" if self.done() else "under way"
        return f"<Work {self.edge} #{self.seq} {state}>"

    def done(self) -> bool:
        """True once the transfer is complete or failed: ``error`` tells which."""
        return self.ended > 0.0

    @property
    def error(self) -> TransferError | None:
        """Why the transfer failed; ``None`` while it is under way and after success."""
        return self._error

    def wait(self, timeout: float | None = None) -> None:
        """Block until the tensors are here (receive) or free to be reused (send).

        Without ``timeout`` the edge's own time-out bounds the wait, since it fails every work of an edge that stands.

        Raises:
            TransferTimeout: still under way after ``timeout`` seconds; the transfer goes on.
            TransferError: the transfer failed.
        """
        wait_all([self], timeout)

    def wait_done(self, timeout: float | None = None) -> bool:
        """Block until done, whether it went well or not; False if that takes longer than ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(self.done, timeout)

    def wait_stream(self, timeout: float | None = None) -> None:
        """Make the current CUDA stream wait for the tensors, not the CPU; on a CPU edge the same as ``wait``.

        The CPU waits only until the transfer is on the edge's own stream. What the compute stream makes of the tensors
        is worth nothing if the transfer fails afterwards: check ``error`` once the work is ``done``.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done() or self._posted is not None, timeout):
                raise _still_under_way(self, timeout)
        if self._error is not None:
            raise self._error
        if self._posted is not None:
            torch.cuda.current_stream().wait_event(self._posted)

    def add_done_callback(self, callback: Callable[[Work], None]) -> None:
        """Call ``callback(work)`` when done: on the edge's thread, or here and now where it is done already.

        It must be short and must not raise: the edge's next transfer waits for it.
        """
        with self._changed:
            if not self.done():
                self._callbacks.append(callback)
                return
        callback(self)

    def post(self, event: torch.cuda.Event) -> None:
        """For the edge's thread: ``event`` ends the transfer on the edge's own stream."""
        with self._changed:
            self._posted = event
            self._changed.notify_all()

    def finish(self, error: TransferError | None = None) -> None:
        """For the edge: the transfer is complete, or failed. Only the first call counts."""
        with self._changed:
            if self.done():
                return
            self._error = error
            self.ended = time.monotonic()
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            callback(self)


def wait_until_done(works: Iterable[Work], timeout: float | None = None) -> None:
    """Block until every work is done, whether it went well or not, ``timeout`` seconds at most.

    Raises:
        TransferTimeout: one is still under way; its transfer goes on and its tensors must be kept.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    for work in works:
        if not work.wait_done(None if deadline is None else deadline - time.monotonic()):
            raise _still_under_way(work, timeout)


def wait_all(works: Sequence[Work], timeout: float | None = None) -> None:
    """Block until every work is done, ``timeout`` seconds at most, so that afterwards no tensor is in use.

    Raises:
        TransferTimeout: one is still under way; its transfer goes on and its tensors must be kept.
        TransferError: all are done and at least one failed; the first one's error.
    """
    wait_until_done(works, timeout)
    for work in works:
        if work.error is not None:
            raise work.error


def _still_under_way(work: Work, timeout: float | None) -> TransferTimeout:
    reason = f"still under way after {timeout} s"
    return TransferTimeout(str(work.edge), reason, seq=work.seq, request_id=work.request_id)


class Transport(Protocol):
    """ONE END of ONE DIRECTED edge: the source's end sends, the destination's end receives.

    Transfers of an end are carried out in the order in which they were asked for, and the two ends must ask for them
    in the same order with the same ``seq``. Sizes are agreed beforehand (``PayloadHeader``).
    """

    @property
    def edge(self) -> Edge: ...

    def isend(
        self, tensors: Sequence[torch.Tensor], *, seq: int, request_id: str | None = None, early: Early | None = None
    ) -> Work:
        """Start to send contiguous tensors; returns at once. Nobody may write to them before the work is done.

        With ``early``, whoever makes them now is the one that may.
        """
        ...

    def irecv(
        self, tensors: Sequence[torch.Tensor], *, seq: int, request_id: str | None = None, early: Early | None = None
    ) -> Work:
        """Start to receive into contiguous tensors of the sender's sizes; returns at once."""
        ...

    def close(self, reason: str) -> None:
        """Fail everything under way, and everything asked for later, with ``reason``. Never hangs; may be repeated."""
        ...
