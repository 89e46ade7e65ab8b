"""Timelines: what is recorded of a run, and the lanes and bars that it becomes."""

from __future__ import annotations

import pytest
from PIL import ImageColor
from sample_run import RUN, span, timeline, topology

from ditrelay.runtime.messages import Decoded, Denoised, Encoded, Received, Sent, Started, StepDone, WorkerEvent
from ditrelay.runtime.metrics import Span, overlap
from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.request import Request, RequestState, SamplingParams
from ditrelay.runtime.request_log import RequestLog
from ditrelay.runtime.tickets import Ticket
from ditrelay.runtime.timeline import PALETTE, Timeline, build_timeline, describe, format_seconds

HEADER = PayloadHeader(batch_id="b", request_ids=("a",), fields=(), tensors=(), nbytes=0)


# ---------------------------------------------------------------- what is recorded


def record(*events: WorkerEvent) -> RequestLog:
    log = RequestLog(topology())
    request = Request(request_id="a", params=SamplingParams(prompt="a cat", seed=1))
    log.open(request, Ticket(request, lambda _: None), limit=1)
    for event in events:
        log.observe(event)
    return log


def test_a_denoise_is_recorded_with_the_ends_of_its_steps_and_without_those_of_a_lost_attempt() -> None:
    log = record(
        Started(1, "a", "denoise", 1.0),
        StepDone(1, "a", 1, 2, 1.5),
        Started(0, "a", "denoise", 3.0),
        StepDone(0, "a", 1, 2, 3.5),
        StepDone(0, "a", 2, 2, 4.0),
        Denoised(0, "a", HEADER, 3.0, 4.1),
    )
    assert log.spans() == [Span("a", 0, "denoise", 3.0, 4.1, (3.5, 4.0))]


def test_a_transfer_is_recorded_by_both_of_its_ranks_and_as_a_hand_off() -> None:
    log = record(
        Encoded(3, "a", HEADER, 1.0, 2.0), Sent(3, "a", 0, 1, 1, 2.01, 2.2), Received(0, "a", 3, 1, 1, 2.05, 2.15)
    )
    assert log.spans() == [
        span("a", 3, "encode", 1.0, 2.0),
        span("a", 3, "send", 2.01, 2.2),
        span("a", 0, "receive", 2.05, 2.15),
        span("a", 0, "to_dit", 2.0, 2.15),
    ]


def test_a_transfer_that_was_asked_for_early_counts_from_the_end_of_the_encode() -> None:
    log = record(
        Encoded(3, "a", HEADER, 1.0, 2.0), Sent(3, "a", 0, 1, 1, 1.1, 2.2), Received(0, "a", 3, 1, 1, 1.2, 2.1)
    )
    assert log.spans()[1:] == [
        span("a", 3, "send", 2.0, 2.2),
        span("a", 0, "receive", 2.0, 2.1),
        span("a", 0, "to_dit", 2.0, 2.1),
    ]


def test_a_transfer_whose_end_is_reported_before_that_of_the_encode_is_told_from_it_all_the_same() -> None:
    log = record()
    log.state_changed("a", RequestState.ENCODING)
    log.observe(Received(0, "a", 3, 1, 1, 0.1, 0.2))  # of an attempt before, whose encoder is lost
    log.observe(Received(0, "a", 3, 2, 1, 1.2, 2.1))
    assert log.spans() == []
    log.observe(Encoded(3, "a", HEADER, 1.0, 2.0))
    assert log.spans()[1:] == [span("a", 0, "receive", 2.0, 2.1), span("a", 0, "to_dit", 2.0, 2.1)]


def test_a_send_that_is_reported_after_the_end_of_its_request_is_recorded() -> None:
    log = record(Decoded(3, "a", b"png", "image/png", 8, 8, 1, 5.0, 6.0))
    log.finish("a", "cancelled", None, None)
    log.observe(Sent(0, "a", 3, 1, 1, 4.0, 4.5))
    assert [each.kind for each in log.spans()] == ["decode", "send"]


def test_transfers_do_not_count_as_stages_that_overlap() -> None:
    assert overlap([span("a", 0, "denoise", 0, 1), span("b", 0, "receive", 0, 1), span("b", 3, "send", 0, 1)]) == 0


# ---------------------------------------------------------------- lanes


def lane_names(made: Timeline) -> list[str]:
    return [f"{group.title}: {' '.join(lane.kind for lane in group.lanes)}" for group in made.groups]


@pytest.mark.parametrize(
    "changes, lanes",
    [
        (
            {"num_gpus": 3},
            [
                "rank 2: encode send",
                "rank 0: receive denoise send",
                "rank 1: receive denoise send",
                "rank 2: receive decode",
            ],
        ),
        (
            {"num_non_dit_ranks": 2, "num_encoder_ranks": 1, "num_gpus": 3},
            ["rank 1: encode send", "rank 0: receive denoise send", "rank 2: receive decode"],
        ),
        (
            {"num_gpus": 3, "sp_degree": 2},
            ["rank 2: encode send", "ranks 0-1: receive denoise send", "rank 2: receive decode"],
        ),
        ({"enable_disagg": False, "num_gpus": 1}, ["rank 0: encode denoise decode"]),
    ],
    ids=["non-DiT", "encoder and decoder", "sequence parallel", "colocated"],
)
def test_lanes_stand_in_the_order_in_which_a_request_meets_them(changes: dict[str, object], lanes: list[str]) -> None:
    assert lane_names(build_timeline([], topology(**changes), model="flux")) == lanes


def test_every_bar_is_in_the_lane_of_its_rank_and_kind_and_hand_offs_are_in_none() -> None:
    found = {(lane.rank, lane.kind): [bar.request for bar in lane.bars] for lane in timeline().lanes}
    assert found[3, "encode"] == found[3, "decode"] == [1, 2, 3]
    assert found[0, "denoise"] == found[0, "receive"] == [1, 3] and found[1, "send"] == [2]
    assert found[2, "denoise"] == []
    assert sum(map(len, found.values())) == len(RUN) - 6


def test_requests_are_numbered_by_their_start_and_time_begins_at_the_first() -> None:
    made = timeline(list(reversed(RUN)))
    assert {bar.request_id: bar.request for bar in made.bars} == {"a": 1, "b": 2, "c": 3}
    assert (made.began, made.ended) == (0.0, pytest.approx(1.5))
    (denoise,) = [bar for bar in made.bars if len(bar.steps) == 3 and bar.request == 1]
    assert denoise.steps == pytest.approx((0.4, 0.6, 0.75))


def test_the_newest_requests_keep_their_numbers_and_their_time() -> None:
    made = timeline(newest=1)
    assert {bar.request for bar in made.bars} == {3}
    assert made.began == pytest.approx(0.5)
    assert "1 request (3 to 3) in 1.00 s" in made.summary


def test_what_began_before_a_moment_is_left_out() -> None:
    made = timeline(since=100.45)
    assert {bar.request_id for bar in made.bars if bar.request == 1} == {"b"}
    assert made.began == 0.0


def test_bars_that_overlap_are_in_rows_of_their_own() -> None:
    made = timeline([span(r, 3, "receive", began, began + 0.5) for r, began in (("a", 0.0), ("b", 0.3), ("c", 0.5))])
    (lane,) = [lane for lane in made.lanes if lane.bars]
    assert [[bar.request for bar in track] for track in lane.tracks] == [[1, 3], [2]]


def test_busy_is_the_share_of_a_lane_from_its_first_bar_to_its_last() -> None:
    shares = {(lane.rank, lane.kind): lane.busy() for lane in timeline().lanes}
    assert shares[1, "denoise"] == pytest.approx(1.0)
    assert shares[3, "encode"] == pytest.approx(0.6 / 0.7)
    assert shares[2, "denoise"] is None


def test_the_title_tells_model_and_ranks_and_the_summary_the_overlap() -> None:
    made = timeline()
    assert made.title == "flux on 3 DiT + 1 non-DiT ranks"
    assert made.summary == f"3 requests in 1.50 s; stages overlapped for {overlap(RUN):.0%} of the working time"
    assert overlap(RUN) > 0.2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sp_degree": 2}, "3 DiT + 1 non-DiT ranks (replicas of 2 and 1)"),
        ({"num_non_dit_ranks": 2, "num_decoder_ranks": 1}, "2 DiT + 1 encoder + 1 decoder ranks"),
        ({"enable_disagg": False, "num_gpus": 1}, "1 colocated rank"),
    ],
)
def test_the_topology_is_told_in_words(changes: dict[str, object], words: str) -> None:
    assert describe(topology(**changes)) == words


@pytest.mark.parametrize(
    "seconds, words", [(0.00123, "1.2 ms"), (0.1234, "123 ms"), (0.9996, "1.00 s"), (7.416, "7.42 s"), (612.3, "612 s")]
)
def test_seconds_are_told_with_three_digits(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words


def test_white_numbers_are_readable_on_every_colour() -> None:
    def luminance(colour: str) -> float:
        """WCAG 2.1, relative luminance."""
        channels = [value / 255 for value in ImageColor.getrgb(colour)[:3]]
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert len(set(PALETTE)) == len(PALETTE)
    assert min(1.05 / (luminance(colour) + 0.05) for colour in PALETTE) >= 3.0  # its minimum for large text
