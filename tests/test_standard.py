"""The adapter over ordinary pipelines (the parity tests run it too): padding, sessions, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_models
import torch

from ditrelay.errors import InvalidRequest, UnsupportedModel
from ditrelay.models.card import load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.standard import StandardAdapter
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.topology import COLOCATED


def _load(folder: Path) -> Any:
    return load_adapter(LoadSpec(card=load_card(str(folder)), roles=COLOCATED))


def _request(folder: Path) -> Request:
    params = SamplingParams(prompt="a cat", height=32, width=32, num_frames=9, num_inference_steps=2, seed=3)
    return Request(request_id="r", params=load_card(str(folder)).resolve(params))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("cogvideox", tmp_path_factory.getbasetemp() / "tiny")


def test_frames_padded_for_a_temporal_patch_are_cut_off_as_in_the_stock_pipeline(folder: Path, tmp_path: Path) -> None:
    stock = diffusers.DiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    config = dict(stock.transformer.config) | dict(patch_size_t=2, use_rotary_positional_embeddings=True)
    config |= dict(attention_head_dim=16, patch_bias=False)
    stock.register_modules(transformer=diffusers.CogVideoXTransformer3DModel.from_config(config))
    stock.save_pretrained(tmp_path / "cogvideox15")
    stock.set_progress_bar_config(disable=True)
    request = _request(folder)
    expected = stock(
        "a cat",
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=6.0,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).frames[0]
    adapter = _load(tmp_path / "cogvideox15")
    session = adapter.begin([request], adapter.encode([request]))
    while adapter.step(session):
        pass
    latents = adapter.finish(session)
    assert latents["latents"].value.shape[1] == 4  # 9 frames are 3 latent frames; 4 with the padding
    frames = adapter.decode([request], latents)[0]
    assert np.abs(frames.astype(int) - (expected * 255).round().astype(int)).max() <= 1


def test_defaults_are_those_of_the_transformers_config(folder: Path) -> None:
    card = load_card(str(folder))
    assert (card.default_height, card.default_width, card.default_num_frames) == (32, 32, 9)
    assert card.resolve(SamplingParams(prompt="a cat", height=320, width=64)).height == 320


@pytest.mark.parametrize("side", ["height", "width"])
def test_a_size_past_the_table_of_positions_of_cogvideox_15_is_refused(side: str, folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "model"))
    config = other / "transformer" / "config.json"
    trained = {"sample_height": 4, "sample_width": 6, "patch_size_t": 2, "use_rotary_positional_embeddings": True}
    config.write_text(json.dumps(json.loads(config.read_text()) | trained))
    card = load_card(str(other))
    largest = {"height": 32, "width": 48}
    assert card.resolve(SamplingParams(prompt="a cat", **largest)).width == 48
    with pytest.raises(InvalidRequest, match=f"{side}: 64 pixels; allowed: at most {largest[side]}"):
        card.resolve(SamplingParams(prompt="a cat", **largest | {side: 64}))


def test_a_model_without_its_text_encoder_is_refused_naming_it(folder: Path, tmp_path: Path) -> None:
    lacking = Path(shutil.copytree(folder, tmp_path / "model"))
    index = json.loads((lacking / "model_index.json").read_text()) | {"text_encoder": [None, None]}
    (lacking / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match="names no text_encoder, which this model needs"):
        load_adapter(LoadSpec(card=load_card(str(lacking)), roles=COLOCATED))


def test_a_session_is_finished_once_its_steps_are_done(folder: Path) -> None:
    adapter = _load(folder)
    assert isinstance(adapter, StandardAdapter)
    request = _request(folder)
    session = adapter.begin([request], adapter.encode([request]))
    assert (session.total_steps, session.steps_done) == (2, 0)
    assert adapter.step(session) is True
    with pytest.raises(ValueError, match="steps remain"):
        adapter.finish(session)
    assert adapter.step(session) is False
    assert list(adapter.finish(session)) == ["latents"]
    with pytest.raises(ValueError, match="no steps remain"):
        adapter.step(session)
    with pytest.raises(TypeError, match="a StandardSession is needed"):
        adapter.step(object())
    with pytest.raises(ValueError, match="a batch of one"):
        adapter.encode([request, request])
