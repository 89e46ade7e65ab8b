"""The whole engine on two GPUs: both backends make one rank's pictures, cancels come soon, times are the device's.

The engines start side by side and live for all tests: a start takes seconds.
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from rig import BACKENDS, SECONDS, draw, needs, reaches_step, settings, side_by_side

from ditrelay import Engine, SamplingParams
from ditrelay.errors import RequestCancelled

pytestmark = needs(2)

PROMPTS = ["a red apple", "a grinning face", "a yellow car", "a green tree"]
STEPS = 8
PARAMS = [SamplingParams(prompt=prompt, seed=i, num_inference_steps=STEPS) for i, prompt in enumerate(PROMPTS * 4)]
DIT, NON_DIT = 0, 1


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    """By backend; ``""``: one rank alone. The time-out is short: NCCL does not notice that its peer is dead."""
    made = {"": Engine(settings(num_gpus=1, enable_disagg=False))}
    for backend in BACKENDS:
        made[backend] = Engine(settings(transfer_backend=backend, verify_transfers=True, dist_timeout=8.0))
    with ExitStack() as stack:
        for engine in made.values():
            stack.callback(engine.close)
        side_by_side(*(engine.start for engine in made.values()))
        yield made


@pytest.fixture(scope="module")
def oracle(engines: dict[str, Engine]) -> list[bytes]:
    return pictures(engines[""])


def pictures(engine: Engine) -> list[bytes]:
    return [result.media for result in draw(engine, PARAMS)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_gpus_make_the_pictures_of_one(backend: str, engines: dict[str, Engine], oracle: list[bytes]) -> None:
    assert pictures(engines[backend]) == oracle


@pytest.mark.parametrize("backend", BACKENDS)
def test_spans_of_a_lane_follow_each_other_and_steps_lie_in_their_denoise(
    backend: str, engines: dict[str, Engine]
) -> None:
    before = len(engines[backend].spans)
    pictures(engines[backend])
    lanes = defaultdict(list)
    for span in engines[backend].spans[before:]:
        if span.kind in ("encode", "denoise", "decode"):
            lanes[span.rank, span.kind].append(span)
    for lane in lanes.values():
        lane.sort(key=lambda span: span.began)
        assert all(a.ended <= b.began for a, b in zip(lane, lane[1:], strict=False))
    assert len(lanes[DIT, "denoise"]) == len(PARAMS)
    for span in lanes[DIT, "denoise"]:
        assert len(span.steps) == STEPS and span.began <= min(span.steps) and max(span.steps) <= span.ended


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cancel_comes_through_between_two_steps(backend: str, engines: dict[str, Engine]) -> None:
    engine = engines[backend]
    ticket = engine.submit(SamplingParams(prompt="a red apple", seed=0, num_inference_steps=900))
    following = engine.submit(PARAMS[0])
    reaches_step(ticket, 20)
    ticket.cancel()
    with pytest.raises(RequestCancelled):
        ticket.result(timeout=5)
    following.result(timeout=30)


@pytest.mark.parametrize("rank", [DIT, NON_DIT])
def test_a_killed_worker_costs_no_request(rank: int, engines: dict[str, Engine], oracle: list[bytes]) -> None:
    tickets = {backend: [engines[backend].submit(params) for params in PARAMS] for backend in BACKENDS}
    for backend in BACKENDS:
        tickets[backend][2].result(timeout=SECONDS)
        pid = engines[backend].status().workers[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    for backend in BACKENDS:
        assert [ticket.result(timeout=SECONDS).media for ticket in tickets[backend]] == oracle
        assert engines[backend].status().workers[rank].restarts == 1
