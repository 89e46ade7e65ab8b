"""Tensors that a class has no place for: refused where they would have changed the picture, else left out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_models
import torch
import transformers
from small_tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer

from ditrelay.errors import UnsupportedModel
from ditrelay.models.card import load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.weights import check_all_used
from ditrelay.runtime.topology import COLOCATED

CLIP_PARTS: dict[str, Any] = dict(hidden_size=32, intermediate_size=16, num_attention_heads=4, num_hidden_layers=1)


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_models.build("flux", tmp_path_factory.getbasetemp() / "tiny")
    return Path(shutil.copytree(made, tmp_path / "model"))


def add(component: Path, suffixes: tuple[str, ...]) -> tuple[Path, str]:
    """Puts a tensor of each suffix beside each matrix. Returns the file and one of the names before the suffix."""
    path = next(component.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    matrices = [name.removesuffix(".weight") for name, value in tensors.items() if value.ndim == 2]
    tensors |= {f"{name}.{suffix}": torch.ones(1) for name in matrices for suffix in suffixes}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path, min(matrices)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize(
    ("suffixes", "kind"),
    [
        (("weight_scale",), "scaled fp8 weights can't"),
        (("scale_weight", "scale_input"), "scaled fp8"),
        (("lora_A.weight", "lora_B.weight"), "a LoRA can't"),
        (("weight.absmax", "weight.quant_map"), "bitsandbytes"),
        (("something_new",), "allowed"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_weights_that_are_changed_by_further_tensors_are_refused_naming_file_tensor_and_count(
    folder: Path, component: str, suffixes: tuple[str, ...], kind: str
) -> None:
    path, name = add(folder / component, suffixes)
    with pytest.raises(UnsupportedModel) as refused:
        load_adapter(LoadSpec(card=load_card(str(folder)), roles=COLOCATED))
    message = str(refused.value)
    assert f"{path} has " in message and kind in message
    assert any(f"for instance {start}." in message for start in (name, name.removeprefix("text_model.")))


def test_a_tensor_at_the_top_of_a_denoisers_file_is_refused_too(folder: Path) -> None:
    path = next((folder / "transformer").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path) | {"scaled_fp8": torch.zeros(2)}
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(UnsupportedModel, match="has 1 tensors that FluxTransformer2DModel does not know.* scaled_fp8"):
        load_adapter(LoadSpec(card=load_card(str(folder)), roles=frozenset({"denoise"})))


def _clip() -> Any:
    text = CLIP_PARTS | {"vocab_size": len(clip_tokenizer())}
    vision = CLIP_PARTS | {"image_size": 32, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def _t5(cls: Any, config: Any) -> Any:
    options = dict(vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return cls(config(**options, relative_attention_num_buckets=8, tie_word_embeddings=False))


def _qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(tiny_models._qwen3_config(qwen_tokenizer(), 2))


# What a folder may hold, and the class that takes a part of it.
LARGER: dict[str, tuple[Callable[[], Any], str]] = {
    "a T5 with its decoder": (
        lambda: _t5(transformers.T5ForConditionalGeneration, transformers.T5Config),
        "T5EncoderModel",
    ),
    "a UMT5 with its decoder": (
        lambda: _t5(transformers.UMT5ForConditionalGeneration, transformers.UMT5Config),
        "UMT5EncoderModel",
    ),
    "a CLIP with its eyes": (_clip, "CLIPTextModel"),
    "a CLIP that reads": (_clip, "CLIPVisionModel"),
    "a language model with its head": (_qwen3, "Qwen3Model"),
}


@pytest.mark.parametrize("saved", LARGER)
def test_a_model_that_was_saved_with_parts_that_the_class_leaves_out_is_loaded(saved: str, tmp_path: Path) -> None:
    make, class_name = LARGER[saved]
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    own = safetensors.torch.load_file(path)
    scaled = own | {f"{name}_scale": torch.ones(1) for name, value in own.items() if value.ndim == 2}
    for tensors, refused in ((own, False), (scaled, True)):
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        cls = getattr(transformers, class_name)
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        if refused:
            with pytest.raises(UnsupportedModel, match="scaled fp8 weights can't be used"):
                check_all_used(model, tmp_path, info["unexpected_keys"], whole=False)
        else:
            check_all_used(model, tmp_path, info["unexpected_keys"], whole=False)


def test_buffers_that_are_made_anew_and_what_the_class_ignores_may_be_in_the_file(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = next((folder / "text_encoder").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    prefix = next(name for name in tensors if "position_embedding" in name).rpartition("position_embedding")[0]
    tensors[f"{prefix}position_ids"] = torch.arange(77)[None]
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    path = next((folder / "text_encoder_2").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    load_adapter(LoadSpec(card=load_card(str(folder)), roles=frozenset({"encode"})))
    wan = tiny_models.build("wan", tmp_path_factory.getbasetemp() / "tiny")
    copied = Path(shutil.copytree(wan, folder.parent / "wan"))
    path = next((copied / "transformer").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    load_adapter(LoadSpec(card=load_card(str(copied)), roles=frozenset({"denoise"})))
