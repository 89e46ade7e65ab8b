"""The timed model: its picture depends on every byte, its stages last as told, its faults come when asked for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from ditrelay.errors import InvalidRequest, UnsupportedModel
from ditrelay.models.adapter import StageAdapter
from ditrelay.models.card import ModelCard, load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.runtime.communication.codec import decode_payload, encode_state
from ditrelay.runtime.payloads import State, StateValue
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.topology import COLOCATED

if TYPE_CHECKING:
    from ditrelay.models.adapter import Frames

QUICK = "builtin:timed?encode=0&denoise=0&decode=0&steps=3&conditioning_mb=0.1&latents_mb=0.05"


def _load(path: str = QUICK) -> tuple[ModelCard, StageAdapter]:
    card = load_card(path)
    return card, load_adapter(LoadSpec(card=card, roles=COLOCATED))


def _request(card: ModelCard, prompt: str = "a cat", seed: int = 1) -> Request:
    return Request(request_id=f"r{seed}", params=card.resolve(SamplingParams(prompt=prompt, seed=seed)))


def _denoise(adapter: StageAdapter, request: Request, conditioning: State) -> State:
    session = adapter.begin([request], conditioning)
    while adapter.step(session):
        pass
    return adapter.finish(session)


def _picture(adapter: StageAdapter, request: Request) -> Frames:
    return adapter.decode([request], _denoise(adapter, request, adapter.encode([request])))[0]


def test_a_worker_loads_it_without_diffusers() -> None:
    code = "import sys; from ditrelay.models.card import load_card; from ditrelay.models.loading import *"
    code += f"; load_adapter(LoadSpec(card=load_card({QUICK!r}), roles=frozenset()))"
    code += "; sys.exit(bool({'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_same_seed_same_picture_other_seed_another() -> None:
    card, adapter = _load()
    first = _picture(adapter, _request(card))
    assert first.shape == (1, 32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first, _picture(adapter, _request(card)))
    assert not np.array_equal(first, _picture(adapter, _request(card, seed=2)))
    assert not np.array_equal(first, _picture(adapter, _request(card, prompt="a dog")))


def test_with_frames_it_makes_clips() -> None:
    card, adapter = _load(f"{QUICK}&frames=9")
    assert (card.media, card.fps, card.default_num_frames) == ("video", 16, 9)
    assert _picture(adapter, _request(card)).shape == (9, 32, 32, 3)


def test_sizes_are_the_ones_asked_for() -> None:
    card, adapter = _load("builtin:timed?encode=0&denoise=0&conditioning_mb=8&latents_mb=1")
    request = _request(card)
    conditioning = adapter.encode([request])
    assert _bytes(conditioning["conditioning"]) == 8_000_000
    assert _bytes(_denoise(adapter, request, conditioning)["latents"]) == 1_000_000
    assert conditioning.keys() == adapter.conditioning_names


def _bytes(value: StateValue) -> int:
    assert isinstance(value.value, torch.Tensor)
    return value.value.nbytes


@pytest.mark.parametrize("edge", ["conditioning", "latents"])
def test_one_wrong_byte_on_either_edge_shows_in_the_picture(edge: str) -> None:
    card, adapter = _load()
    request = _request(card)
    right = _picture(adapter, request)
    conditioning = adapter.encode([request])
    if edge == "conditioning":
        _flip_last_byte(conditioning["conditioning"])
    latents = _denoise(adapter, request, conditioning)
    if edge == "latents":
        _flip_last_byte(latents["latents"])
    assert not np.array_equal(adapter.decode([request], latents)[0], right)


def _flip_last_byte(value: StateValue) -> None:
    assert isinstance(value.value, torch.Tensor)
    value.value.view(torch.uint8)[-1] ^= 1


def test_its_states_cross_the_codec_unchanged() -> None:
    card, adapter = _load()
    request = _request(card)
    payload = encode_state(adapter.encode([request]), batch_id="b", request_ids=["r1"])
    latents = _denoise(adapter, request, decode_payload(payload))
    assert np.array_equal(adapter.decode([request], latents)[0], _picture(adapter, request))


def test_stages_last_as_told_and_encode_excludes_decode() -> None:
    card, adapter = _load("builtin:timed?encode=0.1&denoise=0.2&decode=0.1&steps=4&conditioning_mb=0.1")
    request = _request(card)
    latents = _denoise(adapter, request, adapter.encode([request]))
    began = time.monotonic()
    threads = [
        threading.Thread(target=adapter.encode, args=([request],)),
        threading.Thread(target=adapter.decode, args=([request], latents)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began >= 0.2
    began = time.monotonic()
    _denoise(adapter, request, adapter.encode([request]))
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
@pytest.mark.parametrize(("kind", "error"), [("fail", RuntimeError), ("invalid", InvalidRequest)])
def test_a_fault_comes_in_the_stage_that_was_asked_for(stage: str, kind: str, error: type[Exception]) -> None:
    card, adapter = _load()
    request = _request(card, prompt=f"a cat [{kind} {stage}]")
    reached = []
    with pytest.raises(error, match=stage):
        conditioning = adapter.encode([request])
        reached.append("encode")
        latents = _denoise(adapter, request, conditioning)
        reached.append("denoise")
        adapter.decode([request], latents)
    assert reached == ["encode", "denoise", "decode"][: ["encode", "denoise", "decode"].index(stage)]


def test_a_denoise_fault_comes_half_way() -> None:
    card, adapter = _load()
    request = _request(card, prompt="[fail denoise]")
    session = adapter.begin([request], adapter.encode([request]))
    assert adapter.step(session)
    with pytest.raises(RuntimeError):
        adapter.step(session)


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_prompt_runs_a_stage_out_of_memory_the_first_time_only(stage: str) -> None:
    card, adapter = _load()

    def run() -> None:
        request = _request(card, prompt=f"[oom {stage}]")
        session = adapter.begin([request], adapter.encode([request]))
        while adapter.step(session):
            pass
        adapter.decode([request], adapter.finish(session))

    with pytest.raises(torch.OutOfMemoryError, match=f"{stage} runs out of memory"):
        run()
    run()


def test_hang_lasts_until_somebody_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    card, adapter = _load()
    adapter.encode([_request(card, prompt="[hang encode]")])
    assert max(slept) == 3600


def test_exit_ends_the_process_with_its_own_code() -> None:
    code = "from ditrelay.models.card import *; from ditrelay.models.loading import *"
    code += "; from ditrelay.runtime.request import *"
    code += f"; card = load_card({QUICK!r}); adapter = load_adapter(LoadSpec(card=card, roles=frozenset()))"
    code += "; adapter.encode([Request(request_id='r', params=SamplingParams(prompt='[exit encode]'))])"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 9


def test_an_abandoned_session_takes_no_more_steps() -> None:
    card, adapter = _load()
    request = _request(card)
    session = adapter.begin([request], adapter.encode([request]))
    adapter.step(session)
    adapter.abandon(session)
    adapter.abandon(session)
    with pytest.raises(ValueError, match="no steps remain"):
        adapter.step(session)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("encod=1", "no option 'encod'; allowed: encode, denoise"),
        ("encode=soon", "Expected `float`"),
        ("encode=-1", "encode=-1.0; allowed: a number >= 0"),
        ("encode=nan", "encode=nan; allowed"),
        ("steps=0", "steps=0; allowed: a number >= 1"),
        ("steps=1.5", "Expected `int`"),
    ],
)
def test_a_wrong_option_is_refused(query: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        load_card(f"builtin:timed?{query}")


def test_a_batch_of_two_is_refused() -> None:
    card, adapter = _load()
    with pytest.raises(ValueError, match="a batch of one"):
        adapter.encode([_request(card), _request(card, seed=2)])
