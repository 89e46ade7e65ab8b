"""Cancelled requests: the client's end at once, resources back when the workers say so."""

from __future__ import annotations

import pytest
from scheduler_desk import ONE_AND_ONE, SPLIT, TWO_AND_ONE, Desk
from simulated_worker import header, request

from ditrelay.runtime.messages import (
    Drop,
    Encode,
    Encoded,
    Finish,
    Send,
)
from ditrelay.runtime.request import RequestState

S = RequestState


def test_a_queued_request_is_cancelled_without_a_word_to_anyone():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=1)
    desk.submit("a", "b")
    desk.cancel("b")
    assert desk.actions == [Finish("b", "cancelled")]
    assert desk.state("b") is None


@pytest.mark.parametrize(
    "state, told",
    [
        (S.ENCODING, [1]),
        (S.TO_DIT, [1, 0]),
        (S.AT_DIT, [1, 0]),
        (S.DENOISING, [1, 0]),
        (S.TO_DECODER, [0, 2]),
        (S.AT_DECODER, [0, 2]),
        (S.DECODING, [0, 2]),
    ],
)
def test_a_cancelled_request_is_dropped_by_everyone_who_has_something_of_it(state: RequestState, told: list[int]):
    desk = Desk(*SPLIT)
    desk.bring("a", state)
    desk.cancel("a")
    assert desk.actions == [Finish("a", "cancelled"), *(Drop(rank, "a") for rank in told)]
    assert desk.state("a") is S.CANCELLED
    desk.dropped("a", *told)
    assert desk.state("a") is None
    assert desk.is_empty()


def test_a_cancel_with_a_reason_is_a_failure():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.DENOISING)
    desk.cancel("a", "not done within 5 s")
    assert desk.ends("a") == [("failed", "not done within 5 s")]


def test_a_request_is_cancelled_once():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.DENOISING)
    desk.cancel("a")
    desk.cancel("a")
    assert desk.actions == []


def test_credits_of_a_cancelled_transfer_return_only_when_the_receiver_is_free():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=1)
    desk.bring("a", S.TO_DIT)
    desk.submit("b")
    landed = desk.received_event("a")
    desk.cancel("a")
    desk.dropped("a", 1)
    desk.do(landed)  # crossed the Drop
    assert desk.used(1, 0) == 1 and desk.state("b") is S.QUEUED
    desk.dropped("a", 0)
    assert desk.used(1, 0) == 0 and desk.state("b") is S.ENCODING


def test_the_place_of_a_cancelled_encode_is_taken_until_it_is_dropped():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=4)
    desk.submit("a", "b", "c")
    encoded = Encoded(1, "a", header("a", 1), 0.0, 0.0)
    desk.cancel("a")
    desk.do(encoded)  # crossed the Drop
    assert desk.state("c") is S.QUEUED and not desk.of(Send)
    desk.dropped("a", 1)
    assert desk.actions == [Encode(1, request("c"))]


def test_a_cancel_lets_those_behind_a_held_payload_go():
    desk = Desk(*ONE_AND_ONE, max_pending_bytes=10, max_pending_transfers=3)
    desk.submit("a", "b")
    desk.encoded("a", nbytes=8)
    desk.encoded("b", nbytes=6)
    desk.submit("c")
    desk.encoded("c", nbytes=1)
    desk.cancel("b")
    assert [send.request_id for send in desk.of(Send)] == ["c"]


def test_a_lost_unit_answers_its_drops():
    desk = Desk(*TWO_AND_ONE)
    desk.bring("a", S.DENOISING)
    desk.cancel("a")
    desk.down(0)
    desk.dropped("a", 2)
    assert desk.state("a") is None
    assert desk.is_empty()
