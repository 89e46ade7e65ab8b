"""The whole engine on two GPUs: both backends make one rank's pictures, cancels come soon, times are the device's."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict

import pytest
import torch

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.errors import RequestCancelled

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

PROMPTS = ["a red apple", "a grinning face", "a yellow car", "a green tree"]
STEPS = 8


def engine(backend: str = "auto", **changes: object) -> Engine:
    settings = {"device": "cuda", "num_gpus": 2, "enable_disagg": True, "transfer_backend": backend}
    return Engine(ServerArgs(**{**settings, **changes}))


def pictures(made: Engine) -> list[bytes]:
    params = [SamplingParams(prompt=p, seed=i, num_inference_steps=STEPS) for i, p in enumerate(PROMPTS * 4)]
    tickets = [made.submit(each) for each in params]
    return [ticket.result(timeout=120).media for ticket in tickets]


@pytest.fixture(scope="module")
def oracle() -> list[bytes]:
    with engine(num_gpus=1, enable_disagg=False) as made:
        return pictures(made)


@pytest.mark.parametrize("backend", ["torch", "cuda_ipc"])
def test_two_gpus_make_the_pictures_of_one(backend: str, oracle: list[bytes]) -> None:
    with engine(backend, transfer_checksum=True) as made:
        assert pictures(made) == oracle


def test_spans_of_a_lane_follow_each_other_and_steps_lie_in_their_denoise() -> None:
    with engine() as made:
        pictures(made)
        spans = made.spans
    lanes = defaultdict(list)
    for span in spans:
        if span.kind in ("encode", "denoise", "decode"):
            lanes[span.rank, span.kind].append(span)
    for lane in lanes.values():
        lane.sort(key=lambda span: span.began)
        assert all(a.ended <= b.began for a, b in zip(lane, lane[1:], strict=False))
    for span in lanes[0, "denoise"][-4 * len(PROMPTS) :]:  # the warm-up has fewer steps
        assert len(span.steps) == STEPS and span.began <= min(span.steps) and max(span.steps) <= span.ended


def test_a_cancel_comes_through_between_two_steps() -> None:
    with engine() as made:
        ticket = made.submit(SamplingParams(prompt="a red apple", seed=0, num_inference_steps=500))
        following = made.submit(SamplingParams(prompt="a red apple", seed=0, num_inference_steps=STEPS))
        time.sleep(0.5)
        ticket.cancel()
        with pytest.raises(RequestCancelled):
            ticket.result(timeout=5)
        following.result(timeout=30)


@pytest.mark.parametrize("backend", ["torch", "cuda_ipc"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_costs_no_request(backend: str, rank: int, oracle: list[bytes]) -> None:
    with engine(backend, dist_timeout=5.0) as made:
        tickets = [
            made.submit(SamplingParams(prompt=p, seed=i, num_inference_steps=STEPS)) for i, p in enumerate(PROMPTS * 4)
        ]
        tickets[2].result(timeout=60)
        pid = made.status().workers[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert [ticket.result(timeout=120).media for ticket in tickets] == oracle
