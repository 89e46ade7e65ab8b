"""NCCL under one end of an edge: its own communicator and its own CUDA stream."""

from __future__ import annotations

import threading

import torch
from torch._C._distributed_c10d import Store

from ditrelay.runtime.communication.device_events import record_event, wait_for_event
from ditrelay.runtime.communication.edge_channel import Channel, Ready
from ditrelay.runtime.communication.endpoint import Job, LinkDown, essence
from ditrelay.runtime.communication.raw_group import RawGroup, nccl_group

# Our own deadline comes first, whatever the watchdog is told to do at its own.
_WATCHDOG_FACTOR = 3.0


class NcclLink:
    """A raw two-rank NCCL group, and a channel over which the sender says when the receiver is to join in.

    A receive that is posted is a kernel: for as long as its send does not come it holds SMs, and so slows the denoise
    that runs there. So it is posted at the sender's word, and until then a thread sleeps at a socket.

    Once the communicator is made (at the first transfer), the thread does not block in CUDA or NCCL: it puts a transfer
    on the edge's stream and looks for the event behind it, so a peer that died or stands still can be given up at the
    deadline by aborting the communicator (which also ends the kernel that waits on the GPU).

    Nobody else may abort the communicator: the kernel would end, and a transfer that failed would look complete. NCCL's
    watchdog reads what it does about an error from the environment of the process, and by default ends the process; so
    the launcher sets ``TORCH_NCCL_ASYNC_ERROR_HANDLING=0``.

    Args:
        meeting: the edge's store.
        channel: to the other end.
        end: 0 sends, 1 receives.
        device: this rank's GPU.
        timeout: seconds that one transfer may take.
    """

    def __init__(self, meeting: Store, channel: Channel, end: int, device: torch.device, timeout: float) -> None:
        self._channel = channel
        self._end = end
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._interrupted = threading.Event()
        self._group: RawGroup | None = nccl_group(meeting, end, _WATCHDOG_FACTOR * timeout)

    def mark(self) -> torch.cuda.Event:
        """What wrote the tensors to send, or still reads the memory to receive into, is on the caller's stream."""
        return record_event(torch.cuda.current_stream(self._device))

    def move(self, job: Job, deadline: float) -> None:
        if not job.views:
            return
        torch.cuda.set_device(self._device)  # leaving ``stream``, torch would go back to the first GPU and its context
        try:
            if self._end == 0:
                self._call_receiver(job, deadline)
            else:
                self._channel.expect(job, deadline)
            wait_for_event(self._post(job), deadline, self._interrupted)
        except RuntimeError as error:
            raise LinkDown(essence(error)) from error

    def interrupt(self) -> None:
        self._interrupted.set()
        self._channel.shut()

    def disconnect(self) -> None:
        """Takes about half a second where a kernel is waiting for the peer."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()
        self._channel.close()

    def _call_receiver(self, job: Job, deadline: float) -> None:
        if job.wait and job.ready is not None:
            wait_for_event(job.ready, deadline, self._interrupted, behind_stage=True)
        sizes = tuple(view.numel() for view in job.views)
        self._channel.send(Ready(job.work.seq, sizes), deadline)

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
