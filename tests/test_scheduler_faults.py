"""The scheduler when things go wrong: lost units, lost edges, failed stages."""

from __future__ import annotations

import pytest
from scheduler_desk import ONE_AND_ONE, SPLIT, TWO_AND_ONE, Desk

from ditrelay.runtime.messages import (
    CloseEdge,
    Denoise,
    Drop,
    EdgeFailed,
    EdgeUp,
    Encode,
    Expect,
    Finish,
    Kill,
    OpenEdge,
    Release,
    Send,
    Spawn,
    StepDone,
)
from ditrelay.runtime.request import RequestState

S = RequestState


# ---------------------------------------------------------------- lost units


def test_a_lost_replica_sends_its_requests_back_to_the_kept_conditioning():
    desk = Desk(*TWO_AND_ONE)
    desk.bring("a", S.DENOISING)
    assert desk.rank_of("a") == 0
    desk.down(0)
    desk.wait(0.1)
    assert desk.of(Send) == [Send(2, "a", 1, 1, 0)]
    assert not desk.of(Encode)
    assert desk.record("a").attempts == 1


def test_a_lost_decoder_sends_the_kept_latents_again():
    desk = Desk(("n", 1), ("e", 1), ("d", 1), ("d", 1))
    desk.bring("a", S.DECODING)
    assert desk.rank_of("a") == 2
    desk.down(2)
    desk.wait(0.1)
    assert desk.of(Send) == [Send(0, "a", 3, 1, 0)]
    assert [expect.rank for expect in desk.of(Expect)] == [3]
    assert not desk.of(Denoise)


def test_without_another_replica_the_conditioning_is_held_until_one_is_back():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.DENOISING)
    desk.down(0)
    assert desk.state("a") is S.ENCODED
    desk.wait(1.0)
    assert desk.actions == [Spawn(0)]
    desk.bring_up(0)
    assert desk.of(Send, desk.log)[-1] == Send(1, "a", 0, 2, 0)


def test_a_request_whose_payload_is_lost_goes_to_the_front_of_the_queue():
    desk = Desk(*SPLIT, max_queue=8)
    desk.bring("a", S.TO_DIT)
    desk.submit("b", "c", "d")
    desk.down(1)
    assert [record.id for record in desk.scheduler._ledger.queue] == ["a", "b", "c", "d"]
    assert Release(0, "a") in desk.actions  # it may have arrived unseen
    assert desk.used(1, 0) == 0


def test_a_lost_source_does_not_matter_once_the_payload_has_arrived():
    desk = Desk(*SPLIT)
    desk.bring("a", S.AT_DIT)
    desk.bring("b", S.DENOISING)
    desk.down(1)
    assert (desk.state("a"), desk.state("b")) == (S.AT_DIT, S.DENOISING)
    assert desk.record("a").attempts == 0
    desk.started("a", "denoise")
    desk.denoised("b")
    desk.denoised("a")
    assert Release(1, "a") not in desk.log


def test_a_request_that_only_waited_on_a_lost_worker_has_no_attempt_counted():
    desk = Desk(*ONE_AND_ONE, max_attempts=2, max_restarts=9)
    desk.bring("poison", S.DENOISING)
    desk.bring("bystander", S.AT_DIT)
    desk.bring("behind", S.TO_DIT)
    desk.down(0)
    assert [desk.record(name).attempts for name in ("poison", "bystander", "behind")] == [1, 0, 0]


def test_a_request_that_may_have_caused_a_loss_waits_before_its_next_try_the_others_do_not():
    desk = Desk(*[("n", 1)] * 4, ("ed", 1), max_attempts=4)
    desk.bring("a", S.DENOISING)
    desk.submit("b")  # its encode goes on beside all this
    for delay in (0.1, 1.0, 1.0):
        rank = desk.rank_of("a")
        desk.down(rank)
        assert desk.state("a") is S.ENCODED and not desk.of(Send)
        desk.wait(delay - 0.05)
        assert not [send for send in desk.of(Send) if send.request_id == "a"]
        desk.wait(0.06)
        assert [send.request_id for send in desk.of(Send)] == ["a"]
        desk.received("a")
        desk.started("a", "denoise")
    assert desk.record("a").attempts == 3
    assert desk.state("b") is S.ENCODING


def test_what_waits_for_its_next_try_can_be_cancelled_and_lose_its_payload():
    desk = Desk(*SPLIT, max_attempts=4)
    for name in "ab":
        desk.bring(name, S.DENOISING)
    desk.down(0)
    desk.cancel("a")
    desk.dropped("a", 1)
    assert desk.ends("a") == [("cancelled", None)]
    desk.down(1)
    assert desk.state("b") is S.QUEUED
    assert [record.id for record in desk.scheduler._ledger.queue] == ["b"]
    desk.wait(1.0)
    assert [record.id for record in desk.scheduler._ledger.queue] == ["b"]


def test_only_the_request_whose_transfer_failed_has_an_attempt_counted():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.TO_DIT)
    desk.bring("b", S.TO_DIT)
    desk.do(EdgeFailed(0, 1, 0, 1, "reset", "a", 0))
    assert [desk.record(name).attempts for name in ("a", "b")] == [1, 0]


def test_a_lost_member_takes_its_whole_unit_down():
    desk = Desk(("n", 3), ("ed", 1))
    desk.down(1)
    assert [kill.rank for kill in desk.of(Kill)] == [0, 2]
    assert {(close.rank, close.src, close.dst) for close in desk.of(CloseEdge)} == {(3, 3, 0), (3, 0, 3)}
    desk.wait(1.0)
    assert desk.actions == [Spawn(0), Spawn(1), Spawn(2)]
    assert desk.scheduler.worker_state(2) == "starting"


def test_a_request_that_is_set_back_too_often_fails_with_the_last_reason():
    desk = Desk(*ONE_AND_ONE, max_attempts=2, max_restarts=9)
    desk.bring("a", S.DENOISING)
    desk.down(0)
    desk.wait(1.0)
    desk.bring_up(0)
    desk.received("a")
    desk.started("a", "denoise")
    desk.down(0)
    assert desk.reason("a") == "worker 0 died (exit code -9) while it was denoised (2 attempts)"
    desk.dropped("a", 1)
    assert desk.is_empty()


def test_a_lost_role_fails_who_needs_it_and_only_those():
    desk = Desk(*SPLIT, max_restarts=0)
    desk.bring("past it", S.TO_DECODER)
    desk.bring("at it", S.DENOISING)
    desk.bring("before it", S.ENCODING)
    desk.down(1)
    assert desk.state("past it") is S.TO_DECODER
    assert desk.state("at it") is S.DENOISING
    assert "no rank is left for encode" in desk.reason("before it")
    desk.submit("new")
    assert "no rank is left for encode" in desk.reason("new")
    assert desk.state("new") is None


def test_who_falls_back_behind_a_lost_role_fails():
    desk = Desk(*SPLIT, max_restarts=0)
    desk.bring("a", S.DENOISING)
    desk.down(1)
    desk.down(0)
    assert "no rank is left for encode" in desk.reason("a")
    assert desk.is_empty()


def test_lock_step_decodes_elsewhere_when_the_encoders_unit_is_lost():
    desk = Desk(("n", 1), ("ed", 1), ("ed", 1), lock_step=True)
    desk.bring("a", S.DENOISING)
    desk.edge_failed(0, 1)  # not open yet when the latents are ready
    desk.denoised("a")
    assert desk.state("a") is S.DENOISED
    desk.down(1)
    assert desk.of(Send) == [Send(0, "a", 2, 1, 0)]


def test_words_of_a_lost_worker_that_cross_its_end_are_harmless():
    desk = Desk(*TWO_AND_ONE)
    desk.bring("a", S.DENOISING)
    desk.down(0)
    before = desk.snapshot()
    desk.do(StepDone(0, "a", 3, 8, 0.0))
    assert desk.actions == []
    assert desk.snapshot() == before


# ---------------------------------------------------------------- lost edges


def test_a_failed_edge_is_closed_and_opened_under_a_new_generation():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.TO_DIT)
    desk.edge_failed(1, 0)
    closes, opens = desk.of(CloseEdge), desk.of(OpenEdge)
    assert [(close.rank, close.generation) for close in closes] == [(1, 1), (0, 1)]
    assert [(end.rank, end.generation) for end in opens] == [(1, 2), (0, 2)]
    assert desk.actions.index(closes[1]) < desk.actions.index(Release(0, "a"))
    assert desk.state("a") is S.ENCODED
    desk.edges_up(opens)
    assert desk.of(Send) == [Send(1, "a", 0, 2, 0)]


def test_a_failed_edge_leaves_what_has_arrived_alone():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.AT_DIT)
    desk.edge_failed(1, 0)
    assert desk.state("a") is S.AT_DIT
    assert desk.used(1, 0) == 1
    desk.started("a", "denoise")
    assert desk.used(1, 0) == 0


def test_a_payload_goes_over_another_edge_when_its_own_fails():
    desk = Desk(*TWO_AND_ONE)
    desk.bring("a", S.TO_DIT)
    desk.edge_failed(2, 0)
    assert desk.of(Send) == [Send(2, "a", 1, 1, 0)]


def test_events_of_an_older_generation_change_nothing():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.TO_DIT)
    late = desk.received_event("a")
    desk.edge_failed(1, 0)
    before = desk.snapshot()
    for event in (late, EdgeUp(1, 1, 0, 1), EdgeFailed(0, 1, 0, 1, "closed"), EdgeUp(0, 1, 0, 7)):
        assert desk.do(event) == []
    assert desk.snapshot() == before
    desk.do(EdgeUp(1, 1, 0, 2))
    desk.do(EdgeUp(0, 1, 0, 2))
    assert desk.state("a") is S.TO_DIT and desk.record("a").seq == late.seq
    assert desk.do(late) == []
    assert desk.state("a") is S.TO_DIT


def test_an_edge_that_only_fails_takes_its_destination_down():
    desk = Desk(*TWO_AND_ONE)
    for _ in range(3):
        desk.edge_failed(2, 0)
        assert not desk.of(Kill)
    desk.edge_failed(2, 0)
    (kill,) = desk.of(Kill)
    assert kill.rank == 0 and "edge 2->0 failed 4 times in a row" in kill.reason


def test_a_restart_of_either_end_forgives_an_edge():
    desk = Desk(*ONE_AND_ONE, max_restarts=9)
    for _ in range(3):
        desk.edge_failed(1, 0)
    desk.down(0)
    desk.wait(1.0)
    desk.bring_up(0)
    desk.edge_failed(1, 0)
    assert not desk.of(Kill)


def test_a_transfer_in_between_forgives_an_edge():
    desk = Desk(*ONE_AND_ONE)
    for _ in range(3):
        desk.edge_failed(1, 0)
    desk.edges_up(desk.of(OpenEdge))
    desk.bring("a", S.AT_DIT)
    desk.edge_failed(1, 0)
    assert not desk.of(Kill)


def test_a_rejected_payload_is_sent_again_and_counts_as_an_attempt():
    desk = Desk(*ONE_AND_ONE, max_attempts=3)
    desk.bring("a", S.TO_DIT)
    desk.rejected("a")
    assert desk.of(Send) == [Send(1, "a", 0, 1, 1)]
    assert not desk.of(Release)
    desk.rejected("a")
    desk.rejected("a")
    assert "transfer 1->0 #2 was rejected (checksum differs)" in desk.reason("a")
    desk.dropped("a", 1)
    assert desk.is_empty()


# ---------------------------------------------------------------- failed stages


@pytest.mark.parametrize("stage, state", [("encode", S.ENCODING), ("denoise", S.DENOISING), ("decode", S.DECODING)])
def test_a_failed_stage_fails_its_request_at_once_and_frees_the_rest(stage: str, state: RequestState):
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", state)
    desk.stage_failed("a", stage, "prompt")
    assert desk.of(Finish) == [Finish("a", "failed", "out of memory", "prompt")]
    desk.dropped("a", *(drop.rank for drop in desk.of(Drop)))
    assert desk.is_empty()
    assert desk.state("a") is None


def test_a_stage_that_fails_before_it_starts_returns_its_credit():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.AT_DIT)
    desk.stage_failed("a", "denoise")
    assert desk.of(Drop) == [Drop(1, "a")]
    assert desk.used(1, 0) == 0
    desk.dropped("a", 1)
    assert desk.is_empty()
