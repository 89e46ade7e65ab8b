"""Previews from a running engine: they come in order and look like the result, and nothing else changes for them."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.errors import RequestCancelled, RequestFailed
from ditrelay.runtime.request import RequestState
from ditrelay.runtime.tickets import Progress, Ticket

STEPS = 8
TIMED = f"builtin:timed?encode=0.005&denoise=0.8&decode=0.01&steps={STEPS}&conditioning_mb=0.1&latents_mb=0.1"
SECONDS = 60.0


def settings(**changes: object) -> ServerArgs:
    base = {"model_path": TIMED, "device": "cpu", "enable_disagg": True, "num_gpus": 2, "stage_timeout": 60.0}
    return ServerArgs(**{**base, **changes})


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Two DiT ranks, one decoder."""
    with Engine(settings(num_gpus=3)) as started:
        yield started


def submit(engine: Engine, prompt: str = "a red apple", **params: object) -> Ticket:
    return engine.submit(SamplingParams(prompt=prompt, **{"seed": 1, "previews": 4, **params}))


def progress_of(ticket: Ticket) -> list[Progress]:
    ticket.future.exception(SECONDS)
    return list(ticket.events())


def previews_of(ticket: Ticket) -> list[Progress]:
    return [progress for progress in progress_of(ticket) if progress.preview is not None]


def spooled(engine: Engine) -> list[str]:
    """What is left in the spool; a moment may pass until nothing is."""
    assert engine._controller is not None
    folder, until = engine._controller._spool.folder, time.monotonic() + 5.0
    while any(folder.iterdir()) and time.monotonic() < until:
        time.sleep(0.01)
    return [file.name for file in folder.iterdir()]


def wait_for_step(ticket: Ticket, step: int) -> None:
    for progress in ticket.events():
        if progress.step >= step:
            return
    raise AssertionError(f"it ended before step {step}")


def assert_spread(shown: list[Progress]) -> None:
    """Four are wanted of eight steps; on a busy machine one or two may come too late."""
    steps = [progress.step for progress in shown]
    assert len(steps) >= 2 and [step for step in (2, 3, 5, 6) if step in steps] == steps


def shows_again(engine: Engine) -> bool:
    """A rank that was started anew has to measure first."""
    return any(previews_of(submit(engine, f"try {number}")) for number in range(6))


def pixels(file: bytes, size: tuple[int, int]) -> np.ndarray:
    image = Image.open(io.BytesIO(file)).convert("RGB").resize(size, Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float64)


@pytest.mark.parametrize("changes", [{}, {"enable_disagg": False, "num_gpus": 1}], ids=["apart", "colocated"])
def test_previews_look_more_and_more_like_the_picture_which_is_the_same_with_and_without(
    changes: dict[str, object],
) -> None:
    with Engine(settings(model_path="builtin:emoji", **changes)) as engine:
        plain = submit(engine, previews=0)
        ticket = submit(engine)
        shown = previews_of(ticket)
        result = ticket.result(SECONDS)
        assert result.media == plain.result(SECONDS).media
        assert previews_of(plain) == []
        assert spooled(engine) == []
    assert len(shown) >= 2
    files = [progress.preview for progress in shown if progress.preview is not None]
    assert all(file.startswith(b"\xff\xd8") and len(file) < 16_000 for file in files)
    size = Image.open(io.BytesIO(files[0])).size
    assert 64 <= max(size) <= 256
    final = pixels(result.media, size)
    likeness = [np.corrcoef(pixels(file, size).ravel(), final.ravel())[0, 1] for file in files]
    assert likeness[-1] > 0.95 and 1 - likeness[-1] < 0.7 * (1 - likeness[0]), likeness


def test_previews_come_in_order_while_the_request_denoises(engine: Engine) -> None:
    ticket = submit(engine)
    shown = previews_of(ticket)
    assert_spread(shown)
    assert {(progress.state, progress.total_steps) for progress in shown} == {(RequestState.DENOISING, STEPS)}
    assert len({progress.preview for progress in shown}) == len(shown)
    states = [progress.state for progress in progress_of(ticket)]
    assert states.index(RequestState.DENOISED) > max(i for i, s in enumerate(states) if s is RequestState.DENOISING)
    again = {progress.step: progress.preview for progress in previews_of(submit(engine))}
    assert all(again.get(progress.step, progress.preview) == progress.preview for progress in shown)


def test_under_load_they_are_still_in_order_and_the_pictures_are_the_same(engine: Engine) -> None:
    tickets = [submit(engine, f"picture {i}", seed=i, previews=10) for i in range(8)]
    for ticket in tickets:
        steps = [progress.step for progress in previews_of(ticket)]
        assert steps == sorted(set(steps))
    without = engine.generate([f"picture {i}" for i in range(8)], seed=0)
    assert [ticket.result(SECONDS).media for ticket in tickets] == [result.media for result in without]
    assert spooled(engine) == []


def test_a_cancelled_request_leaves_nothing_behind(engine: Engine) -> None:
    for step in (1, 3, 6):
        ticket = submit(engine, previews=10)
        wait_for_step(ticket, step)
        ticket.cancel()
        with pytest.raises(RequestCancelled):
            ticket.result(SECONDS)
    assert spooled(engine) == []
    assert shows_again(engine)


@pytest.mark.parametrize("rank", [0, 2], ids=["denoiser", "decoder"])
def test_a_rank_that_is_killed_costs_previews_and_no_request(engine: Engine, rank: int) -> None:
    tickets = [submit(engine, f"picture {i}", seed=i, previews=10) for i in range(3)]
    wait_for_step(tickets[0], 3)
    pid = engine.status().workers[rank].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for ticket in tickets:
        assert ticket.result(SECONDS).media
    assert spooled(engine) == []
    until = time.monotonic() + SECONDS
    while not engine.ready and time.monotonic() < until:
        time.sleep(0.05)
    assert shows_again(engine)


def test_a_preview_that_fails_costs_itself_only(engine: Engine) -> None:
    failed = submit(engine, "[fail decode]")
    with pytest.raises(RequestFailed, match="decode failed"):
        failed.result(SECONDS)
    assert previews_of(failed) == []
    assert submit(engine, "[oom decode]").result(SECONDS).media
    assert spooled(engine) == []


def test_in_a_replica_of_two_ranks_the_leader_shows_how_far_it_is() -> None:
    with Engine(settings(num_gpus=3, sp_degree=2, use_async_comm=False)) as engine:
        assert_spread(previews_of(submit(engine)))
        assert spooled(engine) == []
