"""Who makes previews: decoders that idle, one at a time, and never at the cost of a request."""

from __future__ import annotations

import pytest
from scheduler_desk import ONE_AND_ONE, SPLIT, TWO_AND_ONE, Desk

from ditrelay.runtime.messages import Action, Kill
from ditrelay.runtime.preview_messages import Preview, Previewed, PreviewTaken
from ditrelay.runtime.request import RequestState
from ditrelay.runtime.scheduling.previews import ANSWER_SECONDS

DENOISING = RequestState.DENOISING


def take(desk: Desk, name: str, step: int = 1) -> list[str]:
    """A preview of ``name`` is in the spool; the requests of which one is made because of it."""
    desk.do(PreviewTaken(desk.rank_of(name), name, step))
    return asked(desk)


def spare(desk: Desk) -> float:
    (asked_for,) = desk.of(Preview)
    assert isinstance(asked_for, Preview)
    return asked_for.spare


def answer(desk: Desk, name: str, rank: int, jpeg: bytes | None = b"") -> list[str]:
    desk.do(Previewed(rank, name, 1, 8, jpeg, desk.now))
    return asked(desk)


def asked(desk: Desk, actions: list[Action] | None = None) -> list[str]:
    return [action.request.request_id for action in desk.of(Preview, actions) if isinstance(action, Preview)]


@pytest.mark.parametrize("fleet", [ONE_AND_ONE, SPLIT], ids=["ed", "d"])
@pytest.mark.parametrize("lock_step", [False, True])
def test_a_preview_is_made_by_a_decoder_that_idles(fleet: tuple[tuple[str, int], ...], lock_step: bool) -> None:
    desk = Desk(*fleet, lock_step=lock_step)
    desk.bring("a", DENOISING)
    assert take(desk, "a") == ["a"]


def test_the_picture_that_a_request_starts_from_is_not_sent_along() -> None:
    desk = Desk(*SPLIT)
    desk.bring("a", DENOISING, image=b"a large file", width=64)
    take(desk, "a")
    (asked_for,) = desk.of(Preview)
    assert isinstance(asked_for, Preview)
    assert (asked_for.request.params.image, asked_for.request.params.width) == (None, 64)


def test_the_decoder_is_told_how_long_nothing_else_is_expected() -> None:
    desk = Desk(*SPLIT)
    desk.bring("first", None, num_inference_steps=8)
    desk.bring("measured", DENOISING, num_inference_steps=8)
    desk.stepped("measured", 1, after=0.5)
    desk.bring("measured", None)
    desk.bring("a", DENOISING, num_inference_steps=8)
    desk.stepped("a", 3, after=0.25)
    assert take(desk, "a") == ["a"]
    assert spare(desk) == pytest.approx(5 * 0.5), "of late, the longest"
    desk.submit("b", num_inference_steps=8)
    answer(desk, "a", rank=2)
    take(desk, "a", 4)
    assert spare(desk) == 0.0, "its encode is next; the one after it comes, too"


def test_of_a_size_that_was_never_measured_no_time_is_promised() -> None:
    desk = Desk(*SPLIT)
    desk.bring("a", DENOISING, num_inference_steps=8)
    desk.stepped("a", 1, after=0.5)
    take(desk, "a")
    assert spare(desk) == 0.0


def test_a_rank_that_encodes_makes_none_until_it_is_done() -> None:
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", DENOISING)
    desk.submit("b")
    assert desk.state("b") is RequestState.ENCODING
    assert take(desk, "a") == []
    desk.encoded("b")
    assert desk.state("b") is RequestState.TO_DIT and asked(desk) == ["a"]


@pytest.mark.parametrize("until", [RequestState.TO_DECODER, RequestState.AT_DECODER, RequestState.DECODING], ids=str)
def test_a_decoder_that_has_or_will_get_latents_makes_none(until: RequestState) -> None:
    desk = Desk(*SPLIT)
    desk.bring("a", until)
    desk.bring("b", DENOISING)
    assert take(desk, "b") == []
    while desk.state("a") is not None:
        desk.bring_on("a")
    assert asked(desk) == ["b"]


def test_only_the_newest_of_a_request_is_made() -> None:
    desk = Desk(*SPLIT)
    desk.bring("a", RequestState.DECODING)
    desk.bring("b", DENOISING)
    assert take(desk, "b", 1) == take(desk, "b", 2) == []
    desk.decoded("a")
    assert asked(desk) == ["b"]
    assert answer(desk, "b", rank=2) == []


def test_one_is_made_at_a_time_on_a_rank_and_of_a_request() -> None:
    desk = Desk(("n", 1), ("n", 1), ("e", 1), ("d", 1), ("d", 1))
    desk.bring("a", DENOISING)
    desk.bring("b", DENOISING)
    assert take(desk, "a", 1) == ["a"]
    assert take(desk, "a", 2) == [], "the other decoder could be faster with the newer one"
    assert take(desk, "b", 1) == ["b"], "on the other decoder"
    assert take(desk, "b", 2) == []
    first, second = (action.rank for action in desk.of(Preview, desk.log))
    assert {first, second} == {3, 4}
    assert answer(desk, "a", first) == ["a"]
    assert answer(desk, "b", second, jpeg=None) == ["b"], "also after one that came to nothing"


def test_whose_preview_waited_longest_comes_first() -> None:
    desk = Desk(*TWO_AND_ONE)
    desk.bring("a", DENOISING)
    desk.bring("b", DENOISING)
    desk.submit("c")
    assert take(desk, "b") == take(desk, "a") == take(desk, "b", 2) == []
    desk.encoded("c")
    assert asked(desk) == ["b"]


def test_none_is_made_of_a_request_whose_denoise_is_over() -> None:
    desk = Desk(*SPLIT)
    desk.bring("a", RequestState.DECODING)
    desk.bring("b", DENOISING)
    assert take(desk, "b") == []
    denoiser = desk.rank_of("b")
    desk.denoised("b")
    desk.do(PreviewTaken(denoiser, "b", 2))
    desk.decoded("a")
    assert desk.of(Preview, desk.log) == []
    assert not desk.scheduler._previews._waiting


def test_a_request_that_is_cancelled_does_not_wait_for_its_preview() -> None:
    desk = Desk(*SPLIT)
    desk.bring("a", DENOISING)
    assert take(desk, "a") == ["a"]
    desk.cancel("a")
    desk.dropped("a", 0, 1)
    assert desk.ends("a") == [("cancelled", None)]
    assert desk.is_empty()
    desk.bring("b", DENOISING)
    assert take(desk, "b") == [], "the decoder is not free before it says so"
    assert answer(desk, "a", rank=2) == ["b"]


@pytest.mark.parametrize("cancelled", [False, True])
def test_an_answer_that_never_comes_costs_that_request_its_previews_and_no_other(
    cancelled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(*TWO_AND_ONE)
    desk.bring("a", DENOISING)
    desk.bring("b", DENOISING)
    assert take(desk, "a") == ["a"] and take(desk, "b") == []
    if cancelled:
        desk.cancel("a")
        desk.dropped("a", 0, 1, 2)
        assert desk.state("a") is None
    desk.wait(ANSWER_SECONDS - 1.0)
    assert asked(desk) == [] and not caplog.records
    desk.wait(1.0)
    assert asked(desk) == ["b"]
    (warning,) = caplog.messages
    assert "non_dit 2 did not answer for a preview of request a within 30 s" in warning
    desk.wait(ANSWER_SECONDS - 1.0)
    assert answer(desk, "b", rank=2) == []
    if not cancelled:
        assert take(desk, "a", 2) == [], "it would be mistaken for the one that did not come"
    assert take(desk, "b", 2) == ["b"] and len(caplog.records) == 1
    assert not desk.of(Kill, desk.log)


def test_an_answer_that_comes_too_late_does_no_harm() -> None:
    desk = Desk(*TWO_AND_ONE)
    desk.bring("a", DENOISING)
    desk.bring("b", DENOISING)
    assert take(desk, "a") == ["a"]
    desk.wait(ANSWER_SECONDS)
    assert take(desk, "a", 2) == []
    assert take(desk, "b") == ["b"]
    assert answer(desk, "a", rank=2) == take(desk, "b", 2) == [], "the one of b is still made"
    assert answer(desk, "b", rank=2) == ["b"]
    desk.wait(ANSWER_SECONDS)
    assert answer(desk, "b", rank=2) == take(desk, "b", 3) == []
    assert not desk.scheduler._previews._made


def test_work_that_a_decoder_does_before_a_preview_is_not_counted_against_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", DENOISING)
    assert take(desk, "a") == ["a"]
    desk.submit("b")
    desk.started("b", "encode")
    desk.wait(2 * ANSWER_SECONDS)
    desk.encoded("b")
    assert take(desk, "a", 2) == []
    desk.wait(ANSWER_SECONDS - 1.0)
    assert answer(desk, "a", rank=1) == ["a"] and not caplog.records
    desk.wait(ANSWER_SECONDS)
    assert len(caplog.records) == 1


def test_a_preview_holds_no_stage_up() -> None:
    desk = Desk(*ONE_AND_ONE)
    desk.bring("a", DENOISING)
    assert take(desk, "a") == ["a"]
    desk.submit("b")
    assert desk.state("b") is RequestState.ENCODING
    desk.bring("a", None)
    assert desk.ends("a") == [("done", None)]


def test_a_rank_that_dies_of_a_preview_gets_no_other_of_that_request() -> None:
    desk = Desk(*SPLIT)
    desk.bring("a", DENOISING)
    assert take(desk, "a") == ["a"]
    desk.down(2)
    assert desk.state("a") is DENOISING
    desk.wait(1.0)
    desk.bring_up(2)
    assert take(desk, "a", 2) == []
    desk.bring("a", None)
    assert desk.ends("a") == [("done", None)]
    desk.bring("b", DENOISING)
    assert take(desk, "b") == ["b"]


@pytest.mark.parametrize("before", [0.0, ANSWER_SECONDS], ids=["waited for", "given up"])
def test_a_preview_that_hangs_costs_the_rank_and_not_the_request_behind_it(before: float) -> None:
    desk = Desk(*SPLIT, hang_timeout=10.0, stage_timeout=600.0)
    desk.bring("a", DENOISING)
    assert take(desk, "a") == ["a"]
    desk.wait(before)
    desk.denoised("a")
    desk.received("a")
    assert desk.state("a") is RequestState.AT_DECODER
    desk.wait(9.0)
    assert not desk.of(Kill)
    desk.wait(2.0)
    (kill,) = desk.of(Kill)
    assert isinstance(kill, Kill) and kill.rank == 2 and "behind a preview of request a" in kill.reason
    desk.wait(1.0)
    desk.bring_up(2)
    assert desk.record("a").attempts == 0
    desk.bring("a", None)
    assert desk.ends("a") == [("done", None)]


def test_what_a_rank_says_of_a_preview_that_it_makes_unasked_changes_nothing() -> None:
    desk = Desk(("end", 1), ("d", 1))
    desk.bring("a", DENOISING)
    before = desk.snapshot()
    assert answer(desk, "a", rank=0) == []
    assert desk.snapshot() == before and desk.state("a") is DENOISING
