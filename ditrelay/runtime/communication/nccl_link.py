"""NCCL under one end of an edge: its own communicator and its own CUDA stream."""

from __future__ import annotations

import threading

import torch
from torch._C._distributed_c10d import Store

from ditrelay.runtime.communication.device_events import record_event, wait_for_event
from ditrelay.runtime.communication.endpoint import Job, LinkDown, essence
from ditrelay.runtime.communication.raw_group import RawGroup, nccl_group

# Our own deadline comes first, whatever the watchdog is told to do at its own.
_WATCHDOG_FACTOR = 3.0


class NcclLink:
    """A raw two-rank NCCL group.

    Once the communicator is made (at the first transfer), the thread does not block in CUDA or NCCL: it puts a transfer
    on the edge's stream and looks for the event behind it, so a peer that died or stands still can be given up at the
    deadline by aborting the communicator (which also ends the kernel that waits on the GPU).

    Nobody else may abort the communicator: the kernel would end, and a transfer that failed would look complete. NCCL's
    watchdog reads what it does about an error from the environment of the process, and by default ends the process; so
    the launcher sets ``TORCH_NCCL_ASYNC_ERROR_HANDLING=0``.

    Args:
        meeting: the edge's store.
        end: 0 sends, 1 receives.
        device: this rank's GPU.
        timeout: seconds that one transfer may take.
    """

    def __init__(self, meeting: Store, end: int, device: torch.device, timeout: float) -> None:
        self._end = end
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._interrupted = threading.Event()
        self._group: RawGroup | None = nccl_group(meeting, end, _WATCHDOG_FACTOR * timeout)

    def mark(self) -> torch.cuda.Event:
        """What wrote the tensors to send, or still reads the memory to receive into, is on the caller's stream."""
        return record_event(torch.cuda.current_stream(self._device))

    def move(self, job: Job, deadline: float) -> None:
        torch.cuda.set_device(self._device)  # leaving ``stream``, torch would go back to the first GPU and its context
        try:
            wait_for_event(self._post(job), deadline, self._interrupted)
        except RuntimeError as error:
            raise LinkDown(essence(error)) from error

    def interrupt(self) -> None:
        self._interrupted.set()

    def disconnect(self) -> None:
        """Takes about half a second where a kernel is waiting for the peer."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _post(self, job: Job) -> torch.cuda.Event:
        assert self._group is not None, "moved after disconnect"
        post = self._group.send if self._end == 0 else self._group.recv
        with torch.cuda.stream(self._stream):
            if job.ready is not None:
                self._stream.wait_event(job.ready)
            for view in job.views:
                view.record_stream(self._stream)
                post([view], 1 - self._end, 0).wait()  # orders the edge's stream after NCCL's own; does not block
            finished = record_event(self._stream)
        job.work.post(finished)
        return finished
