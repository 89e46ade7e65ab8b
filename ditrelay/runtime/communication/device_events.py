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


class DeviceEvent(Protocol):
    """What a ``torch.cuda.Event`` is to those who wait for it."""

    def query(self) -> bool:
        """Whether the device has come to the event."""
        ...


def wait_for_event(event: DeviceEvent, deadline: float, interrupted: threading.Event) -> None:
    """Block until ``event`` is complete.

    Raises:
        LinkDown: ``deadline`` (``time.monotonic()``) passed, or ``interrupted`` was set.
        RuntimeError: the device failed.
    """
    eager_until = time.monotonic() + _EAGER_SECONDS
    pause = _FIRST_PAUSE
    while not event.query():
        now = time.monotonic()
        if now >= deadline:
            raise LinkDown("the deadline passed", timed_out=True)
        if now < eager_until:
            time.sleep(0)  # lets other threads run
            continue
        if interrupted.wait(pause):
            raise LinkDown("closed while a transfer was under way")
        pause = min(2 * pause, _LONGEST_PAUSE)


def record_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event behind all that is on ``stream`` now."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
