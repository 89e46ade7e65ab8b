"""CUDA events under transfers: making them, and waiting for them so that a transfer can be given up."""

from __future__ import annotations

import threading
import time
from typing import Protocol

import torch

from ditrelay.runtime.communication.endpoint import LinkDown

# A transfer that is under way takes some ten microseconds more: look again and again before any sleep.
_EAGER_SECONDS = 200e-6
_FIRST_PAUSE = 20e-6
_LONGEST_PAUSE = 1e-3
# Behind a stage it takes some ten milliseconds more, and then each moment counts. Longer pauses show in the hand-off;
# a thread that stays awake keeps the interpreter from those that launch kernels.
_STAGE_PAUSE = 50e-6


class DeviceEvent(Protocol):
    """What a ``torch.cuda.Event`` is to those who wait for it."""

    def query(self) -> bool:
        """Whether the device has come to the event."""
        ...


def wait_for_event(
    event: DeviceEvent, deadline: float, interrupted: threading.Event, *, behind_stage: bool = False
) -> None:
    """Block until ``event`` is complete. ``behind_stage``: that takes as long as a stage, and is needed at once.

    Raises:
        LinkDown: ``deadline`` (``time.monotonic()``) passed, or ``interrupted`` was set.
        RuntimeError: the device failed.
    """
    eager_until = 0.0 if behind_stage else time.monotonic() + _EAGER_SECONDS
    pause = _FIRST_PAUSE
    while not event.query():
        now = time.monotonic()
        if now >= deadline:
            raise LinkDown("the deadline passed", timed_out=True)
        if now < eager_until:
            time.sleep(0)  # lets other threads run
            continue
        if interrupted.is_set():
            raise LinkDown("closed while a transfer was under way")
        time.sleep(pause)
        pause = min(2 * pause, _STAGE_PAUSE if behind_stage else _LONGEST_PAUSE)


def record_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event behind all that is on ``stream`` now."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
