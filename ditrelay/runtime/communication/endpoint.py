"""One end of an edge: a queue of transfers and the thread that carries them out over a ``Link``.

Everything that transports have in common is here (order, deadlines, failure, closing); a link only moves bytes.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ditrelay.errors import TransferError, TransferTimeout
from ditrelay.runtime.communication.codec import wire_view
from ditrelay.runtime.communication.transport import Early, Work
from ditrelay.runtime.topology import Edge

# How long close() waits for an idle edge's thread to let go of its connection.
_CLOSE_GRACE = 1.0
_PROOF = 0xA5


class LinkDown(Exception):
    """A link can not move bytes any more; ``timed_out`` where the deadline passed."""

    def __init__(self, reason: str, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


@dataclass(frozen=True)
class Job:
    """One payload to move: the bytes of its non-empty tensors as flat uint8 views.

    ``ready`` is the CUDA event after which the tensors may be touched (``None`` on a CPU). For ``wait`` seconds it may
    be that the sender's are not made yet; 0 where they are.
    """

    work: Work
    views: tuple[torch.Tensor, ...]
    ready: torch.cuda.Event | None = None
    wait: float = 0.0


class Link(Protocol):
    """The connection under one end of an edge."""

    def mark(self) -> torch.cuda.Event | None:
        """On the caller's thread: record when the tensors handed over now are ready."""
        ...

    def move(self, job: Job, deadline: float) -> None:
        """On the edge's thread: send or receive ``job`` and return when it is complete.

        Keeps the tensors alive for as long as the wire may touch them.

        Raises:
            LinkDown: the peer is gone, or ``deadline`` (``time.monotonic()``) passed. The link is of no use afterwards.
        """
        ...

    def interrupt(self) -> None:
        """From any thread: make a running ``move`` end soon, where the backend can."""
        ...

    def disconnect(self) -> None:
        """On the edge's thread, after the last ``move``: let go of the connection. May be called twice.

        After a ``move`` that failed it is called while the tensors are still held, since the backend may use them until
        then.
        """
        ...


class Endpoint:
    """A ``Transport`` over any link.

    Args:
        edge: the directed edge.
        rank: which end this is.
        link: moves the bytes; from here on used by the edge's thread only.
        timeout: seconds that one transfer may take (an early one: after its tensors are made). The first that takes
            longer fails it and all after it.
    """

    def __init__(self, edge: Edge, rank: int, link: Link, timeout: float) -> None:
        assert rank in edge, f"rank {rank} is no end of edge {edge}"
        self.edge = edge
        self._rank = rank
        self._link = link
        self._timeout = timeout
        # Guarded by _changed, as are all three below; the thread holds the job that it carries out beside _current.
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._current: Work | None = None
        self._down: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"edge {edge} at {rank}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        with self._changed:
            state = f"down: {self._down}" if self._down else f"{len(self._jobs)} waiting, current {self._current}"
        return f"<{type(self).__name__} {self.edge} at {self._rank}: {state}>"

    def prove(self, device: torch.device, generation: int) -> None:
        """Move one byte and look at it: what a backend makes at the first transfer, and would block there, is made now.

        Raises:
            TransferTimeout: the other end did not come.
            TransferError: the connection failed otherwise; this end is closed.
        """
        sends = self._rank == self.edge.src
        byte = torch.full((1,), _PROOF if sends else 0, dtype=torch.uint8, device=device)
        work = self.isend([byte], seq=0) if sends else self.irecv([byte], seq=0)
        try:
            work.wait(self._timeout)
            if byte.item() != _PROOF:
                raise TransferError(str(self.edge), "a byte arrived changed")
        except TransferError as error:
            self.close("it could not be set up")
            timed_out = isinstance(error, TransferTimeout)
            raise not_connected(self.edge, generation, error, timed_out=timed_out) from error

    def isend(
        self, tensors: Sequence[torch.Tensor], *, seq: int, request_id: str | None = None, early: Early | None = None
    ) -> Work:
        assert self._rank == self.edge.src, f"rank {self._rank} is the receiving end of edge {self.edge}"
        return self._submit(tensors, seq, request_id, early)

    def irecv(
        self, tensors: Sequence[torch.Tensor], *, seq: int, request_id: str | None = None, early: Early | None = None
    ) -> Work:
        assert self._rank == self.edge.dst, f"rank {self._rank} is the sending end of edge {self.edge}"
        return self._submit(tensors, seq, request_id, early)

    def close(self, reason: str) -> None:
        """See ``Transport.close``. A thread that its backend does not let go of is left behind with its tensors."""
        with self._changed:
            idle = self._current is None or self._current.done()
        self._shut(reason)
        self._link.interrupt()
        if idle and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_GRACE)

    def _submit(self, tensors: Sequence[torch.Tensor], seq: int, request_id: str | None, early: Early | None) -> Work:
        work = Work(self.edge, seq, request_id)
        views = tuple(wire_view(tensor) for tensor in tensors if tensor.numel())
        ready = early.ready if early is not None and early.ready is not None else self._link.mark()
        job = Job(work, views, ready, early.seconds if early is not None else 0.0)
        with self._changed:
            down = self._down
            if down is None:
                self._jobs.append(job)
                self._changed.notify_all()
        if down is not None:
            work.finish(_failure(work, f"the edge is down: {down}"))
        return work

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._carry_out(job)
                del job  # the next wait must not keep this one's tensors alive
        finally:
            self._shut("its thread ended")
            self._link.disconnect()

    def _next(self) -> Job | None:
        """The next transfer; ``None`` once the edge is down."""
        with self._changed:
            self._current = None
            self._changed.wait_for(lambda: self._jobs or self._down is not None)
            if self._down is not None:
                return None
            job = self._jobs.popleft()
            self._current = job.work
            return job

    def _carry_out(self, job: Job) -> None:
        try:
            self._link.move(job, time.monotonic() + job.wait + self._timeout)
        except LinkDown as error:
            self._link.disconnect()
            limits = f"{self._timeout:g} s (--dist-timeout)"
            if job.wait:
                limits = f"{job.wait:g} s (--stage-timeout) for its stage and {limits}"
            reason = f"not complete within {limits}" if error.timed_out else str(error)
            job.work.finish(_failure(job.work, reason, timed_out=error.timed_out))
            self._shut(reason)
        else:
            job.work.finish()

    def _shut(self, reason: str) -> None:
        """Take no more transfers and fail those that are here. Only the first reason counts."""
        with self._changed:
            if self._down is not None:
                return
            self._down = reason
            orphans = [job.work for job in self._jobs]
            if self._current is not None:
                orphans.insert(0, self._current)
            self._jobs.clear()
            self._changed.notify_all()
        for work in orphans:
            work.finish(_failure(work, f"the edge is down: {reason}"))


def essence(error: Exception) -> str:
    """What went wrong, without torch's source position before it and its advice and C++ stack trace behind."""
    line = re.sub(r"^\[\S+:\d+\] ", "", str(error).partition("\n")[0])
    return line.partition(". This is typically")[0]


def not_connected(edge: Edge, generation: int, error: Exception, *, timed_out: bool) -> TransferError:
    """The error of an edge that could not be made, with the reason that ``error`` gives."""
    kind = TransferTimeout if timed_out else TransferError
    reason = f"the edge (generation {generation}) could not be set up (--dist-timeout): {essence(error)}"
    return kind(str(edge), reason)


def _failure(work: Work, reason: str, *, timed_out: bool = False) -> TransferError:
    kind = TransferTimeout if timed_out else TransferError
    return kind(str(work.edge), reason, seq=work.seq, request_id=work.request_id)
