"""Pictures that start from a picture, or are drawn looking at one: the stock pipelines' pixels, in every mode."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import tiny_models
import torch
from picture_samples import lying, picture
from PIL import Image

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.errors import InvalidRequest
from ditrelay.models.adapter import StageAdapter
from ditrelay.models.card import ModelCard, load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.pixels import open_image, stretched
from ditrelay.runtime.communication.codec import decode_payload, encode_state
from ditrelay.runtime.payloads import State
from ditrelay.runtime.request import Request
from ditrelay.runtime.topology import COLOCATED, Role

ROLES: tuple[Role, ...] = ("encode", "denoise", "decode")
PROMPT = "a cat on a red chair"
STOCK = {
    "z-image": "ZImageImg2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
    "qwen-image": "QwenImageImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux2-klein": "Flux2KleinPipeline",
    "flux2-klein-distilled": "Flux2KleinPipeline",
}
BY_STRENGTH = ("z-image", "flux", "qwen-image", "sd3")
BY_LOOKING = ("flux2-klein", "flux2-klein-distilled")

by_strength = pytest.mark.parametrize("model", BY_STRENGTH, indirect=True)
by_looking = pytest.mark.parametrize("model", BY_LOOKING, indirect=True)

Pixels = np.ndarray[Any, Any]


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


@pytest.fixture(scope="module", params=STOCK)
def model(request: pytest.FixtureRequest, tiny_root: Path) -> Iterator[Model]:
    yield Model(load_card(str(tiny_models.build(request.param, tiny_root))))


class Model:
    """A tiny model with an adapter that has every role, and one adapter per role."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        whole = load_adapter(LoadSpec(card=card, roles=COLOCATED))
        self.whole: Mapping[Role, StageAdapter] = dict.fromkeys(ROLES, whole)
        self.split = {role: load_adapter(LoadSpec(card=card, roles=frozenset({role}))) for role in ROLES}

    @property
    def by_strength(self) -> bool:
        return self.card.family in BY_STRENGTH

    def edit(self, **fields: object) -> Request:
        given = {"prompt": PROMPT, "seed": 7, "image": picture(64, 80), "num_inference_steps": 4} | fields
        return Request(request_id="r", params=self.card.resolve(SamplingParams(**given)))


def sent(state: State) -> State:
    """What arrives on another rank."""
    payload = encode_state(state, batch_id="r", request_ids=["r"])
    return decode_payload(type(payload)(payload.header, tuple(tensor.clone() for tensor in payload.tensors)))


def draw(adapters: Mapping[Role, StageAdapter], request: Request) -> tuple[Pixels, int]:
    """The pixels, and in how many steps they were made."""
    session = adapters["denoise"].begin([request], sent(adapters["encode"].encode([request])))
    while adapters["denoise"].step(session):
        pass
    return adapters["decode"].decode([request], sent(adapters["denoise"].finish(session)))[0], session.total_steps


def stock(card: ModelCard, params: SamplingParams) -> Pixels:
    """What diffusers' own pipeline makes of the same request, in float32."""
    pipeline = getattr(diffusers, STOCK[card.family]).from_pretrained(card.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    guidance = "true_cfg_scale" if card.family == "qwen-image" else "guidance_scale"
    given: dict[str, Any] = {guidance: params.guidance_scale, "image": open_image(params)}
    if params.negative_prompt is not None:
        given["negative_prompt"] = params.negative_prompt
    if params.strength is not None:
        given |= {"strength": params.strength, "image": stretched(open_image(params), params)}
    pixels = pipeline(
        prompt=params.prompt,
        height=params.height,
        width=params.width,
        num_inference_steps=params.num_inference_steps,
        generator=torch.Generator("cpu").manual_seed(params.seed or 0),
        output_type="np",
        **given,
    ).images
    rounded: Pixels = (pixels * 255).round().astype(np.uint8)
    return rounded


def decoded(act: Callable[[], object]) -> torch.Tensor:
    """The latents that ``act`` gives to FLUX.2's VAE; it goes no further."""
    decode = mock.create_autospec(diffusers.AutoencoderKLFlux2.decode, side_effect=InterruptedError)
    with mock.patch.object(diffusers.AutoencoderKLFlux2, "decode", decode), pytest.raises(InterruptedError):
        act()
    latents: torch.Tensor = decode.call_args.args[1]
    return latents


def distance(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@by_strength
@pytest.mark.parametrize(("strength", "steps"), [(None, 3), (1.0, 4), (0.25, 1), (0.01, 1)])
def test_an_edit_is_that_of_the_stock_image_to_image_pipeline(model: Model, strength: float | None, steps: int) -> None:
    negative = "blurry" if model.card.supports_negative_prompt else None
    request = model.edit(strength=strength, negative_prompt=negative)
    ours, steps_done = draw(model.whole, request)
    assert steps_done == steps
    assert ours.shape == (1, 80, 64, 3) and ours.std() > 0
    assert distance(ours, stock(model.card, request.params)) <= 1


@by_strength
def test_a_size_that_the_model_takes_need_not_be_a_multiple_of_16(model: Model) -> None:
    side = 5 * model.card.size_multiple
    request = model.edit(image=picture(side, side))
    ours, _ = draw(model.whole, request)
    assert ours.shape == (1, side, side, 3)
    assert distance(ours, stock(model.card, request.params)) <= 1


@by_looking
@pytest.mark.parametrize("size", [{}, {"height": 32, "width": 48}], ids=["the picture's size", "another size"])
def test_a_model_that_looks_at_the_picture_makes_what_the_stock_pipeline_makes(
    model: Model, size: dict[str, int]
) -> None:
    request = model.edit(**size)
    ours, steps_done = draw(model.whole, request)
    assert steps_done == 4 and request.params.strength is None
    assert ours.shape == (1, size.get("height", 80), size.get("width", 64), 3) and ours.std() > 0
    assert distance(ours, stock(model.card, request.params)) <= 1
    # A model this small sees little in a picture: what it sees is in the latents, before they are rounded to pixels.
    other = model.edit(image=picture(64, 96), height=request.params.height, width=request.params.width)
    mine = decoded(lambda: draw(model.whole, request))
    beside = decoded(lambda: draw(model.whole, other))
    by_stock = decoded(lambda: stock(model.card, request.params))
    assert (mine - beside).abs().max() > 100 * (mine - by_stock).abs().max()


@by_looking
@pytest.mark.parametrize(("width", "height"), [(63, 80), (80, 63), (64, 520)])
def test_a_picture_that_such_a_model_cannot_look_at_is_refused(model: Model, width: int, height: int) -> None:
    with pytest.raises(InvalidRequest, match="image: .*allowed: at least 64 pixels a side"):
        model.edit(image=picture(width, height))
    with pytest.raises(InvalidRequest, match="strength: this model does not start"):
        model.edit(strength=0.5)


def test_three_ranks_give_bit_for_bit_what_one_gives(model: Model) -> None:
    request = model.edit()
    assert np.array_equal(draw(model.split, request)[0], draw(model.whole, request)[0])


@by_strength
def test_less_strength_leaves_more_of_the_picture(model: Model) -> None:
    """Measured against what the VAE alone makes of the picture: a strength that leaves out nearly all noise."""
    kept = draw(model.whole, model.edit(strength=0.001, num_inference_steps=1000))[0].astype(int)
    near, far = (draw(model.whole, model.edit(strength=s, num_inference_steps=10))[0] for s in (0.1, 1.0))
    assert np.abs(near - kept).mean() < np.abs(far - kept).mean()


def test_a_text_and_an_edit_interleaved_are_those_drawn_alone(model: Model) -> None:
    requests = [model.edit(), model.edit(image=None, height=32, width=32)]
    alone = [draw(model.whole, request)[0] for request in requests]
    adapter = model.whole["denoise"]
    sessions = [adapter.begin([request], adapter.encode([request])) for request in requests]
    running = list(sessions)
    while running:
        running = [session for session in running if adapter.step(session)]
    together = [
        adapter.decode([request], adapter.finish(session))[0]
        for request, session in zip(requests, sessions, strict=True)
    ]
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_what_crosses_an_edge_is_what_the_adapter_declared(model: Model) -> None:
    request, text = model.edit(), model.edit(image=None, height=32, width=32)
    conditioning = model.split["encode"].encode([request])
    assert conditioning.keys() <= model.whole["denoise"].conditioning_names
    assert "generator" in conditioning and "generator" not in model.split["encode"].encode([text])


def test_an_edit_that_is_continued_elsewhere_gives_the_same_picture(model: Model) -> None:
    adapter, request = model.whole["denoise"], model.edit()
    conditioning = adapter.encode([request])
    expected = draw(model.whole, request)[0]
    first = adapter.begin([request], conditioning)
    adapter.step(first)
    captured = sent(adapter.capture(first))
    adapter.abandon(first)
    second = adapter.begin([request], conditioning)
    adapter.restore(second, captured)
    assert (second.steps_done, second.total_steps) == (1, 3 if model.by_strength else 4)
    while adapter.step(second):
        pass
    assert np.array_equal(adapter.decode([request], adapter.finish(second))[0], expected)


# ---------------------------------------------------------------- the built-in model, through engines

IMAGE = picture(128, 96)
MODES: Mapping[str, dict[str, object]] = {
    "colocated": {},
    "lock-step": {"enable_disagg": True, "num_gpus": 2, "use_async_comm": False},
    "async": {"enable_disagg": True, "num_gpus": 3},
}


def emoji(**changes: object) -> ServerArgs:
    return ServerArgs(**{"model_path": "builtin:emoji", "device": "cpu", "warmup": False, **changes})


@pytest.fixture(scope="module")
def by_stock() -> Pixels:
    card = load_card("builtin:emoji")
    return stock(card, card.resolve(SamplingParams(prompt=PROMPT, image=IMAGE, seed=5)))[0]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_the_same_file_of_the_built_in_model(
    mode: str, by_stock: Pixels, files: dict[str, bytes]
) -> None:
    with Engine(emoji(**MODES[mode])) as engine:
        tickets = [engine.submit(SamplingParams(prompt=PROMPT, image=IMAGE, seed=seed)) for seed in (5, 6, 5)]
        first, other, again = (ticket.result(120) for ticket in tickets)
    assert (first.width, first.height) == (128, 96)
    assert first.media == again.media != other.media
    assert distance(np.asarray(first.image), by_stock) <= 1
    files[mode] = first.media
    assert set(files.values()) == {first.media}


@pytest.mark.parametrize("family", ["flux", "flux2-klein"])
def test_two_sequence_parallel_ranks_edit_as_one_does(family: str, tiny_root: Path) -> None:
    model = str(tiny_models.build(family, tiny_root))
    params = SamplingParams(prompt=PROMPT, image=picture(64, 80), seed=5, num_inference_steps=4)
    made = []
    for changes in ({}, {"enable_disagg": True, "num_gpus": 3, "sp_degree": 2}):
        with Engine(emoji(model_path=model, **changes)) as engine:
            made.append(np.asarray(engine.submit(params).result(120).image))
    assert distance(*made) <= 1


def test_a_picture_that_lies_on_its_side_is_edited_upright() -> None:
    card = load_card("builtin:emoji")
    params = card.resolve(SamplingParams(prompt=PROMPT, image=lying("JPEG"), seed=5))
    assert (params.width, params.height) == (32, 48)
    with Image.open(io.BytesIO(params.image or b"")) as stored:
        upright = np.asarray(stored.rotate(-90, expand=True))
    assert distance(np.asarray(open_image(params)), upright) == 0
