"""Deadlines: every wait of the scheduler ends, with a reason that names what was waited for."""

from __future__ import annotations

from scheduler_desk import ONE_AND_ONE, SPLIT, Desk

from ditrelay.runtime.messages import (
    CloseEdge,
    Drop,
    Kill,
    OpenEdge,
    Spawn,
    StepDone,
)
from ditrelay.runtime.request import RequestState

S = RequestState


def test_a_transfer_that_does_not_arrive_fails_its_edge_and_is_named():
    desk = Desk(*ONE_AND_ONE, transfer_timeout=60.0)
    desk.bring("a", S.TO_DIT)
    desk.wait(59.0)
    assert desk.actions == []
    desk.wait(1.0)
    (close, _) = desk.of(CloseEdge)
    assert all(part in close.reason for part in ("1->0", "#0", "request a", "60 s"))
    assert desk.state("a") is S.ENCODED


def test_a_cancelled_transfer_that_does_not_arrive_fails_its_edge_too():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.TO_DIT)
    desk.cancel("a")
    desk.wait(60.0)
    assert desk.of(CloseEdge) and desk.of(OpenEdge)
    desk.wait(60.0)
    desk.dropped("a", 0, 1)
    assert desk.is_empty()


def test_the_deadline_of_a_transfer_ends_with_its_edge():
    desk = Desk(*SPLIT, transfer_timeout=60.0)
    desk.bring("a", S.TO_DIT)
    desk.cancel("a")
    desk.down(1)
    desk.wait(1.0)
    desk.bring_up(1)
    desk.wait(59.0)
    assert not desk.of(CloseEdge)


def test_a_stage_without_news_is_killed_and_its_request_fails():
    desk = Desk(*ONE_AND_ONE, stage_timeout=100.0)
    desk.bring("a", S.DENOISING)
    desk.bring("b", S.AT_DIT)
    desk.wait(90.0)
    desk.do(StepDone(0, "a", 1, 8, desk.now))
    desk.wait(90.0)
    assert not desk.of(Kill)
    desk.wait(10.0)
    (kill,) = desk.of(Kill)
    assert kill.rank == 0
    for part in ("denoise", "request a", "dit 0", "100 s"):
        assert part in desk.reason("a")
    assert desk.ends("b") == [] and desk.state("b") is S.ENCODED
    assert not [drop for drop in desk.of(Drop) if drop.rank == 0]


def test_the_stage_that_runs_is_blamed_not_the_one_that_waits_for_it():
    desk = Desk(*ONE_AND_ONE, stage_timeout=100.0)
    desk.bring("a", S.AT_DECODER)
    desk.submit("b")
    desk.started("a", "decode")
    desk.wait(100.0)
    assert "the decode of request a on non_dit 1" in desk.reason("a")
    assert desk.state("b") is S.QUEUED


def test_a_stage_that_waits_for_its_busy_unit_is_not_late():
    desk = Desk(*ONE_AND_ONE, stage_timeout=100.0, transfer_timeout=1000.0)
    desk.bring("a", S.AT_DECODER)  # the worker encodes first
    for name in "bcdefg":
        desk.submit(name)
        desk.started(name, "encode")
        desk.wait(90.0)
        desk.encoded(name)
        assert not desk.of(Kill)
        desk.cancel(name)
        desk.dropped(name, 0, 1)
    desk.wait(99.0)
    assert not desk.of(Kill)
    desk.wait(1.0)
    assert "the decode of request a" in desk.reason("a")


def test_a_unit_that_does_not_come_up_is_killed_and_spawned_again():
    desk = Desk(("n", 2), ("ed", 1), up=False, startup_timeout=30.0)
    desk.bring_up(2)
    desk.bring_up(0)
    desk.wait(30.0)
    assert [kill.rank for kill in desk.of(Kill)] == [0, 1]
    desk.wait(1.0)
    assert desk.actions == [Spawn(0), Spawn(1)]


def test_the_deadline_of_a_start_ends_with_the_process():
    desk = Desk(*ONE_AND_ONE, up=False, startup_timeout=30.0)
    desk.bring_up(1)
    desk.wait(29.5)
    desk.down(0)
    desk.wait(0.1)
    assert desk.actions == [Spawn(0)]
    desk.wait(29.0)
    assert desk.actions == []


def test_the_deadline_of_an_opening_ends_with_its_units():
    desk = Desk(*ONE_AND_ONE, max_restarts=0)
    desk.edge_failed(1, 0)
    desk.down(0)
    desk.wait(59.0)  # before it is tried again
    assert desk.actions == []


def test_an_edge_that_does_not_open_is_tried_again():
    desk = Desk(*ONE_AND_ONE)
    desk.edge_failed(1, 0)
    desk.wait(60.0)
    assert [(end.rank, end.generation) for end in desk.of(OpenEdge)] == [(1, 3), (0, 3)]


def test_a_worker_that_does_not_drop_is_killed():
    desk = Desk(*ONE_AND_ONE, stage_timeout=50.0, transfer_timeout=10.0)
    desk.bring("a", S.AT_DIT)
    desk.bring("b", S.AT_DIT)
    desk.started("a", "denoise")
    desk.cancel("b")
    desk.dropped("b", 0)
    for _ in range(6):
        desk.do(StepDone(0, "a", 1, 8, desk.now))
        desk.wait(10.0)
    (kill,) = desk.of(Kill)
    assert kill.rank == 1 and "did not drop request b within 60 s" in kill.reason
