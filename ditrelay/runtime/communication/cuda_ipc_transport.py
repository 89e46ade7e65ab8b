"""Transfers between two GPUs of one host through CUDA IPC: the receiver pulls from the sender's memory.

The copy engines move the bytes, so no SM is held, and nothing waits on the GPU for the peer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from ditrelay.runtime.communication.cuda_driver import CudaDriver
from ditrelay.runtime.communication.device_events import DeviceEvent, record_event
from ditrelay.runtime.communication.edge_channel import SlotHandle, dial, listen
from ditrelay.runtime.communication.endpoint import Endpoint, Job, not_connected
from ditrelay.runtime.communication.ipc_link import ReceivingLink, SendingLink
from ditrelay.runtime.communication.store import edge_prefix
from ditrelay.runtime.topology import Edge


class CudaIpcTransport(Endpoint):
    """One end of an edge over CUDA IPC."""

    @classmethod
    def connect(
        cls,
        store: Store,
        edge: Edge,
        generation: int,
        rank: int,
        *,
        device: torch.device,
        timeout: float,
        run_dir: str | None = None,
    ) -> Self:
        """Make this rank's end; blocks until the other end is made too. Arguments and errors as ``TorchTransport``'s.

        ``run_dir``: the launch's folder, where the edge's socket is until both ends have met (``edge_channel.listen``).

        torch must take its memory with plain ``cudaMalloc``: expandable segments can not be exported.
        """
        deadline = time.monotonic() + timeout
        meeting = PrefixStore(edge_prefix(edge, generation), store)
        link: SendingLink | ReceivingLink
        try:
            memory = CudaMemory(device)
            if rank == edge.src:
                link = SendingLink(listen(meeting, timeout, run_dir), memory)
            else:
                link = ReceivingLink(dial(meeting, timeout), memory)
        except (RuntimeError, OSError) as error:
            raise not_connected(edge, generation, error, timed_out=time.monotonic() >= deadline) from error
        end = cls(edge, rank, link, timeout)
        end.prove(device, generation)
        return end


class CudaMemory:
    """``ipc_link.Memory`` of one GPU; copies run on a stream of its own.

    Slots come from torch's allocator, so its figures and its handling of a full card include them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._driver = CudaDriver(device)
        self._base: int | None = None
        self._slot_address = 0

    def mark(self) -> torch.cuda.Event:
        return record_event(torch.cuda.current_stream(self._device))

    def new_slot(self, nbytes: int) -> tuple[torch.Tensor, SlotHandle]:
        self._driver.bind()  # first: leaving ``stream``, torch would go back to the first GPU and make a context there
        with torch.cuda.stream(self._stream):
            slot = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        handle, offset = self._driver.export(slot.data_ptr())
        return slot, SlotHandle(handle, offset, nbytes)

    def fill(self, job: Job, targets: Sequence[torch.Tensor]) -> DeviceEvent:
        with torch.cuda.stream(self._stream):
            self._begin(job)
            for target, view in zip(targets, job.views, strict=True):
                target.copy_(view, non_blocking=True)
            return self._end(job)

    def open(self, slot: SlotHandle) -> None:
        self.close()
        self._driver.bind()
        self._base = self._driver.open(slot.handle)
        self._slot_address = self._base + slot.offset

    def pull(self, job: Job, offsets: Sequence[int]) -> DeviceEvent:
        self._driver.bind()
        with torch.cuda.stream(self._stream):
            self._begin(job)
            for view, offset in zip(job.views, offsets, strict=True):
                source = self._slot_address + offset
                self._driver.copy(view.data_ptr(), source, view.numel(), self._stream.cuda_stream)
            return self._end(job)

    def close(self) -> None:
        base, self._base = self._base, None
        if base is not None:
            self._stream.synchronize()  # a pull that was given up; it waits for nobody but this device
            self._driver.bind()
            self._driver.close(base)

    def _begin(self, job: Job) -> None:
        if job.ready is not None:
            self._stream.wait_event(job.ready)
        for view in job.views:  # a transfer that is given up may still touch them
            view.record_stream(self._stream)

    def _end(self, job: Job) -> torch.cuda.Event:
        finished = record_event(self._stream)
        job.work.post(finished)
        return finished
