"""Relatives of the supported models that would load as one of them, and then fail or draw something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from ditrelay.errors import UnsupportedModel
from ditrelay.models.card import load_card
from ditrelay.runtime.request import SamplingParams

CASES: list[tuple[str, str, dict[str, Any], str]] = [
    ("wan-i2v", "transformer/config.json", {"pos_embed_seq_len": 514}, "pos_embed_seq_len is set: .*FLF2V"),
    ("wan-i2v", "transformer/config.json", {"in_channels": 48}, "in_channels is 48, and wan-i2v models take 36"),
    ("wan", "transformer/config.json", {"in_channels": 36}, "in_channels is 36, and wan models take 16"),
    ("wan", "transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}, "a WanVACETransformer3DModel is"),
    ("wan", "model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "names a transformer_2"),
    ("wan", "model_index.json", {"expand_timesteps": True}, "WanPipeline with expand_timesteps=True is not supported"),
    ("wan", "model_index.json", {"_class_name": "WanAnimatePipeline"}, "WanAnimatePipeline is not supported"),
    ("flux", "transformer/config.json", {"in_channels": 384}, "in_channels is 384, and flux models take 16 .*Fill"),
    ("flux", "model_index.json", {"_class_name": "FluxKontextPipeline"}, "FluxKontextPipeline is not supported"),
    ("qwen-image", "transformer/config.json", {"zero_cond_t": True}, "zero_cond_t is set: .*editing"),
    ("qwen-image", "model_index.json", {"_class_name": "QwenImageEditPipeline"}, "QwenImageEditPipeline is not"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


@pytest.mark.parametrize(("family", "file", "change", "words"), CASES)
def test_a_variant_that_can_not_run_is_refused_by_name_before_anything_is_loaded(
    family: str, file: str, change: dict[str, Any], words: str, root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / family
    shutil.copytree(tiny_models.build(family, root), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    load_card(str(folder), "dummy")
    if "transformer_2" in change:
        shutil.copytree(folder / "transformer", folder / "transformer_2")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | change))
    with pytest.raises(UnsupportedModel, match=words):
        load_card(str(folder), "dummy")


@pytest.mark.parametrize("scale", [0, 0.0, 1, 1.0, 3.5, None])
def test_a_model_without_guidance_takes_the_scales_that_mean_none_and_the_default(
    scale: float | None, root: Path
) -> None:
    card = load_card(str(tiny_models.build("flux-schnell", root)))
    assert card.default_guidance_scale == 3.5 and not card.supports_guidance
    assert card.resolve(SamplingParams(prompt="x", guidance_scale=scale)).guidance_scale in (scale, 3.5)
