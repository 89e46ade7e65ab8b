"""The step driver: a loop stops before each step, errors and cancels pass through it, gradients stay off inside."""

from __future__ import annotations

import pytest
import torch

from ditrelay.models.stepping import StepDriver, pause


def _counting(log: list[object], steps: int = 3) -> StepDriver:
    @torch.no_grad()  # as diffusers' loops are: entered in the first turn, left in the last one
    def loop() -> None:
        try:
            for index in range(steps):
                pause(steps)
                log.append((index, torch.is_grad_enabled()))
        finally:
            log.append("left")

    return StepDriver(loop)


def test_it_stops_before_each_step_and_ends_with_the_last() -> None:
    log: list[object] = []
    driver = _counting(log)
    driver.start()
    assert driver.total_steps == 3 and log == []
    assert driver.step() and driver.step()
    assert not driver.finished and driver.steps_done == 2
    assert not driver.step()
    assert driver.finished and log == [(0, False), (1, False), (2, False), "left"]
    with pytest.raises(ValueError, match="no steps remain"):
        driver.step()


def test_a_loop_that_ends_between_two_steps_of_another_does_not_switch_gradients_on() -> None:
    short: list[object] = []
    long: list[object] = []
    drivers = [_counting(short, 1), _counting(long, 3)]
    for driver in drivers:
        driver.start()
        assert torch.is_grad_enabled()
    running = drivers
    while running:
        running = [driver for driver in running if driver.step()]
        assert torch.is_grad_enabled()
    assert long == [(0, False), (1, False), (2, False), "left"]


def test_closing_unwinds_the_loop_once_and_leaves_the_callers_gradient_mode() -> None:
    log: list[object] = []
    driver = _counting(log)
    driver.start()
    driver.step()
    driver.close()
    driver.close()
    assert log == [(0, False), "left"] and driver.finished and torch.is_grad_enabled()


def test_a_forgotten_loop_is_unwound_and_leaves_the_callers_gradient_mode() -> None:
    log: list[object] = []
    driver = _counting(log)
    driver.start()
    del driver
    assert log == ["left"] and torch.is_grad_enabled()


def test_an_error_in_a_step_reaches_the_caller_and_ends_the_loop() -> None:
    def loop() -> None:
        pause(2)
        raise RuntimeError("no memory")

    driver = StepDriver(loop)
    driver.start()
    with pytest.raises(RuntimeError, match="no memory"):
        driver.step()
    assert driver.finished
    driver.close()


def test_an_error_before_the_first_step_reaches_the_caller() -> None:
    def loop() -> None:
        raise ValueError("bad size")

    with pytest.raises(ValueError, match="bad size"):
        StepDriver(loop).start()


def test_a_loop_without_steps_is_refused() -> None:
    with pytest.raises(RuntimeError, match="without a step"):
        StepDriver(lambda: None).start()


def test_pausing_outside_a_driver_is_an_error_of_ours() -> None:
    with pytest.raises(RuntimeError, match="outside a StepDriver"):
        pause(1)
