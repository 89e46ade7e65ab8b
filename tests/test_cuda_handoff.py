"""The hand-off between two GPUs: arranged while the encode runs, and none of its bytes taken before they are made."""

from __future__ import annotations

import time

import pytest
import torch

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.models.timed import TimedAdapter
from ditrelay.models.timed_options import TimedOptions
from ditrelay.runtime.metrics import Span
from ditrelay.runtime.request import Request

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

MODEL = "builtin:timed?encode=0.02&denoise=0.01&decode=0.002&steps=2&conditioning_mb=8&latents_mb=1"
COUNT = 24


def engine(**changes: object) -> Engine:
    settings = {"model_path": MODEL, "device": "cuda", "num_gpus": 2, "enable_disagg": True, "log_level": "warning"}
    return Engine(ServerArgs(**{**settings, **changes}))


def pictures(made: Engine) -> list[bytes]:
    tickets = [made.submit(SamplingParams(prompt=f"picture {i}", seed=i)) for i in range(COUNT)]
    return [ticket.result(timeout=60).media for ticket in tickets]


def early(spans: list[Span]) -> int:
    """Transfers to the DiT rank whose two ranks were told before the encode ended: their spans begin at that end."""
    ends = {span.request_id: span.ended for span in spans if span.kind == "encode"}
    to_dit = [span for span in spans if (span.kind, span.rank) in (("send", 1), ("receive", 0))]
    waited = [span.request_id for span in to_dit if span.began > ends[span.request_id]]
    return len({span.request_id for span in to_dit} - set(waited))


@pytest.fixture(scope="module")
def oracle() -> list[bytes]:
    with engine(num_gpus=1, enable_disagg=False) as made:
        return pictures(made)


@pytest.mark.parametrize("backend", ["torch", "cuda_ipc"])
def test_every_byte_is_taken_after_it_is_made(backend: str, oracle: list[bytes]) -> None:
    with engine(transfer_backend=backend) as made:
        assert pictures(made) == oracle
        assert early(made.spans) > COUNT // 2


def test_lock_step_arranges_nothing_ahead(oracle: list[bytes]) -> None:
    with engine(use_async_comm=False) as made:
        assert pictures(made) == oracle
        assert early(made.spans) == 0


def test_the_timed_encode_is_launched_ahead_of_its_gpu_and_lasts_as_told() -> None:
    options = TimedOptions.parse(MODEL.replace("encode=0.02", "encode=0.2"))
    torch.cuda.set_device(0)
    adapter = TimedAdapter(options, device="cuda:0")
    request = Request(request_id="r", params=SamplingParams(prompt="a cat", seed=1))
    adapter.encode([request])
    torch.cuda.current_stream().synchronize()
    began = time.monotonic()
    adapter.encode([request])
    assert time.monotonic() - began < 0.1
    torch.cuda.current_stream().synchronize()
    assert 0.1 < time.monotonic() - began < 0.4
