"""Restarts of units: at once for one that works, ever later for one that only dies, and never again at last."""

from __future__ import annotations

from scheduler_desk import ONE_AND_ONE, TWO_AND_ONE, Desk

from ditrelay.runtime.messages import Spawn
from ditrelay.runtime.request import RequestState

S = RequestState


def test_the_first_restart_is_at_once_the_next_wait_longer_each_time_and_end():
    desk = Desk(*TWO_AND_ONE, max_restarts=4)
    for delay in (0.0, 1.0, 2.0, 4.0):
        desk.down(0)
        if delay:
            desk.wait(delay - 0.1)
            assert not desk.of(Spawn)
        desk.wait(0.1)
        assert desk.actions == [Spawn(0)]
    desk.down(0)
    desk.wait(200.0)
    assert not desk.of(Spawn)
    unit = desk.snapshot().units[0]
    assert (unit.state, unit.restarts, unit.reason) == ("failed", 4, "worker 0 died (exit code -9)")
    assert desk.scheduler.worker_state(0) == "down"


def test_the_wait_for_a_restart_grows_to_a_minute_at_most():
    desk = Desk(*TWO_AND_ONE, max_restarts=20)
    for _ in range(15):
        desk.down(0)
        desk.wait(60.0)
        assert desk.actions == [Spawn(0)]


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
