"""Every family: our stages give the stock pipeline's picture, split over ranks or not, alone or interleaved."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from ditrelay.models.adapter import DenoiseSession, StageAdapter
from ditrelay.models.card import ModelCard, load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.runtime.communication.codec import decode_payload, encode_state
from ditrelay.runtime.payloads import State
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.topology import COLOCATED, Role

FAMILIES = tuple(tiny_models.BUILDERS)
ROLES: tuple[Role, ...] = ("encode", "denoise", "decode")
PROMPT = "a cat sitting on a red chair"


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_root: Path) -> Iterator[Model]:
    yield Model(load_card(str(tiny_models.build(request.param, tiny_root))))


class Model:
    """A tiny model with an adapter that has every role, and one adapter per role."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        self.whole = load_adapter(LoadSpec(card=card, roles=COLOCATED))
        self.split = {role: load_adapter(LoadSpec(card=card, roles=frozenset({role}))) for role in ROLES}

    def request(self, number: int) -> Request:
        """Request 0 is a 32 x 32 picture of two steps, request 1 is larger and takes three."""
        image = self.card.needs_image
        size = (32, 32) if number == 0 else (64, 32)
        params = SamplingParams(
            prompt=PROMPT if number == 0 else "a small boat on the blue sea at night",
            negative_prompt="blurry, low quality" if self.card.supports_negative_prompt else None,
            height=size[0],
            width=size[1],
            num_frames=1 if self.card.media == "image" else (9, 5)[number],
            num_inference_steps=(2, 3)[number],
            seed=7 + number,
            image=_png(*size) if image else None,
        )
        return Request(request_id=str(number), params=self.card.resolve(params))


def _png(height: int, width: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _sent(state: State, request: Request) -> State:
    """What arrives on another rank: each tensor copied, as a wire does."""
    payload = encode_state(state, batch_id=request.request_id, request_ids=[request.request_id])
    copies = tuple(tensor.clone() for tensor in payload.tensors)
    return decode_payload(type(payload)(payload.header, copies))


def _run(adapters: Mapping[Role, StageAdapter], request: Request, *, wire: bool = False) -> np.ndarray[Any, Any]:
    def carry(state: State) -> State:
        return _sent(state, request) if wire else state

    state = carry(adapters["encode"].encode([request]))
    session = adapters["denoise"].begin([request], state)
    while adapters["denoise"].step(session):
        pass
    return adapters["decode"].decode([request], carry(adapters["denoise"].finish(session)))[0]


def _stock(card: ModelCard, params: SamplingParams) -> np.ndarray[Any, Any]:
    """uint8 [frames, height, width, 3] of the stock pipeline, in float32."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(card.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    guidance = "true_cfg_scale" if card.family == "qwen-image" else "guidance_scale"
    given: dict[str, Any] = {guidance: params.guidance_scale}
    if params.negative_prompt is not None:
        given["negative_prompt"] = params.negative_prompt
    if card.media == "video":
        given["num_frames"] = params.num_frames
    if params.image is not None:
        given["image"] = Image.open(io.BytesIO(params.image))
    output = pipeline(
        prompt=params.prompt,
        height=params.height,
        width=params.width,
        num_inference_steps=params.num_inference_steps,
        generator=torch.Generator("cpu").manual_seed(params.seed or 0),
        output_type="np",
        **given,
    )
    pixels = output.images if card.media == "image" else output.frames[0]
    return (pixels * 255).round().astype(np.uint8)


def test_stages_give_the_stock_pipelines_picture(model: Model) -> None:
    for number in (0, 1):
        request = model.request(number)
        ours = _run(dict.fromkeys(ROLES, model.whole), request)
        stock = _stock(model.card, request.params)
        assert ours.shape == stock.shape and ours.dtype == np.uint8
        assert np.abs(ours.astype(int) - stock.astype(int)).max() <= 1
        assert ours.std() > 0


def test_without_guidance_the_stock_pipelines_picture_too(model: Model) -> None:
    if not model.card.supports_guidance or model.card.family == "flux":
        pytest.skip("no classifier-free guidance to switch off")
    given = model.request(0).params
    params = model.card.resolve(
        SamplingParams(
            prompt=given.prompt,
            height=given.height,
            width=given.width,
            num_frames=given.num_frames,
            num_inference_steps=2,
            seed=3,
            guidance_scale=model.card.guidance_above,
            image=given.image,
        )
    )
    request = Request(request_id="0", params=params)
    ours = _run(dict.fromkeys(ROLES, model.whole), request)
    assert np.abs(ours.astype(int) - _stock(model.card, params).astype(int)).max() <= 1


def test_three_ranks_give_bit_for_bit_what_one_gives(model: Model) -> None:
    request = model.request(0)
    assert np.array_equal(_run(model.split, request, wire=True), _run(dict.fromkeys(ROLES, model.whole), request))


def test_what_crosses_an_edge_is_what_the_adapter_declared(model: Model) -> None:
    request = model.request(0)
    conditioning = model.split["encode"].encode([request])
    assert conditioning.keys() <= model.whole.conditioning_names
    session = model.split["denoise"].begin([request], conditioning)
    while model.split["denoise"].step(session):
        pass
    latents = model.split["denoise"].finish(session)
    assert latents.keys() <= model.whole.latents_names
    assert next(iter(latents)) == "latents"


def test_interleaved_requests_equal_those_run_one_after_the_other(model: Model) -> None:
    adapter = model.whole
    requests = [model.request(number) for number in (0, 1)]
    alone = [_run(dict.fromkeys(ROLES, adapter), request) for request in requests]
    sessions = [adapter.begin([request], adapter.encode([request])) for request in requests]
    assert [session.total_steps for session in sessions] == [2, 3]
    order = _interleave(adapter, sessions)
    assert order == [0, 1, 0, 1, 1]
    together = [
        adapter.decode([request], adapter.finish(session))[0]
        for request, session in zip(requests, sessions, strict=True)
    ]
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def _interleave(adapter: StageAdapter, sessions: list[DenoiseSession]) -> list[int]:
    order = []
    running = dict(enumerate(sessions))
    while running:
        for number, session in list(running.items()):
            order.append(number)
            if not adapter.step(session):
                del running[number]
    return order


def test_gradients_are_off_in_every_step_and_back_on_for_the_caller(model: Model) -> None:
    transformer = _transformer(model.whole)
    seen: list[bool] = []
    hook = transformer.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    try:
        requests = [model.request(number) for number in (0, 1)]
        with torch.no_grad():
            states = [model.whole.encode([request]) for request in requests]
        assert torch.is_grad_enabled()
        sessions = [model.whole.begin([request], state) for request, state in zip(requests, states, strict=True)]
        _interleave(model.whole, sessions)
        assert torch.is_grad_enabled()
    finally:
        hook.remove()
    assert len(seen) >= 5 and not any(seen)


def test_an_abandoned_request_frees_its_tensors_and_leaves_the_others_alone(model: Model) -> None:
    adapter = model.whole
    first, second = (model.request(number) for number in (0, 1))
    alone = _run(dict.fromkeys(ROLES, adapter), second)
    sessions = [adapter.begin([request], adapter.encode([request])) for request in (first, second)]
    for session in sessions:
        adapter.step(session)
    adapter.abandon(sessions[0])
    adapter.abandon(sessions[0])
    with pytest.raises(ValueError, match="abandoned"):
        adapter.finish(sessions[0])
    with pytest.raises(ValueError, match="no steps"):
        adapter.step(sessions[0])
    while adapter.step(sessions[1]):
        pass
    assert np.array_equal(adapter.decode([second], adapter.finish(sessions[1]))[0], alone)


def test_a_rank_holds_the_weights_of_its_roles_only(model: Model) -> None:
    held = {role: _held(model.split[role]) for role in ROLES}
    assert held["denoise"] == {"transformer"}
    assert held["decode"] == {"vae"}
    assert "transformer" not in held["encode"] and any(name.startswith("text_encoder") for name in held["encode"])
    assert ("vae" in held["encode"]) == (model.card.needs_image or model.card.edits)


def _held(adapter: Any) -> set[str]:
    """Components of which any parameter or buffer is really in memory."""
    return {
        name
        for pipeline in adapter._pipelines.values()
        for name, part in vars(pipeline).items()
        if isinstance(part, torch.nn.Module)
        and any(not tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))
    }


def _transformer(adapter: Any) -> torch.nn.Module:
    transformer: torch.nn.Module = adapter._pipelines["denoise"].transformer
    return transformer
