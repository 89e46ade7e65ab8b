"""A compute lane: one thread (on a GPU, one stream) that runs a rank's stages, the urgent ones first."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable

import torch

from ditrelay.runtime.pipelines_core.executors.progress import follow_device

Job = Callable[[], None]


def finish_device_work(device: torch.device) -> None:
    """Wait for this thread's stream alone (a device-wide wait would also wait for a posted receive)."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Lane:
    """Runs jobs one at a time, lowest priority number first, first come first served among equals.

    All jobs run under one ``torch.no_grad()``: a grad context must not span two sessions that interleave. A job returns
    when its work is launched; ``progress`` tells when it is done, while the next job's work is launched behind it.
    """

    def __init__(self, name: str, device: torch.device, *, urgent: bool = False, stall_timeout: float = 600.0) -> None:
        self._jobs: queue.PriorityQueue[tuple[int, int, Job | None]] = queue.PriorityQueue()
        self._counter = itertools.count()
        self._device = device
        self._urgent = urgent
        self.progress = follow_device(name, device, stall_timeout)
        self._thread = threading.Thread(target=self._run, name=f"lane-{name}", daemon=True)
        self._thread.start()

    def put(self, priority: int, job: Job) -> None:
        self._jobs.put((priority, next(self._counter), job))

    def close(self, timeout: float) -> None:
        """Run no further job; wait at most ``timeout`` seconds for the running one."""
        self._jobs.put((-1, next(self._counter), None))
        self._thread.join(timeout)

    def finish(self, last: Job, timeout: float) -> None:
        """Run no further job but ``last``; wait at most ``timeout`` seconds for it."""
        self.put(-1, last)
        self.close(timeout)

    def _run(self) -> None:
        with torch.no_grad(), self._stream():
            while (job := self._jobs.get()[2]) is not None:
                job()
                del job  # the next wait must not keep its tensors alive

    def _stream(self) -> contextlib.AbstractContextManager[object]:
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        torch.cuda.set_device(self._device)
        # A lower number is a higher priority.
        stream = torch.cuda.Stream(self._device, priority=-1 if self._urgent else 0)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(stream)
