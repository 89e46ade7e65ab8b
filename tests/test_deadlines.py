"""``--request-timeout``: whom it counts, and when."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ditrelay.runtime.deadlines import Deadlines
from ditrelay.runtime.messages import Started
from ditrelay.runtime.request import Request, RequestState, SamplingParams

S = RequestState


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """Deadlines of nine seconds, and what was told to those behind them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.deadlines = Deadlines(9.0, self.clock)
        self.told: list[tuple[str, RequestState]] = []
        self.move = self.deadlines.before(lambda name, state: self.told.append((name, state)))

    def submit(self, name: str, *, patient: bool = False) -> None:
        params = SamplingParams(prompt="a")
        self.deadlines.submitted(Request(request_id=name, params=params, patient=patient))

    def compute(self, name: str, state: RequestState, seconds: float) -> None:
        self.deadlines.observe(Started(rank=0, request_id=name, stage="denoise", at=0.0))
        self.move(name, state)
        self.clock.now += seconds

    def due(self) -> list[str]:
        return [each.request_id for each in self.deadlines.due()]


def test_the_time_of_a_request_that_somebody_waits_for_runs_from_its_submission():
    desk = Desk()
    desk.submit("a")
    desk.clock.now += 5
    desk.submit("b")
    desk.move("a", S.ENCODED)
    desk.clock.now += 4
    assert desk.due() == ["a"] and desk.due() == []
    desk.deadlines.ended("b")
    desk.clock.now += 100
    assert desk.due() == [] and desk.told == [("a", S.ENCODED)]


@pytest.mark.parametrize("waits", [S.QUEUED, S.ENCODED, S.TO_DIT, S.AT_DIT, S.DENOISED, S.TO_DECODER, S.AT_DECODER])
def test_no_time_runs_for_a_patient_request_that_waits_for_a_place(waits):
    desk = Desk()
    desk.submit("a", patient=True)
    desk.clock.now += 1000  # in the queue
    desk.move("a", S.ENCODING)
    desk.clock.now += 1000  # behind another one at the encoder
    desk.compute("a", S.ENCODING, 4)
    desk.move("a", waits)
    desk.clock.now += 1000
    desk.compute("a", S.DENOISING, 4)
    assert desk.due() == []
    desk.clock.now += 1
    assert desk.due() == ["a"]


def test_what_has_ended_is_forgotten_long_before_its_time():
    desk = Desk()
    for number in range(1000):
        desk.submit(f"r{number}", patient=number % 2 == 0)
        desk.compute(f"r{number}", S.ENCODING, 0)
        desk.deadlines.ended(f"r{number}")
    assert len(desk.deadlines._due) < 200 and not desk.deadlines._clocks
