"""Writes a trained model as a diffusers folder in float16, and reads the image model back."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Model

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
LOCAL_KEYS = ("is_local", "local_files_only", "backend", "_name_or_path")


@dataclass(frozen=True)
class ImageModel:
    """The parts of the text-to-image model; ``shift`` is the scheduler's."""

    vae: AutoencoderKL
    text_encoder: Qwen3Model
    tokenizer: PreTrainedTokenizerFast
    transformer: ZImageTransformer2DModel
    shift: float = 2.0


def export_image_model(model: ImageModel, folder: Path) -> None:
    """Replaces ``folder`` with the model as ZImagePipeline saves and loads it, in float16."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=model.shift)
    pipeline = ZImagePipeline(
        scheduler, half(model.vae), half(model.text_encoder), model.tokenizer, half(model.transformer)
    )
    save_pipeline(pipeline, folder)


def load_image_model(folder: Path) -> ImageModel:
    """Reads a folder that ``export_image_model`` wrote, in float32, to train on."""
    return ImageModel(
        AutoencoderKL.from_pretrained(folder / "vae").float(),
        Qwen3Model.from_pretrained(folder / "text_encoder").float(),
        PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        ZImageTransformer2DModel.from_pretrained(folder / "transformer").float(),
        FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config.shift,
    )


def half(module: nn.Module) -> nn.Module:
    """A float16 copy on the CPU, in evaluation mode and the usual memory layout."""
    usual = torch.contiguous_format
    return copy.deepcopy(module).half().cpu().to(memory_format=usual).eval()  # type: ignore[call-overload]


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Replaces ``folder`` with the pipeline, its tokenizer under a class name that transformers 4 and 5 both know."""
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.tokenizer.backend_tokenizer.no_truncation()  # it keeps what its last call cut at
    pipeline.save_pretrained(folder, safe_serialization=True)
    _edit_json(folder / "model_index.json", {"tokenizer": ["transformers", TOKENIZER_CLASS]})
    _edit_json(folder / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": TOKENIZER_CLASS})
    for file in folder.glob("*/config.json"):
        _edit_json(file, {})
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


def weights_megabytes(folder: Path) -> float:
    """The size of all weights in a diffusers folder, in MB."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6


def _edit_json(path: Path, values: dict[str, object]) -> None:
    content = json.loads(path.read_text()) | values
    for key in LOCAL_KEYS:
        content.pop(key, None)
    path.write_text(json.dumps(content, indent=2) + "\n")
