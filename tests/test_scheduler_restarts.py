"""Restarts of units: at once for one that works, ever later for one that only dies, and every few minutes at last."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scheduler_desk import ONE_AND_ONE, TWO_AND_ONE, Desk

from ditrelay.runtime.messages import Kill, Spawn
from ditrelay.runtime.request import RequestState
from ditrelay.runtime.start_messages import Restart, StartFailed
from ditrelay.runtime.status import lost_roles

S = RequestState


def test_the_first_restart_is_at_once_the_next_wait_longer_each_time_and_the_last_are_minutes_apart():
    desk = Desk(*TWO_AND_ONE, max_restarts=4)
    for delay in (0.0, 1.0, 2.0, 4.0, 60.0, 120.0, 300.0, 300.0):
        desk.down(0)
        if delay >= 60.0:
            unit = desk.snapshot().units[0]
            assert (unit.state, unit.reason) == ("failed", "worker 0 died (exit code -9)")
            assert desk.scheduler.worker_state(0) == "down"
        if delay:
            desk.wait(delay - 0.1)
            assert not desk.of(Spawn)
        desk.wait(0.1)
        assert desk.actions == [Spawn(0)]
        desk.bring_up(0)


def test_the_wait_for_a_restart_grows_to_a_minute_at_most():
    desk = Desk(*TWO_AND_ONE, max_restarts=20)
    for _ in range(15):
        desk.down(0)
        desk.wait(60.0)
        assert desk.actions == [Spawn(0)]
        desk.bring_up(0)


@pytest.mark.parametrize("fail", [lambda desk: desk.down(0), lambda desk: desk.do(StartFailed(0, "no thread"))])
def test_starts_that_fail_are_no_deaths_and_are_tried_again_for_good(fail: Callable[[Desk], None]):
    desk = Desk(*ONE_AND_ONE, max_restarts=0)
    desk.bring("a", S.AT_DIT)
    desk.do(Restart(0))
    for number in range(150):
        fail(desk)
        desk.wait(2.0)
        assert desk.actions == [Spawn(0)], f"try {number}: within two seconds for five minutes"
    for _ in range(100):
        fail(desk)
        desk.wait(59.0)
        assert not desk.of(Spawn)
        desk.wait(1.0)
        assert desk.actions == [Spawn(0)]
    assert not desk.ends("a"), "what was accepted waits"
    desk.bring_up(0)
    desk.bring("a", None)
    assert desk.ends("a") == [("done", None)]


def test_a_role_that_was_given_up_is_there_again_with_its_rank():
    desk = Desk(*ONE_AND_ONE, max_restarts=0)
    desk.submit("a")
    desk.down(0)
    assert "no rank is left for denoise" in desk.reason("a")
    desk.wait(60.0)
    assert desk.actions == [Spawn(0)]
    desk.submit("b")
    assert "no rank is left for denoise" in desk.reason("b"), "it is nobody's hope until it is up"
    assert lost_roles(desk.snapshot().units)
    desk.bring_up(0)
    assert not lost_roles(desk.snapshot().units)
    desk.bring("c", None)
    assert desk.ends("c") == [("done", None)]


def test_a_start_that_fails_leaves_a_rank_that_was_given_up_at_its_minutes():
    desk = Desk(*ONE_AND_ONE, max_restarts=0)
    desk.down(0)
    desk.wait(60.0)
    desk.do(StartFailed(0, "no thread"))
    desk.wait(119.0)
    assert not desk.of(Spawn) and desk.snapshot().units[0].state == "failed"
    desk.wait(1.0)
    assert desk.actions == [Spawn(0)]


@pytest.mark.parametrize("state", ["up", "starting", "down", "failed"])
def test_a_restart_that_is_asked_for_is_at_once_and_forgives_what_was(state: str):
    desk = Desk(*ONE_AND_ONE, max_restarts=0 if state == "failed" else 1)
    if state != "up":
        desk.down(0)
    if state == "starting":
        desk.wait(0.1)
    assert desk.snapshot().units[0].state == state
    killed = [Kill(0, "unit 0 was to be restarted")] if state in ("up", "starting") else []
    actions = desk.do(Restart(0))
    assert [action.rank for action in desk.of(Kill)] == [0] * len(killed)
    assert desk.of(Spawn, actions) == [Spawn(0)]
    desk.bring_up(0)
    desk.bring("a", None)
    assert desk.ends("a") == [("done", None)]


def test_a_restart_that_is_asked_for_is_no_attempt_of_what_was_computed():
    desk = Desk(*ONE_AND_ONE, max_attempts=1)
    desk.bring("a", S.DENOISING)
    desk.do(Restart(0))
    desk.bring_up(0)
    desk.wait(0.1)
    desk.bring("a", None)
    assert desk.ends("a") == [("done", None)]


def test_deaths_long_ago_do_not_count():
    desk = Desk(*ONE_AND_ONE, max_restarts=1, restart_window=60.0)
    for _ in range(3):
        desk.down(0)
        desk.wait(0.1)
        assert desk.actions == [Spawn(0)]
        desk.bring_up(0)
        desk.wait(61.0)


def test_the_fifth_death_in_a_minute_without_a_finished_stage_is_a_crash_loop():
    desk = Desk(*ONE_AND_ONE)
    for _ in range(4):
        desk.down(0)
        desk.wait(8.0)
        assert desk.actions == [Spawn(0)]
        desk.bring_up(0)
        desk.wait(10.0)
    desk.submit("a")
    desk.down(0)
    assert desk.snapshot().units[0].state == "failed"
    assert "no rank is left for denoise: worker 0 died" in desk.reason("a")
    assert "the last of 5 deaths within 60 s without a finished stage" in desk.reason("a")


def test_the_time_that_a_start_takes_does_not_hide_a_crash_loop():
    desk = Desk(*ONE_AND_ONE)
    for _ in range(4):
        desk.down(0)
        desk.wait(8.0)
        desk.wait(120.0)  # it loads a large model
        desk.bring_up(0)
    desk.down(0)
    assert desk.snapshot().units[0].state == "failed"


def test_a_rank_that_works_and_is_killed_from_outside_is_restarted_at_once_every_time():
    desk = Desk(*ONE_AND_ONE)
    for number in range(12):
        desk.bring(f"r{number}", S.DECODING)
        desk.decoded(f"r{number}")
        desk.down(0)
        desk.wait(0.1)
        assert desk.actions == [Spawn(0)]
        desk.bring_up(0)


def test_finishing_other_stages_does_not_hide_one_that_always_crashes():
    desk = Desk(("end", 1), max_restarts=2, max_attempts=9)
    desk.bring("a", S.DENOISING)
    for _ in range(2):
        desk.down(0)
        desk.wait(60.0)
        desk.bring_up(0)
        desk.encoded("a")
        desk.started("a", "denoise")
    desk.down(0)
    assert desk.snapshot().units[0].state == "failed"
    assert "no rank is left" in desk.reason("a")
