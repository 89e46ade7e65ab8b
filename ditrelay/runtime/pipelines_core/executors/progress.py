"""What a lane's device has computed, as against what its thread has launched.

A GPU runs behind the thread that launches its work. Whoever must know when something is really done (a step, a stage,
the last use of a tensor) leaves a call here; it is made when the device has come that far.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

# Steps that may be launched and not computed: one runs, one waits, so the device never does and a cancel comes soon.
MAX_STEPS_AHEAD = 2
_CLOCK_DRIFT = 50e-6  # seconds a second by which the device's clock may run faster or slower than the host's


@dataclass(frozen=True)
class Reached:
    """The device came to a place at ``at`` (``time.monotonic()``), or failed with ``error`` before it did."""

    at: float
    error: RuntimeError | None = None


Call = Callable[[Reached], None]


class Progress(Protocol):
    """``then``, ``mark`` and ``pace`` belong to the lane's thread."""

    def then(self, call: Call, *, step: bool = False) -> None:
        """Call ``call`` when the device has done all that was launched until now; calls are made in their order.

        It must be short and must not raise. ``step``: what was launched last is a step, which ``pace`` counts.
        """
        ...

    def mark(self) -> torch.cuda.Event | None:
        """An event that is complete when all that was launched until now is done; ``None`` where it is done by now.

        Raises:
            RuntimeError: the device is lost.
        """
        ...

    def pace(self) -> None:
        """Wait until one more step may be launched.

        Raises:
            RuntimeError: the device stands still.
        """
        ...


class HostProgress:
    """On a CPU, what is launched is done."""

    def then(self, call: Call, *, step: bool = False) -> None:
        call(Reached(time.monotonic()))

    def mark(self) -> None:
        return None

    def pace(self) -> None:
        """Nothing is ever ahead."""


class DeviceProgress:
    """Follows one CUDA stream on a thread of its own, where the calls are made.

    That thread waits in CUDA without a time-out: the head kills a rank that shows no progress for ``--stage-timeout``.

    Args:
        name: names the thread.
        record: an event behind all that is on the lane's stream; told whether a step is what went before.
        timeout: seconds that ``pace`` waits at most.
        enter: called first on that thread.
    """

    def __init__(
        self,
        name: str,
        record: Callable[[bool], torch.cuda.Event],
        timeout: float,
        enter: Callable[[], object] = lambda: None,
    ) -> None:
        self._record = record
        self._timeout = timeout
        self._enter = enter
        self._marks: queue.SimpleQueue[_Mark] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._steps_ahead = 0  # guarded by _changed
        self._clock = DeviceClock()
        threading.Thread(target=self._run, name=f"progress-{name}", daemon=True).start()

    def then(self, call: Call, *, step: bool = False) -> None:
        with self._changed:
            self._steps_ahead += step
        try:
            self._marks.put(_Mark(self._record(step), call, step))
        except RuntimeError as error:  # the device is lost
            self._marks.put(_Mark(None, call, step, error))

    def mark(self) -> torch.cuda.Event:
        return self._record(False)

    def pace(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._steps_ahead < MAX_STEPS_AHEAD, self._timeout):
                raise RuntimeError(f"the device finished no step within {self._timeout:g} s (--stage-timeout)")

    def _run(self) -> None:
        self._enter()
        while True:
            self._follow(self._marks.get())

    def _follow(self, mark: _Mark) -> None:
        at, error = time.monotonic(), mark.error
        try:
            if mark.event is not None:
                mark.event.synchronize()
                at = self._clock.time_of(mark.event, time.monotonic())
        except RuntimeError as failure:
            error = failure
        reached = Reached(at, error)
        with self._changed:
            self._steps_ahead -= mark.step
            self._changed.notify_all()
        mark.call(reached)


class DeviceClock:
    """When the events of one stream were complete, in the host's time.

    A thread sees an event after it, by milliseconds where other threads keep the interpreter. What lies between two
    events the device knows itself; the host's time is taken from those that were seen soonest.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._elapsed = 0.0  # device seconds from the first event to the last
        self._offset = math.inf  # host time of the first event, as the soonest sight of any event gives it
        self._seen = 0.0
        self._given = -math.inf

    def time_of(self, event: torch.cuda.Event, now: float) -> float:
        """Take the stream's next event, complete and seen so at ``now`` (``time.monotonic()``)."""
        if self._last is not None:
            self._elapsed += self._last.elapsed_time(event) / 1000
        self._offset = min(self._offset + _CLOCK_DRIFT * (now - self._seen), now - self._elapsed)
        self._last, self._seen = event, now
        self._given = max(self._given, self._elapsed + self._offset)  # a better offset must not turn the order round
        return self._given


@dataclass(frozen=True)
class _Mark:
    event: torch.cuda.Event | None
    call: Call
    step: bool
    error: RuntimeError | None = None


def follow_device(name: str, device: torch.device, timeout: float) -> Progress:
    """The progress of the lane ``name``, whose thread makes its stream the current one."""
    if device.type != "cuda":
        return HostProgress()

    def record(step: bool) -> torch.cuda.Event:
        # Asleep, a thread sees its event 170 us late, awake 13 us (H100): too late only where a hand-off waits for it.
        event = torch.cuda.Event(blocking=step, enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    # A thread that waits for an event while no device is set makes a context on the first GPU, of half a GiB.
    return DeviceProgress(name, record, timeout, enter=partial(torch.cuda.set_device, device))
