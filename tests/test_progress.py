"""Calls are made when the device has come that far, in order, and the lane's thread never runs far ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from fake_device import SOON, FakeDevice, SlowEvent

from ditrelay.runtime.pipelines_core.executors.progress import (
    MAX_STEPS_AHEAD,
    DeviceClock,
    DeviceProgress,
    HostProgress,
    Reached,
    follow_device,
)


class Calls:
    """What was called, and how to wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.made: list[tuple[str, Reached]] = []

    def named(self, name: str) -> Callable[[Reached], None]:
        def call(reached: Reached) -> None:
            with self._changed:
                self.made.append((name, reached))
                self._changed.notify_all()

        return call

    def wait(self, count: int) -> list[str]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.made) >= count, SOON)
            return [name for name, _ in self.made]


def test_calls_are_made_in_their_order_and_not_before_the_device_is_there() -> None:
    device, calls = FakeDevice(), Calls()
    progress = DeviceProgress("test", device.record, SOON)
    for name in "abc":
        progress.then(calls.named(name))
    time.sleep(0.02)
    assert calls.made == []
    before = time.monotonic()
    device.finish(2)
    assert calls.wait(2) == ["a", "b"]
    assert all(before <= reached.at <= time.monotonic() for _, reached in calls.made)
    device.finish()
    assert calls.wait(3) == ["a", "b", "c"]


def test_events_that_are_seen_late_get_the_devices_own_time() -> None:
    clock = DeviceClock()
    device = [10.0, 10.5, 11.0, 11.5]  # the device's times; the thread sees them so much later
    late = [0.004, 0.0001, 0.009, 0.002]
    events = [SlowEvent(due) for due in device]
    seen = [clock.time_of(event, event.due + more) for event, more in zip(events, late, strict=True)]  # type: ignore[arg-type]
    assert seen[0] == pytest.approx(10.004)
    assert seen[1:] == pytest.approx([due + 0.0001 for due in device[1:]], abs=1e-4)


def test_a_device_clock_that_drifts_is_followed() -> None:
    clock, fast = DeviceClock(), 1 + 20e-6
    for second in range(0, 3600, 10):
        at = clock.time_of(SlowEvent(second * fast), second + 0.0002)  # type: ignore[arg-type]
        assert abs(at - second) < 0.001


def test_at_most_two_steps_are_launched_and_not_computed() -> None:
    device, calls = FakeDevice(), Calls()
    progress = DeviceProgress("test", device.record, SOON)
    launched = 0

    def lane() -> None:
        nonlocal launched
        for step in range(6):
            progress.pace()
            progress.then(calls.named(str(step)), step=True)
            launched += 1

    thread = threading.Thread(target=lane)
    thread.start()
    for computed in range(5):
        calls.wait(computed)
        until = time.monotonic() + SOON
        while launched < computed + MAX_STEPS_AHEAD and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.01)
        assert launched == computed + MAX_STEPS_AHEAD
        device.finish()
    device.finish()
    calls.wait(6)
    thread.join(SOON)


def test_a_mark_is_complete_when_the_device_is_there_and_absent_where_all_is_done_at_once() -> None:
    device = FakeDevice()
    progress = DeviceProgress("test", device.record, SOON)
    mark = progress.mark()
    assert not mark.query()
    device.finish()
    assert mark.query()
    assert HostProgress().mark() is None


def test_what_is_no_step_does_not_hold_the_lane_back() -> None:
    device, calls = FakeDevice(), Calls()
    progress = DeviceProgress("test", device.record, SOON)
    for name in "abcde":
        progress.then(calls.named(name))
    progress.pace()
    device.finish(5)


def test_a_device_that_stands_still_ends_the_wait_for_it() -> None:
    device, calls = FakeDevice(), Calls()
    progress = DeviceProgress("test", device.record, timeout=0.05)
    for name in "ab":
        progress.then(calls.named(name), step=True)
    with pytest.raises(RuntimeError, match=r"no step within 0.05 s \(--stage-timeout\)"):
        progress.pace()
    device.finish(2)


def test_an_error_of_the_device_reaches_the_call_that_waited_for_it() -> None:
    device, calls = FakeDevice(), Calls()
    progress = DeviceProgress("test", device.record, SOON)
    progress.then(calls.named("a"), step=True)
    device.finish(error="CUDA error: an illegal memory access")
    calls.wait(1)
    device.lost = True
    progress.then(calls.named("b"), step=True)
    assert calls.wait(2) == ["a", "b"]
    errors = [str(reached.error) for _, reached in calls.made]
    assert errors == ["CUDA error: an illegal memory access", "CUDA error: the device is lost"]
    progress.pace()


def test_on_a_cpu_a_call_is_made_at_once() -> None:
    calls = Calls()
    progress = follow_device("test", torch.device("cpu"), SOON)
    assert isinstance(progress, HostProgress)
    progress.then(calls.named("a"), step=True)
    assert [name for name, _ in calls.made] == ["a"]
    progress.pace()


def test_the_thread_that_waits_for_a_gpu_is_that_gpus_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is set, what it waits with makes a context on the first one."""
    named: list[tuple[str, torch.device]] = []
    set_on = threading.Event()

    def set_device(device: torch.device) -> None:
        named.append((threading.current_thread().name, device))
        set_on.set()

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    follow_device("denoise", torch.device("cuda", 3), SOON)
    assert set_on.wait(SOON)
    assert named == [("progress-denoise", torch.device("cuda", 3))]
