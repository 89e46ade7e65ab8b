"""Load: closed-loop (so many requests at once) and open-loop (Poisson arrivals), against whatever takes requests."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

LEAD_SHARE = 0.1  # of an open-loop phase: arrivals at an empty system, left out
FAILURES_ALLOWED = 2


@dataclass(frozen=True)
class Done:
    """A request ended at ``ended`` (monotonic seconds). ``seq`` -1: the whole system has failed, as ``error`` says.

    ``stages``: seconds in encode, denoise, decode, and what else the system reports.
    """

    seq: int
    ended: float
    error: str = ""
    stages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One request as its client saw it. ``arrived`` is when it was due, so that a late submission counts as waiting."""

    arrived: float
    done: Done

    @property
    def latency(self) -> float:
        return self.done.ended - self.arrived


class Target(Protocol):
    """What load is put on. ``submit`` returns at once; each request ends as one ``Done`` in ``completions``."""

    completions: queue.SimpleQueue[Done]

    def submit(self, seq: int) -> None: ...

    def cancel_waiting(self) -> None:
        """End what has not started, where that is possible. Each still ends as one ``Done``."""


class LoadFailed(Exception):
    """The system can't be measured; says why."""


@dataclass
class Phase:
    """What came of one phase: the samples in the order of their ends, and how many had not ended when it was over."""

    samples: list[Sample] = field(default_factory=list)
    unfinished: int = 0
    failure: str = ""

    def cut_short(self, when: str) -> str:
        """Why requests are unfinished."""
        return f"a request failed {when}: {self.failure}" if self.failure else f"the time limit was reached {when}"


class Client:
    """Puts phases of load on one target, one after the other. Sequence numbers never repeat."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._arrived: dict[int, float] = {}
        self._next = 0
        self._failures = 0

    def closed(self, concurrency: int, needed: int, deadline: float) -> Phase:
        """``concurrency`` requests at once until ``needed`` have ended or the deadline is reached."""
        phase = Phase()
        while len(phase.samples) < needed:
            while len(self._arrived) < concurrency:
                self._submit(time.monotonic())
            if not self._collect(phase, deadline):
                break
        phase.unfinished = max(0, needed - len(phase.samples))
        return phase

    def open(self, arrivals: Sequence[float], deadline: float) -> Phase:
        """Requests at the given seconds from now, whether or not earlier ones have ended."""
        phase, began = Phase(), time.monotonic()
        for due in (began + arrival for arrival in arrivals):
            if due > deadline:
                break
            while self._collect(phase, due):
                pass
            self._submit(due)
        while self._arrived and self._collect(phase, deadline):
            pass
        phase.unfinished = len(arrivals) - len(phase.samples)
        return phase

    def finish(self, enough: Callable[[], bool], deadline: float) -> bool:
        """Let requests end, with no new ones, until that is enough or none is left; False at the deadline."""
        ended = Phase()
        while self._arrived and not enough():
            if not self._collect(ended, deadline):
                return False
        return True

    def drain(self, seconds: float) -> bool:
        """Get rid of what is still on the way, so that the next phase begins with an idle system.

        False where that takes longer than ``seconds``.
        """
        self._target.cancel_waiting()
        deadline = time.monotonic() + seconds
        while self._arrived:
            try:
                done = self._target.completions.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return False
            if done.seq < 0:
                raise LoadFailed(done.error)
            self._arrived.pop(done.seq, None)
        return True

    def _submit(self, due: float) -> None:
        self._arrived[self._next] = due
        self._target.submit(self._next)
        self._next += 1

    def _collect(self, phase: Phase, until: float) -> bool:
        """Take the next ending into ``phase``; False where there is none until then."""
        try:
            done = self._target.completions.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return False
        if done.seq < 0:
            raise LoadFailed(done.error)
        arrived = self._arrived.pop(done.seq)
        if done.error:
            self._failures += 1
            phase.failure = done.error
            if self._failures > FAILURES_ALLOWED:
                raise LoadFailed(f"{self._failures} requests failed, the last with: {done.error}")
        else:
            phase.samples.append(Sample(arrived, done))
        return True


def poisson_arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """``count`` moments in seconds with exponential gaps of mean 1 / ``rate``.

    One seed gives one pattern, stretched by the rate: all systems see the same bursts.
    """
    drawn = random.Random(seed)
    return list(accumulate(drawn.expovariate(1.0) / rate for _ in range(count)))


def lead_of(count: int) -> int:
    """Arrivals before the ``count`` counted ones of an open-loop phase."""
    return max(2, round(count * LEAD_SHARE))
