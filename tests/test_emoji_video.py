"""The built-in video model: the stock pipeline's clip in every mode, its own defaults and limits, and no surprises."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import WanPipeline

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.errors import InvalidRequest
from ditrelay.models.adapter import StageAdapter
from ditrelay.models.card import ModelCard, load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.runtime.pipelines_core.media import encode_media
from ditrelay.runtime.request import Request
from ditrelay.runtime.topology import COLOCATED
from ditrelay.server.model_limits import limits_of
from ditrelay.server.video_schemas import VideoRequest

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "builtin:emoji-video"
PROMPT = "a cat moving to the left"
SEED = 7

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return load_card(MODEL)


@pytest.fixture(scope="module")
def request_of_defaults(card: ModelCard) -> Request:
    return Request(request_id="r", params=card.resolve(SamplingParams(prompt=PROMPT, seed=SEED)))


@pytest.fixture(scope="module")
def adapter(card: ModelCard) -> StageAdapter:
    return load_adapter(LoadSpec(card=card, roles=COLOCATED))


@pytest.fixture(scope="module")
def frames(adapter: StageAdapter, request_of_defaults: Request) -> Pixels:
    """Of the request, encoded, denoised and decoded in this process."""
    requests = [request_of_defaults]
    session = adapter.begin(requests, adapter.encode(requests))
    while adapter.step(session):
        pass
    return adapter.decode(requests, adapter.finish(session))[0]


# ---------------------------------------------------------------- the clip


def test_the_stock_pipeline_makes_the_same_clip(card: ModelCard, frames: Pixels, request_of_defaults: Request) -> None:
    params = request_of_defaults.params
    pipeline = WanPipeline.from_pretrained(card.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        PROMPT,
        height=params.height,
        width=params.width,
        num_frames=params.num_frames,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).frames[0]
    assert frames.shape == stock.shape == (9, 96, 96, 3)
    assert np.abs(np.rint(stock * 255) - frames).max() <= 1
    assert frames.std() > 10  # it shows something


@pytest.mark.parametrize(
    "changes", [{}, {"enable_disagg": True, "num_gpus": 2}], ids=["colocated", "1 DiT + 1, asynchronous"]
)
def test_every_mode_makes_the_file_of_that_clip_from_the_prompt_alone(
    changes: dict[str, object], card: ModelCard, frames: Pixels
) -> None:
    with Engine(ServerArgs(model_path=MODEL, device="cpu", warmup=False, **changes)) as engine:
        result = engine.generate(PROMPT, seed=SEED)
    assert (result.num_frames, result.width, result.height, result.media_type) == (9, 96, 96, "video/mp4")
    assert result.media == encode_media(frames, fps=card.fps).data
    with av.open(io.BytesIO(result.media)) as clip:
        assert clip.streams.video[0].average_rate == 6


def test_a_prompt_keeps_the_padding_that_the_model_was_trained_with(adapter: StageAdapter, card: ModelCard) -> None:
    request = Request(request_id="r", params=card.resolve(SamplingParams(prompt="a kite", seed=1)))
    words = adapter.encode([request])["prompt_embeds"].value
    assert isinstance(words, torch.Tensor) and words.shape == (1, 512, 192)
    assert words[0, 8:].abs().max() == 0  # the transformer sees all of it


# ---------------------------------------------------------------- defaults and limits


def test_what_a_request_leaves_out_is_what_the_model_was_made_for(card: ModelCard) -> None:
    params = card.resolve(SamplingParams(prompt="x"))
    assert (params.height, params.width, params.num_frames, params.num_inference_steps) == (96, 96, 9, 8)
    assert params.guidance_scale == card.default_guidance_scale > 1
    assert (card.family, card.media, card.fps) == ("wan", "video", 6)
    of_http = VideoRequest(prompt="x").sampling_params(card, None)
    assert card.resolve(msgspec.structs.replace(of_http, seed=1, previews=0)) == msgspec.structs.replace(params, seed=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 480, "width": 832}, "height: 480 pixels; allowed: at most 96$"),
        ({"height": 72}, "height: 72 is not allowed; allowed: 96$"),
        ({"width": 48}, "width: 48 is not allowed; allowed: 96$"),
        ({"num_frames": 8}, r"num_frames: 8 is not allowed; allowed: 2k \+ 1, the nearest is 9"),
        ({"num_frames": 81}, "num_frames: 81 is not allowed; allowed: 1 to 17"),
    ],
)
def test_what_it_was_not_made_for_is_refused_and_the_answer_says_what_is(
    given: dict[str, int], message: str, card: ModelCard
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        card.resolve(SamplingParams(prompt="x", **given))


def test_seconds_become_the_nearest_number_of_frames(card: ModelCard) -> None:
    assert VideoRequest(prompt="x", seconds=1.5).sampling_params(card, None).num_frames == 9
    assert VideoRequest(prompt="x", seconds="2.8").sampling_params(card, None).num_frames == 17
    with pytest.raises(InvalidRequest, match="seconds: 4 is too long; allowed: at most 2.83"):
        VideoRequest(prompt="x", seconds="4").sampling_params(card, None)


def test_clients_are_told_these_limits(card: ModelCard) -> None:
    limits = limits_of(card)
    assert limits.clip is not None and limits.media == "video"
    assert (limits.size.multiple, limits.size.max_side, limits.size.max_pixels) == (96, 96, 96 * 96)
    assert (limits.clip.fps, limits.clip.frame_multiple, limits.clip.max_num_frames) == (6, 2, 17)
    assert limits.previews and limits.guidance and limits.negative_prompt and not limits.needs_image


# ---------------------------------------------------------------- its files


def test_its_files_are_whole_and_small(card: ModelCard) -> None:
    assert json.loads((Path(card.path) / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    assert sum(file.stat().st_size for file in Path(card.path).rglob("*")) < 25e6


def test_it_is_evaluated_and_shown_with_its_own_defaults(card: ModelCard) -> None:
    from tools.train_emoji import video_export, video_model

    tools = (video_model.SIZE, video_model.FRAMES, video_export.FRAMES_PER_SECOND, video_export.STEPS)
    assert tools == (card.default_width, card.default_num_frames, card.fps, card.default_num_inference_steps)
    assert video_export.GUIDANCE == card.default_guidance_scale
