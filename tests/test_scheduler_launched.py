"""An encode that is announced before it is done: its hop is arranged meanwhile, and given up where it must be."""

from __future__ import annotations

import pytest
from scheduler_desk import ONE_AND_ONE, SPLIT, TWO_AND_ONE, Desk
from simulated_worker import header, request

from ditrelay.runtime.messages import (
    CloseEdge,
    Denoise,
    Drop,
    EdgeFailed,
    Encode,
    Expect,
    Finish,
    Kill,
    OpenEdge,
    Release,
    Send,
)
from ditrelay.runtime.request import RequestState

S = RequestState


def launched(*units: tuple[str, int], nbytes: int = 1, **config: object) -> Desk:
    """A desk whose request "a" is being encoded and announced."""
    desk = Desk(*units, **config)
    desk.submit("a")
    desk.launched("a", nbytes)
    return desk


def promised(desk: Desk, src: int, dst: int) -> int:
    return desk.scheduler._ledger.edges[src, dst].promised


# ---------------------------------------------------------------- the way forward


def test_both_ranks_are_told_when_the_encode_is_launched_and_nothing_more_when_it_is_done():
    desk = launched(*ONE_AND_ONE, nbytes=5)
    assert desk.actions == [Send(1, "a", 0, 1, 0, early=True), Expect(0, request("a"), 1, 1, 0, header("a", 5), True)]
    assert desk.state("a") is S.ENCODING and desk.used(1, 0) == 1
    desk.started("a", "encode")  # the device is behind the thread that launched it
    assert desk.state("a") is S.ENCODING and desk.used(1, 0) == 1
    desk.encoded("a", nbytes=5)
    assert desk.actions == [] and desk.state("a") is S.TO_DIT
    desk.received("a")
    assert desk.actions == [Denoise(0, "a")]
    desk.started("a", "denoise")
    assert desk.used(1, 0) == 0


def test_a_receiver_that_is_faster_than_the_word_of_the_sender_is_believed_when_that_comes():
    desk = launched(*ONE_AND_ONE)
    desk.received("a")
    assert desk.actions == [] and desk.state("a") is S.ENCODING
    desk.encoded("a")
    assert desk.actions == [Denoise(0, "a")] and desk.state("a") is S.AT_DIT


def test_every_state_is_passed_in_its_order():
    told: list[RequestState] = []
    desk = Desk(*ONE_AND_ONE)
    desk.scheduler._ledger._on_state = lambda name, state: told.append(state)
    desk.submit("a")
    desk.launched("a")
    desk.received("a")
    desk.encoded("a")
    assert told == [S.ENCODING, S.ENCODED, S.TO_DIT, S.AT_DIT]


def test_the_least_loaded_replica_is_promised_and_a_promise_counts_as_load():
    desk = Desk(*TWO_AND_ONE)
    desk.submit("a", "b")
    desk.launched("a")
    desk.launched("b")
    assert [send.dst for send in desk.of(Send, desk.log)] == [0, 1]


def test_transfers_of_an_edge_are_numbered_in_the_order_of_the_commands():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=3)
    desk.bring("a", S.TO_DIT)
    desk.submit("b", "c")
    desk.launched("b")
    desk.launched("c")
    for kind in (Send, Expect):
        assert [action.seq for action in desk.of(kind, desk.log)] == [0, 1, 2]


@pytest.mark.parametrize(
    "units, config",
    [((("en", 1), ("d", 1)), {}), ((("end", 1),), {}), (ONE_AND_ONE, {"lock_step": True})],
    ids=["denoised where it is encoded", "colocated", "lock-step"],
)
def test_where_nothing_is_sent_or_all_is_waited_for_an_announcement_changes_nothing(
    units: tuple[tuple[str, int], ...], config: dict[str, object]
):
    desk = Desk(*units, **config)
    desk.submit("a")
    before = desk.snapshot()
    desk.launched("a")
    assert desk.actions == [] and desk.snapshot() == before


def test_with_no_room_it_is_sent_when_it_is_done_as_ever():
    desk = Desk(*ONE_AND_ONE, max_pending_bytes=10, max_pending_transfers=3)
    desk.bring("a", S.AT_DIT)
    desk.submit("b")
    desk.launched("b", nbytes=10)
    assert desk.actions == []
    desk.started("a", "denoise")
    assert not desk.of(Send)
    desk.encoded("b", nbytes=10)
    assert desk.of(Send) == [Send(1, "b", 0, 1, 1)]


def test_an_announcement_twice_or_too_late_changes_nothing():
    desk = launched(*ONE_AND_ONE)
    desk.launched("a")
    assert desk.actions == []
    desk.encoded("a")
    desk.launched("a", rank=1)
    assert desk.actions == [] and desk.used(1, 0) == 1


def test_promises_keep_the_window_too():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=2)
    desk.submit("a", "b", "c")
    desk.launched("a")
    desk.launched("b")
    desk.encoded("a")
    assert desk.used(1, 0) == 2 and desk.state("c") is S.QUEUED


# ---------------------------------------------------------------- who must not wait for whom


def test_a_later_encode_is_not_promised_before_an_earlier_one_that_has_no_promise():
    desk = Desk(*ONE_AND_ONE, max_pending_bytes=10, max_pending_transfers=3)
    desk.bring("x", S.AT_DIT)
    desk.submit("a", "b")
    desk.launched("a", nbytes=10)  # no room
    desk.launched("b", nbytes=1)
    assert not desk.of(Send)
    desk.started("x", "denoise")
    desk.encoded("a", nbytes=10)
    assert [send.request_id for send in desk.of(Send)] == ["a"]


def test_nothing_is_promised_while_a_ready_payload_is_held():
    desk = Desk(*ONE_AND_ONE, max_pending_bytes=10, max_pending_transfers=3)
    desk.bring("x", S.AT_DIT)
    desk.submit("a", "b")
    desk.encoded("a", nbytes=10)
    desk.launched("b", nbytes=1)
    assert desk.state("a") is S.ENCODED and not desk.of(Send)


def test_a_ready_payload_takes_no_edge_on_which_one_in_the_making_is_awaited():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=3)
    desk.bring("a", S.TO_DIT)
    desk.submit("b")
    desk.launched("b")
    desk.rejected("a")
    assert desk.state("a") is S.ENCODED and promised(desk, 1, 0) == 1
    desk.encoded("b")
    assert [send.request_id for send in desk.of(Send)] == ["a"] and promised(desk, 1, 0) == 0


def test_an_encode_behind_a_cancelled_one_is_promised():
    desk = Desk(*ONE_AND_ONE)
    desk.submit("a", "b")
    desk.cancel("a")
    desk.launched("b")
    assert [send.request_id for send in desk.of(Send)] == ["b"]


# ---------------------------------------------------------------- losses


def test_a_failed_edge_takes_the_promise_and_the_encode_goes_on():
    desk = launched(*ONE_AND_ONE)
    desk.edge_failed(1, 0)
    opens = desk.of(OpenEdge)
    assert desk.of(Release) == [Release(0, "a")] and len(desk.of(CloseEdge)) == 2
    assert desk.state("a") is S.ENCODING and desk.used(1, 0) == 0
    desk.edges_up(opens)
    desk.encoded("a")
    assert desk.of(Send) == [Send(1, "a", 0, 2, 0)]
    assert desk.record("a").attempts == 0


def test_a_request_whose_early_transfer_failed_too_often_fails():
    desk = launched(*ONE_AND_ONE, max_attempts=1)
    desk.do(EdgeFailed(0, 1, 0, 1, "reset", "a", 0))
    assert desk.reason("a") == "edge 1->0 failed (reset) while it was encoded (1 attempts)"
    assert desk.of(Drop) == [Drop(1, "a")]
    desk.dropped("a", 1)
    assert desk.is_empty()


def test_what_arrived_over_an_edge_before_it_failed_stays_there():
    desk = launched(*ONE_AND_ONE)
    desk.received("a")
    desk.edge_failed(1, 0)
    assert not desk.of(Release)
    desk.encoded("a")
    assert desk.actions == [Denoise(0, "a")]
    desk.started("a", "denoise")
    assert desk.used(1, 0) == 0


def test_a_lost_replica_takes_the_promise_and_another_one_gets_the_conditioning():
    desk = launched(*TWO_AND_ONE)
    desk.down(0)
    assert not desk.of(Release) and desk.state("a") is S.ENCODING
    desk.encoded("a")
    assert desk.of(Send) == [Send(2, "a", 1, 1, 0)]
    assert desk.record("a").attempts == 0


@pytest.mark.parametrize("arrived", [False, True])
def test_a_lost_encoder_returns_the_credit_and_the_request_is_encoded_anew(arrived: bool):
    desk = launched(("n", 1), ("e", 1), ("e", 1), ("d", 1))
    if arrived:
        desk.received("a")
    desk.down(1)
    assert desk.of(Release) == [Release(0, "a")] and desk.used(1, 0) == 0
    assert desk.of(Encode) == [Encode(2, request("a"))]
    desk.launched("a")
    assert desk.of(Send) == [Send(2, "a", 0, 1, 0, early=True)]


def test_a_rejected_early_transfer_is_sent_again_when_the_encode_is_done():
    desk = launched(*ONE_AND_ONE)
    desk.rejected("a")
    assert desk.actions == [] and desk.used(1, 0) == 0 and desk.state("a") is S.ENCODING
    desk.encoded("a")
    assert desk.of(Send) == [Send(1, "a", 0, 1, 1)]
    assert desk.record("a").attempts == 1


def test_a_lost_role_fails_an_announced_request_and_returns_everything():
    desk = launched(*SPLIT, max_restarts=0)
    desk.down(0)
    assert "no rank is left for denoise" in desk.reason("a")
    desk.dropped("a", 1)
    assert desk.is_empty()


# ---------------------------------------------------------------- ends


def test_a_cancelled_one_is_dropped_at_both_ranks_and_its_credit_comes_back_from_the_receiver():
    desk = launched(*ONE_AND_ONE, max_pending_transfers=1)
    desk.submit("b")
    desk.cancel("a")
    assert desk.actions == [Finish("a", "cancelled"), Drop(1, "a"), Drop(0, "a")]
    desk.dropped("a", 1)
    assert desk.used(1, 0) == 1 and desk.state("b") is S.QUEUED
    desk.dropped("a", 0)
    assert desk.used(1, 0) == 0 and desk.state("b") is S.ENCODING


@pytest.mark.parametrize("crossing", ["encoded", "received", "rejected", "launched"])
def test_words_that_cross_the_drop_of_an_announced_request_change_nothing(crossing: str):
    desk = launched(*ONE_AND_ONE)
    desk.cancel("a")
    getattr(desk, crossing)("a")
    assert desk.actions == [] and desk.used(1, 0) == 1
    desk.dropped("a", 0, 1)
    assert desk.is_empty()


def test_a_failed_stage_is_dropped_at_the_receiver():
    desk = launched(*ONE_AND_ONE)
    desk.stage_failed("a", "encode")
    assert desk.of(Drop) == [Drop(0, "a")] and desk.used(1, 0) == 1
    desk.dropped("a", 0)
    assert desk.is_empty()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_cancelled_one_is_done_with_when_one_rank_is_lost_and_the_other_answers(lost: int):
    desk = launched(*ONE_AND_ONE)
    desk.cancel("a")
    desk.down(lost)
    desk.dropped("a", 1 - lost)
    assert desk.state("a") is None and desk.is_empty()


# ---------------------------------------------------------------- deadlines


def test_the_time_of_an_early_transfer_counts_from_the_end_of_the_encode():
    desk = launched(*ONE_AND_ONE, transfer_timeout=10.0, stage_timeout=100.0)
    desk.wait(90.0)
    assert desk.actions == []
    desk.encoded("a")
    desk.wait(9.0)
    assert desk.actions == []
    desk.wait(1.0)
    assert "did not arrive within 10 s" in desk.of(CloseEdge)[0].reason
    assert desk.state("a") is S.ENCODED


def test_an_encode_that_hangs_is_found_by_its_own_deadline():
    desk = launched(*ONE_AND_ONE, transfer_timeout=10.0, stage_timeout=100.0)
    desk.wait(100.0)
    assert [kill.rank for kill in desk.of(Kill)] == [1]
    assert "the encode of request a" in desk.reason("a")
    desk.dropped("a", 0)
    assert desk.is_empty()
