"""A stream for tests without a GPU: work is complete when the test says so."""

from __future__ import annotations

import threading
import time

SOON = 5.0


class FakeEvent:
    def __init__(self) -> None:
        self.complete = threading.Event()
        self.completed = 0.0
        self.error = ""

    def query(self) -> bool:
        return self.complete.is_set()

    def synchronize(self) -> None:
        assert self.complete.wait(SOON), "the test left this event incomplete"
        if self.error:
            raise RuntimeError(self.error)

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1000 * (later.completed - self.completed)


class FakeDevice:
    """``finish()`` completes the oldest events that were recorded; ``lost``: none can be recorded any more."""

    def __init__(self) -> None:
        self.lost = False
        self._changed = threading.Condition()
        self._events: list[FakeEvent] = []

    def record(self, step: bool) -> FakeEvent:
        if self.lost:
            raise RuntimeError("CUDA error: the device is lost")
        with self._changed:
            self._events.append(FakeEvent())
            self._changed.notify_all()
            return self._events[-1]

    def await_recorded(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._events) >= count, SOON), f"{len(self._events)} of {count}"

    def finish(self, count: int = 1, error: str = "") -> None:
        """Waits for each event to be recorded."""
        for _ in range(count):
            self.await_recorded(1)
            event = self._events.pop(0)
            event.error, event.completed = error, time.monotonic()
            event.complete.set()


class SlowEvent:
    """Complete at ``due`` (``time.monotonic()``)."""

    def __init__(self, due: float) -> None:
        self.due = due

    def query(self) -> bool:
        return time.monotonic() >= self.due

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.due - time.monotonic()))

    def elapsed_time(self, later: SlowEvent) -> float:
        return 1000 * (later.due - self.due)


class SlowDevice:
    """Takes ``seconds`` from each place that is recorded to the next, whenever they were launched."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due = 0.0

    def record(self, step: bool) -> SlowEvent:
        self._due = max(self._due, time.monotonic()) + self._seconds
        return SlowEvent(self._due)
