"""Memory shared between two processes under an edge: the sender fills a slot, the receiver pulls from it.

The slot is exported once and used for every payload; it is made anew, larger, only where a payload does not fit. One is
enough, since an edge carries out one transfer at a time: the sender writes to it again only after the receiver's word
that its copy is complete. The receiver says so before it reports success, and the sender closes the channel before it
gives up a slot; so a copy that could have read something else always ends in an error.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from ditrelay.runtime.communication.device_events import DeviceEvent, wait_for_event
from ditrelay.runtime.communication.edge_channel import Channel, Ready, SlotHandle, Taken
from ditrelay.runtime.communication.endpoint import Job, LinkDown, essence

_ALIGNMENT = 512  # of each tensor in a slot; what torch's allocator gives
_SLOT_STEP = 2 << 20  # a slot's size is a multiple, so that it seldom has to grow


class Memory(Protocol):
    """Device memory that two processes share, seen from one of them. Used on the edge's thread, but for ``mark``."""

    def mark(self) -> torch.cuda.Event | None:
        """See ``Link.mark``."""
        ...

    def new_slot(self, nbytes: int) -> tuple[torch.Tensor, SlotHandle]:
        """``nbytes`` bytes that can be filled here and pulled from elsewhere for as long as the tensor lives."""
        ...

    def fill(self, job: Job, targets: Sequence[torch.Tensor]) -> DeviceEvent:
        """Start to copy ``job``'s tensors into parts of a slot, as soon as they are ready; does not wait for that."""
        ...

    def open(self, slot: SlotHandle) -> None:
        """Map another process's slot in place of the one before."""
        ...

    def pull(self, job: Job, offsets: Sequence[int]) -> DeviceEvent:
        """Start to copy ``job``'s tensors out of the open slot."""
        ...

    def close(self) -> None:
        """Unmap the open slot, if any. No copy starts after; one under way is waited for."""
        ...


class _IpcLink(ABC):
    """What both ends have in common. ``_memory`` raises ``RuntimeError`` where the device or its driver fails."""

    def __init__(self, channel: Channel, memory: Memory) -> None:
        self._channel = channel
        self._memory = memory
        self._interrupted = threading.Event()

    def mark(self) -> torch.cuda.Event | None:
        return self._memory.mark()

    def move(self, job: Job, deadline: float) -> None:
        if not job.views:
            return
        try:
            self._exchange(job, deadline)
        except RuntimeError as error:
            raise LinkDown(essence(error)) from error

    def interrupt(self) -> None:
        self._interrupted.set()
        self._channel.shut()

    @abstractmethod
    def _exchange(self, job: Job, deadline: float) -> None:
        """Move a job that has something to move."""


class SendingLink(_IpcLink):
    """The source's end."""

    _slot: torch.Tensor | None = None

    def disconnect(self) -> None:
        self._channel.close()  # first: see the module's docstring
        self._slot = None

    def _exchange(self, job: Job, deadline: float) -> None:
        sizes = tuple(view.numel() for view in job.views)
        offsets, nbytes = _layout(sizes)
        handle = self._make_room(nbytes)
        assert self._slot is not None
        parts = [self._slot[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
        # Where a stage still makes the tensors, the copy is queued behind it: one event tells the end of both.
        wait_for_event(self._memory.fill(job, parts), deadline, self._interrupted, behind_stage=job.wait > 0)
        self._channel.send(Ready(job.work.seq, sizes, handle), deadline)
        taken = self._channel.receive(Taken, deadline)
        if taken.seq != job.work.seq:
            raise LinkDown(f"the receiver took transfer #{taken.seq}")

    def _make_room(self, nbytes: int) -> SlotHandle | None:
        """A slot of ``nbytes`` at least; its handle where it is a new one."""
        if self._slot is not None and self._slot.numel() >= nbytes:
            return None
        self._slot = None  # nobody reads it any more; its memory may become part of the larger one
        self._slot, handle = self._memory.new_slot(-(-nbytes // _SLOT_STEP) * _SLOT_STEP)
        return handle


class ReceivingLink(_IpcLink):
    """The destination's end."""

    def disconnect(self) -> None:
        self._channel.close()
        self._memory.close()

    def _exchange(self, job: Job, deadline: float) -> None:
        ready = self._channel.expect(job, deadline)
        if ready.slot is not None:
            self._memory.open(ready.slot)
        wait_for_event(self._memory.pull(job, _layout(ready.sizes)[0]), deadline, self._interrupted)
        self._channel.send(Taken(job.work.seq), deadline)


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each tensor begins in a slot, and the bytes of all. Both ends compute the same."""
    ends = itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)
    offsets = [0, *ends]
    return offsets[:-1], offsets[-1]
