"""A request that runs out of memory is tried once more, alone on its unit; then it fails. Others only lose time."""

from __future__ import annotations

import pytest
from scheduler_desk import ONE_AND_ONE, TWO_AND_ONE, Desk

from ditrelay.runtime.messages import Denoise, Encode, Finish, Heartbeat, Send, StageFailed
from ditrelay.runtime.request import RequestState

S = RequestState
STATES = {"encode": S.ENCODING, "denoise": S.DENOISING, "decode": S.DECODING}


def run_out(desk: Desk, name: str, stage: str) -> None:
    rank = desk.rank_of(name)
    desk.do(StageFailed(rank, name, stage, f"{stage} ran out of memory", desk.now, None, True))


def lead_through_denoise(desk: Desk, name: str) -> None:
    """A request that waits at a DiT, or is there, leaves it and the fleet."""
    desk.started(name, "denoise")
    desk.denoised(name)
    desk.received(name)
    desk.started(name, "decode")
    desk.decoded(name)


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_it_is_tried_again_from_where_its_tensors_still_are(stage: str):
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", STATES[stage])
    run_out(desk, "a", stage)
    assert desk.ends("a") == []
    again = desk.of(Encode) if stage == "encode" else desk.of(Send)
    assert len(again) == 1
    assert desk.record("a").attempts == 0
    assert desk.record("a").state in (S.ENCODING, S.TO_DIT, S.TO_DECODER)


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_the_second_time_it_fails_and_says_so(stage: str):
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", STATES[stage])
    run_out(desk, "a", stage)
    if stage != "encode":
        desk.received("a")
        desk.started("a", stage)
    run_out(desk, "a", stage)
    assert desk.reason("a").startswith(f"{stage} ran out of memory (also with nothing else on its ranks")
    desk.dropped("a", 0, 1)
    assert desk.is_empty()


def test_it_waits_until_its_unit_is_rid_of_all_others_and_no_other_comes():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.DENOISING)
    desk.bring("b", S.AT_DIT)
    run_out(desk, "a", "denoise")
    assert not desk.of(Send), "b is still there"
    desk.submit("c")
    lead_through_denoise(desk, "b")
    assert [send.request_id for send in desk.of(Send, desk.log) if send.dst == 0] == ["a", "b", "a"]
    desk.received("a")
    desk.started("a", "denoise")
    desk.encoded("c")
    assert desk.state("c") is S.ENCODED, "a is alone"
    desk.denoised("a")
    assert [send.request_id for send in desk.of(Send) if send.dst == 0] == ["c"]


def test_the_others_take_another_replica_meanwhile():
    desk = Desk(*TWO_AND_ONE)
    desk.bring("a", S.DENOISING)
    run_out(desk, "a", "denoise")
    assert desk.rank_of("a") == 0
    for name in "bc":
        desk.bring(name, S.DENOISING)
        assert desk.rank_of(name) == 1


def test_the_windows_of_its_unit_shrink_and_grow_again():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=3)
    desk.bring("a", S.DENOISING)
    run_out(desk, "a", "denoise")
    assert [edge.window for edge in desk.snapshot().edges] == [1, 3]
    for _ in range(2):
        desk.do(Heartbeat(0, 0.0, device_total=100, device_allocated=50))
    assert [edge.window for edge in desk.snapshot().edges] == [3, 3]


def test_two_that_run_out_go_one_after_the_other():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.DENOISING)
    desk.bring("b", S.DENOISING)
    for name in "ab":
        run_out(desk, name, "denoise")
    assert (desk.state("a"), desk.state("b")) == (S.TO_DIT, S.ENCODED)
    desk.received("a")
    desk.started("a", "denoise")
    assert desk.state("b") is S.ENCODED
    desk.denoised("a")
    assert desk.state("b") is S.TO_DIT


def test_a_cancelled_one_opens_its_unit_to_the_others():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("x", S.DENOISING)
    desk.bring("a", S.DENOISING)
    run_out(desk, "a", "denoise")
    desk.submit("b")
    desk.cancel("a")
    desk.dropped("a", 1)
    desk.encoded("b")
    assert desk.state("b") is S.TO_DIT
    assert not desk.scheduler._ledger.closed


def test_when_its_unit_dies_it_goes_elsewhere():
    desk = Desk(*TWO_AND_ONE)
    desk.bring("x", S.DENOISING)
    desk.bring("y", S.DENOISING)
    desk.bring("a", S.DENOISING)
    unit = desk.rank_of("a")
    run_out(desk, "a", "denoise")
    assert desk.state("a") is S.ENCODED
    desk.down(unit)
    assert desk.state("a") is S.TO_DIT and desk.rank_of("a") == 1 - unit
    assert not desk.scheduler._ledger.closed


def test_when_its_payload_is_lost_it_is_encoded_again_like_any_other():
    desk = Desk(("n", 1), ("e", 1), ("d", 1))
    desk.bring("x", S.DENOISING)
    desk.bring("a", S.DENOISING)
    run_out(desk, "a", "denoise")
    desk.down(1)
    assert desk.state("a") is S.QUEUED
    assert not desk.scheduler._ledger.closed


def test_a_colocated_rank_takes_it_alone_from_the_encode_on():
    desk = Desk(("end", 1))
    desk.bring("a", S.DENOISING)
    run_out(desk, "a", "denoise")
    assert [encode.request.request_id for encode in desk.of(Encode)] == ["a"]
    desk.submit("b")
    desk.encoded("a")
    assert desk.of(Denoise) and desk.state("b") is S.QUEUED
    desk.started("a", "denoise")
    desk.denoised("a")
    assert desk.state("b") is S.ENCODING


def test_in_lock_step_it_is_simply_tried_again():
    desk = Desk(*ONE_AND_ONE, lock_step=True)
    desk.bring("a", S.DENOISING)
    run_out(desk, "a", "denoise")
    desk.wait(0.1)
    assert [send.request_id for send in desk.of(Send)] == ["a"]


def test_a_stage_that_fails_for_another_reason_is_not_tried_again():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.DENOISING)
    desk.stage_failed("a", "denoise")
    assert desk.of(Finish)[0].outcome == "failed"
