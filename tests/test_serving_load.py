"""benchmarks/serving_load.py: closed-loop and open-loop load, and what comes of systems that fail or lag behind."""

from __future__ import annotations

import queue
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import serving_run
from serving_load import Client, Done, LoadFailed, lead_of, poisson_arrivals


class FakeTarget:
    """Serves ``lanes`` requests at once, ``seconds`` each."""

    def __init__(self, lanes: int = 1, seconds: float = 0.01, error: str = "") -> None:
        self.completions: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self.most = self.running = 0
        self._lock = threading.Lock()
        self._lanes, self._seconds, self._error = threading.Semaphore(lanes), seconds, error

    def submit(self, seq: int, steps: int | None = None) -> None:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        threading.Thread(target=self._serve, args=(seq,), daemon=True).start()

    def _serve(self, seq: int) -> None:
        with self._lanes:
            time.sleep(self._seconds)
        with self._lock:
            self.running -= 1
        self.completions.put(Done(seq, time.monotonic(), self._error, {"denoise": self._seconds}))

    def cancel_waiting(self) -> None:
        pass


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def test_closed_load_keeps_so_many_requests_at_once_and_no_more() -> None:
    target = FakeTarget(lanes=2)
    phase = Client(target).closed(concurrency=5, needed=12, deadline=soon())
    assert len(phase.samples) == 12 and phase.unfinished == 0
    assert target.most == 5


def test_closed_load_ends_at_its_deadline_and_says_what_is_missing() -> None:
    phase = Client(FakeTarget(seconds=30)).closed(concurrency=2, needed=3, deadline=soon(0.05))
    assert (len(phase.samples), phase.unfinished) == (0, 3)


def test_open_load_counts_the_wait_from_the_moment_a_request_was_due() -> None:
    phase = Client(FakeTarget(lanes=1, seconds=0.05)).open([0.0, 0.0, 0.0], soon())
    latencies = sorted(sample.latency for sample in phase.samples)
    assert latencies[2] >= 0.15 and latencies[0] < latencies[1] < latencies[2]


def test_open_load_that_is_not_kept_up_with_has_unfinished_requests_and_no_latencies() -> None:
    phase = Client(FakeTarget(lanes=1, seconds=0.2)).open([0.0] * 5, soon(0.3))
    assert phase.unfinished >= 3
    assert serving_run.open_figures(phase, 0.0) == {"unfinished": phase.unfinished}


def test_a_system_that_fails_ends_the_phase_with_its_reason() -> None:
    target = FakeTarget()
    target.completions.put(Done(-1, 0.0, "stock rank 2 ended with exit code -9"))
    with pytest.raises(LoadFailed, match="stock rank 2"):
        Client(target).closed(1, 1, soon())


def test_more_than_two_failed_requests_end_the_phase_with_the_last_reason() -> None:
    with pytest.raises(LoadFailed, match="3 requests failed.*no memory"):
        Client(FakeTarget(error="no memory")).closed(1, 10, soon())


def test_a_phase_that_is_cut_short_says_whether_a_request_failed_or_the_time_was_over() -> None:
    failed = Client(FakeTarget(error="no module av")).open([0.0, 0.0], soon())
    assert failed.unfinished == 2
    assert failed.cut_short("in the warm-up") == "a request failed in the warm-up: no module av"
    late = Client(FakeTarget(seconds=30)).closed(1, 1, soon(0.05))
    assert late.cut_short("at low load") == "the time limit was reached at low load"


def test_draining_tells_whether_the_system_became_idle() -> None:
    client = Client(FakeTarget(lanes=8, seconds=0.1))
    client.closed(concurrency=4, needed=1, deadline=soon())
    assert client.drain(5.0) and client.drain(0.0)
    slow = Client(FakeTarget(seconds=30))
    slow.closed(1, 1, soon(0.0))
    assert not slow.drain(0.05)


def test_what_is_on_the_way_ends_until_that_is_enough_and_nothing_new_begins() -> None:
    target = FakeTarget(lanes=1, seconds=0.05)
    client = Client(target)
    client.closed(concurrency=4, needed=1, deadline=soon())
    assert client.finish(lambda: target.running <= 2, soon()) and target.running == 2
    assert not client.finish(lambda: False, soon(0.0))
    assert client.finish(lambda: False, soon()) and target.running == 0


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    arrivals = poisson_arrivals(rate=4.0, count=4000, seed=1)
    gaps = [later - earlier for earlier, later in zip([0.0, *arrivals], arrivals, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)


def test_poisson_arrivals_of_one_seed_are_one_pattern_at_every_rate() -> None:
    slow, fast = poisson_arrivals(1.0, 50, 3), poisson_arrivals(10.0, 50, 3)
    assert fast == pytest.approx([moment / 10 for moment in slow])
    assert poisson_arrivals(1.0, 50, 4) != slow
    assert lead_of(30) == 3 and lead_of(5) == 2
