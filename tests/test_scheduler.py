"""The scheduler on a healthy fleet: dispatch, hops, credits, bounds, lock-step."""

from __future__ import annotations

import msgspec
import pytest
from scheduler_desk import ONE_AND_ONE, SPLIT, Desk
from simulated_worker import header, request

from ditrelay.runtime.messages import (
    CancelRequest,
    Decode,
    Decoded,
    Denoise,
    Denoised,
    Dropped,
    EdgeUp,
    Encode,
    Encoded,
    Expect,
    Finish,
    Heartbeat,
    OpenEdge,
    Received,
    Reject,
    Release,
    SchedulerEvent,
    Send,
    Sent,
    Spawn,
    StageFailed,
    Started,
    StepDone,
    Submit,
    TransferRejected,
    WorkerUp,
)
from ditrelay.runtime.request import RequestState
from ditrelay.runtime.scheduler import Scheduler, SchedulerConfig

S = RequestState
THREE_AND_ONE = (("n", 1), ("n", 1), ("n", 1), ("ed", 1))


def test_start_spawns_every_rank():
    desk = Desk(("n", 2), ("ed", 1), up=False)
    assert desk.actions == [Spawn(0), Spawn(1), Spawn(2)]
    assert [desk.scheduler.worker_state(rank) for rank in range(3)] == ["starting"] * 3


def test_a_unit_is_up_when_all_of_its_members_are():
    desk = Desk(("n", 2), ("ed", 1), up=False)
    desk.do(WorkerUp(2, 1, 0.0))
    assert desk.do(WorkerUp(0, 1, 0.0)) == []
    opened = desk.do(WorkerUp(1, 1, 0.0))
    assert opened == [OpenEdge(2, 2, 0, 1), OpenEdge(0, 2, 0, 1), OpenEdge(0, 0, 2, 1), OpenEdge(2, 0, 2, 1)]


def test_an_edge_is_usable_when_both_ends_are_up():
    desk = Desk(*ONE_AND_ONE, up=False)
    desk.do(WorkerUp(0, 1, 0.0))
    desk.do(WorkerUp(1, 1, 0.0))
    desk.submit("a")
    assert desk.do(EdgeUp(1, 1, 0, 1)) == []
    assert desk.do(EdgeUp(0, 1, 0, 1)) == [Encode(1, request("a"))]
    assert not desk.scheduler.ready
    desk.do(EdgeUp(0, 0, 1, 1))
    desk.do(EdgeUp(1, 0, 1, 1))
    assert desk.scheduler.ready


def test_the_life_of_a_request():
    desk = Desk(*ONE_AND_ONE)
    desk.submit("a")
    assert desk.actions == [Encode(1, request("a"))]
    desk.started("a", "encode")
    assert desk.state("a") is S.ENCODING
    desk.encoded("a", nbytes=5)
    send, expect = desk.actions
    assert send == Send(1, "a", 0, 1, 0)
    assert isinstance(expect, Expect) and (expect.rank, expect.src, expect.seq, expect.header.nbytes) == (0, 1, 0, 5)
    desk.received("a")
    assert desk.actions == [Denoise(0, "a")]
    desk.started("a", "denoise")
    desk.denoised("a", nbytes=3)
    assert desk.actions[0] == Release(1, "a")
    assert desk.actions[1] == Send(0, "a", 1, 1, 0)
    desk.received("a")
    assert desk.actions == [Decode(1, "a")]
    desk.started("a", "decode")
    desk.decoded("a")
    assert desk.actions == [Release(0, "a"), Finish("a", "done")]
    assert desk.state("a") is None
    assert desk.is_empty()
    assert desk.snapshot().done == 1


def test_every_change_of_state_is_told():
    told: list[tuple[str, RequestState]] = []
    desk = Desk(*ONE_AND_ONE)
    desk.scheduler._ledger._on_state = lambda name, state: told.append((name, state))
    desk.bring("a", S.DECODING)
    desk.decoded("a")
    order = list(S)
    assert told == [("a", state) for state in order[1 : order.index(S.DONE) + 1]]


def test_requests_past_the_queue_limit_are_rejected_and_leave_nothing():
    desk = Desk(*ONE_AND_ONE, max_queue=1)
    desk.submit("a", "b", "c")  # two are at the encoder, one waits
    desk.submit("d")
    assert desk.actions == [Reject("d", 1)]
    assert desk.state("d") is None
    assert desk.snapshot().queued == 1


def test_a_request_id_is_used_once():
    desk = Desk(*ONE_AND_ONE)
    desk.submit("a")
    with pytest.raises(AssertionError, match="in use"):
        desk.submit("a")


def test_an_encoder_has_one_encode_running_and_one_queued():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=8)
    desk.submit("a", "b", "c")
    assert [desk.state(name) for name in "abc"] == [S.ENCODING, S.ENCODING, S.QUEUED]
    desk.encoded("a")
    assert desk.of(Encode) == [Encode(1, request("c"))]


def test_the_encoder_with_the_least_work_is_chosen():
    desk = Desk(("n", 1), ("ed", 1), ("ed", 1))
    desk.submit("a", "b", "c")
    assert [desk.rank_of(name) for name in "abc"] == [1, 2, 1]


def test_nothing_is_encoded_without_a_credit_for_the_hop():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=2)
    for name in ("a", "b"):
        desk.bring(name, S.AT_DIT)
    desk.submit("c")
    assert desk.state("c") is S.QUEUED
    desk.started("a", "denoise")  # its input leaves the window
    assert desk.of(Encode) == [Encode(1, request("c"))]


def test_what_is_on_the_way_and_waits_never_passes_the_window():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=2)
    desk.submit("a", "b", "c", "d")
    desk.encoded("a")
    desk.encoded("b")
    assert desk.used(1, 0) == 2
    assert desk.state("c") is S.QUEUED


def test_a_replica_is_chosen_when_the_encode_is_done():
    desk = Desk(("n", 1), ("n", 1), ("ed", 1))
    desk.submit("a", "b")
    desk.encoded("b")  # the later request is encoded first and takes the first replica
    desk.encoded("a")
    assert (desk.rank_of("b"), desk.rank_of("a")) == (0, 1)


def test_a_larger_replica_takes_proportionally_more():
    desk = Desk(("n", 1), ("n", 2), ("ed", 1), max_pending_transfers=4)
    chosen = []
    for name in "abcdef":
        desk.bring(name, S.TO_DIT)
        chosen.append(desk.rank_of(name))
    assert chosen == [1, 0, 1, 1, 0, 1]


def test_next_conditioning_is_there_before_the_denoise_ends():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=3)
    desk.bring("a", S.DENOISING)
    desk.bring("b", S.AT_DIT)
    assert desk.actions == [Denoise(0, "b")]  # queued at the worker while "a" runs
    desk.bring("c", S.AT_DIT)
    desk.denoised("a")
    assert Denoise(0, "c") in desk.actions


def test_nothing_is_denoised_without_a_credit_for_the_way_back():
    desk = Desk(*ONE_AND_ONE, max_pending_transfers=1)
    desk.bring("a", S.AT_DECODER)
    desk.bring("b", S.AT_DIT)
    assert not desk.of(Denoise)
    desk.started("a", "decode")
    assert desk.of(Denoise) == [Denoise(0, "b")]


def test_decodes_are_spread_over_the_decoders_when_the_latents_are_ready():
    desk = Desk(("n", 1), ("e", 1), ("d", 1), ("d", 1))
    for name in ("a", "b"):
        desk.bring(name, S.TO_DECODER)
    assert {desk.rank_of("a"), desk.rank_of("b")} == {2, 3}


def test_payloads_past_the_byte_budget_are_held_and_sent_oldest_first():
    desk = Desk(*ONE_AND_ONE, max_pending_bytes=10, max_pending_transfers=3)
    desk.submit("a", "b")
    desk.encoded("a", nbytes=8)
    desk.encoded("b", nbytes=6)
    desk.submit("c")
    desk.encoded("c", nbytes=1)  # would fit, but must not starve "b"
    assert [desk.state(name) for name in "abc"] == [S.TO_DIT, S.ENCODED, S.ENCODED]
    assert desk.snapshot().kept_bytes == 15
    desk.received("a")
    desk.started("a", "denoise")
    assert [send.request_id for send in desk.of(Send)] == ["b", "c"]


def test_a_payload_larger_than_the_budget_fails_its_request_and_says_how_to_help():
    desk = Desk(*ONE_AND_ONE, max_pending_bytes=10)
    desk.submit("a")
    desk.encoded("a", nbytes=11)
    assert all(part in desk.reason("a") for part in ("--max-pending-bytes", "11", "10"))
    desk.dropped("a", 1)
    assert desk.is_empty()


def test_transfers_are_numbered_per_edge():
    desk = Desk(("n", 1), ("n", 1), ("ed", 1))
    for name in "abcd":
        desk.bring(name, S.TO_DIT)
    sends = [(send.dst, send.seq) for send in desk.of(Send, desk.log)]
    assert sends == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_a_colocated_unit_keeps_its_requests():
    desk = Desk(("end", 1), ("end", 1))
    desk.submit("a")
    desk.encoded("a")
    assert desk.actions == [Denoise(0, "a")]
    desk.started("a", "denoise")
    desk.denoised("a")
    assert desk.actions == [Decode(0, "a")]
    desk.decoded("a")
    assert desk.actions == [Finish("a", "done")]
    assert desk.is_empty()


def test_colocated_units_share_the_requests():
    desk = Desk(("end", 1), ("end", 1))
    desk.bring("a", S.DENOISING)
    desk.submit("b")
    assert desk.rank_of("b") == 1


def test_the_window_bounds_a_colocated_unit_too():
    desk = Desk(("end", 1), max_pending_transfers=1)
    desk.bring("a", S.AT_DIT)
    desk.submit("b")
    assert desk.state("b") is S.QUEUED
    desk.started("a", "denoise")
    assert desk.state("b") is S.ENCODING


def test_lock_step_has_one_request_per_encoder():
    desk = Desk(*THREE_AND_ONE, lock_step=True)
    desk.submit("a", "b")
    for advance in (
        lambda: desk.encoded("a"),
        lambda: desk.received("a"),
        lambda: desk.started("a", "denoise"),
        lambda: desk.denoised("a"),
        lambda: desk.received("a"),
        lambda: desk.started("a", "decode"),
    ):
        advance()
        assert desk.state("b") is S.QUEUED
    desk.decoded("a")
    assert desk.of(Encode) == [Encode(3, request("b"))]


def test_lock_step_decodes_where_it_encoded():
    desk = Desk(("n", 1), ("n", 1), ("ed", 1), ("ed", 1), lock_step=True)
    desk.submit("a", "b")
    assert [desk.rank_of(name) for name in "ab"] == [2, 3]
    for name in ("b", "a"):
        desk.encoded(name)
        desk.received(name)
        desk.denoised(name)
    assert [desk.rank_of(name) for name in "ab"] == [2, 3]


@pytest.mark.parametrize(
    "event",
    [
        Started(0, "x", "denoise", 0.0),
        StepDone(0, "x", 1, 8, 0.0),
        Encoded(1, "x", header("x", 1), 0.0, 0.0),
        Sent(1, "x", 0, 1, 0, 0.0, 0.0),
        Received(0, "x", 1, 1, 0, 0.0, 0.0),
        TransferRejected(0, "x", 1, 1, 0, "checksum"),
        Denoised(0, "x", header("x", 1), 0.0, 0.0),
        Decoded(1, "x", b"", "image/png", 8, 8, 1, 0.0, 0.0),
        StageFailed(0, "x", "denoise", "no memory", 0.0),
        Dropped(0, "x"),
        CancelRequest("x"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_an_event_of_an_unknown_request_changes_nothing(event: SchedulerEvent):
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.DENOISING)
    before = desk.snapshot()
    assert desk.do(event) == []
    assert desk.snapshot() == before


def test_repr_is_a_summary():
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", S.DENOISING)
    desk.submit("b")
    text = "<Scheduler 2/2 units, 2/2 edges up; 1 encoding, 1 denoising; ended: 0 done, 0 failed, 0 cancelled>"
    assert repr(desk.scheduler) == text


def test_submit_before_anything_is_up_waits():
    desk = Desk(*ONE_AND_ONE, up=False)
    desk.submit("a")
    assert desk.actions == []
    desk.bring_up()
    assert desk.state("a") is S.ENCODING


def test_schedulers_share_nothing():
    desk = Desk(*ONE_AND_ONE)
    desk.submit("a")
    other = Scheduler(desk.topology, SchedulerConfig())
    other.start(0.0)
    assert other.on_event(Submit(request("a")), 0.0) == []


# ---------------------------------------------------------------- adaptive window


def beat(desk: Desk, rank: int, share: float) -> None:
    desk.do(Heartbeat(rank, desk.now, device_total=100, device_allocated=round(100 * share)))


def window(desk: Desk, src: int, dst: int) -> int:
    return next(edge.window for edge in desk.snapshot().edges if edge.edge == (src, dst))


def test_the_window_to_a_full_rank_shrinks_to_one_and_grows_back():
    desk = Desk(("n", 1), ("ed", 1), max_pending_transfers=3)
    seen = []
    for share in (0.85, 0.95, 0.95, 0.95, 0.85, 0.7, 0.7, 0.7):
        beat(desk, 0, share)
        seen.append(window(desk, 1, 0))
    assert seen == [3, 2, 1, 1, 1, 2, 3, 3]
    assert window(desk, 0, 1) == 3


def test_a_smaller_window_holds_what_was_promised_and_loses_nothing():
    desk = Desk(("n", 1), ("ed", 1))
    desk.submit("a", "b", "c")
    desk.encoded("a")
    beat(desk, 0, 0.95)
    desk.encoded("b")
    assert (desk.state("a"), desk.state("b")) == (RequestState.TO_DIT, RequestState.ENCODED)
    desk.received("a")
    desk.started("a", "denoise")
    assert desk.state("b") is RequestState.TO_DIT


def test_the_byte_budget_shrinks_with_the_window_but_one_payload_always_fits():
    desk = Desk(("n", 1), ("ed", 1), max_pending_transfers=4, max_pending_bytes=100)
    beat(desk, 0, 0.95)
    beat(desk, 0, 0.95)
    desk.submit("a", "b", "c")
    desk.encoded("a", nbytes=40)
    desk.encoded("b", nbytes=40)
    assert (desk.state("a"), desk.state("b")) == (RequestState.TO_DIT, RequestState.ENCODED)
    other = Desk(("n", 1), ("ed", 1), max_pending_transfers=4, max_pending_bytes=100)
    beat(other, 0, 0.95)
    other.submit("a")
    other.encoded("a", nbytes=100)
    assert other.state("a") is RequestState.TO_DIT


def test_a_full_member_shrinks_the_window_of_its_whole_replica():
    desk = Desk(("n", 2), ("ed", 1))
    beat(desk, 1, 0.95)
    beat(desk, 0, 0.5)
    assert window(desk, 2, 0) == 1


@pytest.mark.parametrize("units", [ONE_AND_ONE, SPLIT, (("n", 2), ("ed", 1))], ids=["pair", "split", "replica"])
def test_a_pictures_bytes_go_to_the_rank_that_encodes_alone_however_the_request_travels(units: tuple[tuple[str, int]]):
    picture = b"x" * 100_000
    desk = Desk(*units)
    desk.bring("a", None, image=picture)
    sizes = {action: len(msgspec.msgpack.encode(action)) for action in desk.log if not isinstance(action, Finish)}
    assert [type(action) for action, size in sizes.items() if size > 10_000] == [Encode]
    assert sum(sizes.values()) < len(picture) + 10_000
    expects = desk.of(Expect, desk.log)
    assert len(expects) == 2 and all(expect.request.params.image == b"" for expect in expects), "there was a picture"
