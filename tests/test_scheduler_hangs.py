"""When a stage hangs: what it usually takes is measured, and much longer than that is no patience but a hang."""

from __future__ import annotations

import pytest
from scheduler_desk import ONE_AND_ONE, TWO_AND_ONE, Desk

from ditrelay.runtime.messages import Kill, Spawn
from ditrelay.runtime.request import RequestState

S = RequestState
LIMITS = dict(hang_timeout=20.0, stage_timeout=600.0, transfer_timeout=1000.0)
SMALL = dict(height=256, width=256)
LARGE = dict(height=1024, width=1024)


def denoise(desk: Desk, name: str, step_seconds: float, **size: int) -> None:
    """One request that takes so long for a step; then it is decoded."""
    desk.bring(name, S.DENOISING, **size)
    desk.stepped(name, 1, after=step_seconds)
    desk.stepped(name, 2, after=step_seconds)
    desk.denoised(name)
    desk.received(name)
    desk.started(name, "decode")
    desk.decoded(name)


def seconds_until_killed(desk: Desk, most: float = 700.0) -> float:
    began = desk.now
    while not desk.of(Kill):
        assert desk.now - began < most, f"nothing was killed within {most:g} s"
        desk.wait(1.0)
    return desk.now - began


def test_a_step_that_takes_far_longer_than_the_steps_before_is_a_hang():
    desk = Desk(*TWO_AND_ONE, **LIMITS)
    for name in ("first", "second"):
        denoise(desk, name, 5.0)
    desk.bring("a", S.DENOISING)
    desk.stepped("a", 1, after=5.0)
    assert desk.rank_of("a") == 0
    assert seconds_until_killed(desk) == 50.0
    (kill,) = desk.of(Kill)
    for part in ("the denoise of request a", "dit 0", "after step 1", "for 50 s", "10 times the usual 5 s"):
        assert part in kill.reason


def test_a_hang_is_an_attempt_and_the_request_is_tried_again():
    desk = Desk(*ONE_AND_ONE, **LIMITS)
    denoise(desk, "first", 0.5)
    denoise(desk, "second", 0.5)
    desk.bring("a", S.DENOISING)
    assert seconds_until_killed(desk) == 20.0
    assert "--dist-timeout; usual are 0.5 s" in desk.of(Kill)[0].reason
    assert (desk.state("a"), desk.record("a").attempts) == (S.ENCODED, 1)
    desk.wait(1.0)
    assert Spawn(0) in desk.log[-3:]


def test_the_first_run_of_a_shape_may_take_the_whole_stage_timeout():
    desk = Desk(*ONE_AND_ONE, **LIMITS)
    denoise(desk, "a", 100.0, **SMALL)
    desk.bring("b", S.DENOISING, **LARGE)
    assert seconds_until_killed(desk) == 600.0
    assert "--stage-timeout" in desk.reason("b")


def test_the_first_run_after_a_restart_may_compile_again():
    desk = Desk(*ONE_AND_ONE, **LIMITS)
    denoise(desk, "a", 0.5)
    denoise(desk, "b", 0.5)
    desk.down(0)
    desk.wait(1.0)
    desk.bring_up(0)
    denoise(desk, "c", 100.0)
    desk.bring("d", S.DENOISING)
    assert seconds_until_killed(desk) == 20.0, "the long first run is not measured"


def test_a_size_that_was_not_measured_is_judged_by_a_smaller_one_in_proportion():
    desk = Desk(*ONE_AND_ONE, **LIMITS)
    denoise(desk, "first", 0.5, **LARGE)
    for name in "ab":
        denoise(desk, name, 0.5, **SMALL)
    desk.bring("b2", S.DENOISING, **LARGE)
    assert seconds_until_killed(desk) == 80.0  # 16 times the pixels


def test_a_smaller_size_is_not_judged_faster_than_a_larger_one():
    desk = Desk(*ONE_AND_ONE, **LIMITS)
    denoise(desk, "first", 4.0, **SMALL)
    for name in "ab":
        denoise(desk, name, 4.0, **LARGE)
    desk.bring("c", S.DENOISING, **SMALL)
    assert seconds_until_killed(desk) == 40.0


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_an_encode_or_decode_is_judged_as_a_whole(stage: str):
    desk = Desk(*ONE_AND_ONE, **LIMITS)
    for name in "ab":
        desk.submit(name)
        desk.started(name, "encode")
        desk.now += 3.0
        desk.encoded(name)
        desk.received(name)
        desk.started(name, "denoise")
        desk.denoised(name)
        desk.received(name)
        desk.started(name, "decode")
        desk.now += 3.0
        desk.decoded(name)
    desk.bring("c", S.ENCODING if stage == "encode" else S.DECODING)
    if stage == "encode":
        desk.started("c", "encode")
    assert seconds_until_killed(desk) == 30.0
    assert f"the {stage} of request c on non_dit 1" in desk.of(Kill)[0].reason


def test_of_two_decodes_the_one_whose_file_is_not_made_is_blamed():
    desk = Desk(*ONE_AND_ONE, **LIMITS)
    for name in "yz":
        desk.bring(name, S.AT_DECODER)
    for name in "yz":
        desk.started(name, "decode")  # the device decodes the second while the first one's file is made
    seconds_until_killed(desk)
    assert "the decode of request y" in desk.of(Kill)[0].reason


def test_what_waits_behind_a_first_run_is_not_late():
    desk = Desk(*ONE_AND_ONE, **LIMITS)
    denoise(desk, "a", 0.5, **SMALL)
    denoise(desk, "b", 0.5, **SMALL)
    desk.bring("large", S.DENOISING, **LARGE)
    desk.bring("small", S.AT_DIT, **SMALL)
    for _ in range(500):
        desk.wait(1.0)
        assert not desk.of(Kill)


def test_a_cancelled_stage_that_never_stops_is_a_hang_too():
    desk = Desk(*ONE_AND_ONE, **{**LIMITS, "transfer_timeout": 30.0})
    denoise(desk, "a", 0.5)
    denoise(desk, "b", 0.5)
    desk.bring("c", S.DENOISING)
    desk.cancel("c")
    desk.dropped("c", 1)
    assert seconds_until_killed(desk) == 50.0
