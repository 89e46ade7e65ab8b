"""Models on a GPU: what a denoise prepares, it prepares while the one before still computes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tiny_models
import torch

from ditrelay.models.card import load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.uploads import AsyncUploads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BUSY_SECONDS = 1.0


def occupy(seconds: float) -> torch.cuda.Event:
    """Keep the current stream busy about so long; the event is behind it."""
    torch.cuda._sleep(int(seconds * 1.7e9))  # cycles at about the clock of an H100
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upload_waits_for_nothing_and_arrives_whole(dtype: torch.dtype) -> None:
    source = torch.randn(256, 257)

    def upload() -> tuple[torch.Tensor, torch.Tensor]:
        with AsyncUploads():
            return source.to("cuda", dtype), source[:, 3].to("cuda")

    upload()  # what is made once is made now: to make pinned memory may wait for the device
    torch.cuda.current_stream().synchronize()
    busy = occupy(BUSY_SECONDS)
    there, part = upload()
    assert not busy.query()
    assert torch.equal(there.cpu(), source.to(dtype)) and torch.equal(part.cpu(), source[:, 3])


@pytest.mark.parametrize("family", ["z-image", "flux", "wan"])
def test_a_denoise_is_prepared_while_the_device_is_busy(family: str, tmp_path: Path) -> None:
    card = load_card(str(tiny_models.build(family, tmp_path)))
    adapter = load_adapter(LoadSpec(card, frozenset({"encode", "denoise"}), device="cuda", dtype="bfloat16"))
    request = tiny_models.small_request(card)
    with torch.no_grad():
        state = adapter.encode([request])
        adapter.abandon(adapter.begin([request], state))  # what is made once is made now
        torch.cuda.current_stream().synchronize()
        busy, began = occupy(BUSY_SECONDS), time.monotonic()
        session = adapter.begin([request], state)
        assert not busy.query() and time.monotonic() - began < BUSY_SECONDS / 2
        adapter.abandon(session)
