"""Model folders of real size without weights: configs, scheduler and a small tokenizer, for ``--load-format dummy``.

``python benchmarks/model_configs.py flux-schnell DIR``; then ``ditrelay serve --model-path DIR --load-format dummy``.

Sources: the ``config.json`` files of the released models (FLUX.1, Z-Image-Turbo, Wan2.1). What a config leaves out has
the default of its class.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from small_tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """What ``model_index.json`` names.

    Attributes:
        parts: diffusers components: (class name, config).
        encoders: transformers components: (class name, config).
        tokenizers: each makes one.
        billions: parameters of each component that has many, in units of 10**9.
    """

    pipeline: str
    parts: Mapping[str, tuple[str, Config]]
    encoders: Mapping[str, tuple[str, transformers.PreTrainedConfig]]
    tokenizers: Mapping[str, Callable[[], Any]]
    billions: Mapping[str, float] = field(default_factory=dict)


def write_folder(name: str, folder: Path) -> Path:
    """Write the folder of ``MODELS[name]`` and return it. What is there already is overwritten file by file."""
    model = MODELS[name]()
    index: dict[str, Any] = {"_class_name": model.pipeline}
    for part, (cls, config) in model.parts.items():
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        _write_json(folder / part / file, {"_class_name": cls, **config})
        index[part] = ["diffusers", cls]
    for part, (cls, encoder) in model.encoders.items():
        encoder.architectures = [cls]
        encoder.save_pretrained(folder / part)
        index[part] = ["transformers", cls]
    for part, make in model.tokenizers.items():
        tokenizer = make()
        tokenizer.save_pretrained(folder / part)
        index[part] = ["transformers", type(tokenizer).__name__]
    _write_json(folder / "model_index.json", index)  # last: a folder that has one is complete
    return folder


def _write_json(path: Path, content: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------- parts used by several models


def _clip_l() -> transformers.PreTrainedConfig:
    """The text half of CLIP ViT-L/14; begin, end and padding are those of the small tokenizer."""
    return transformers.CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        projection_dim=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        vocab_size=49408,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _t5_xxl(cls: type[transformers.PreTrainedConfig], vocab_size: int) -> transformers.PreTrainedConfig:
    """T5 v1.1 XXL, or UMT5-XXL with its larger vocabulary."""
    return cls(
        vocab_size=vocab_size,
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_heads=64,
        num_layers=24,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


def _qwen3_4b() -> transformers.PreTrainedConfig:
    return transformers.Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )


_FLUX_VAE: Config = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


# ---------------------------------------------------------------- models


def _flux(*, guidance: bool) -> Model:
    """FLUX.1-dev with guidance, FLUX.1-schnell without: they differ in that embedding and in the scheduler."""
    transformer = {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": guidance,
    }
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    return Model(
        pipeline="FluxPipeline",
        parts={
            "transformer": ("FluxTransformer2DModel", transformer),
            "vae": ("AutoencoderKL", _FLUX_VAE),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", scheduler),
        },
        encoders={
            "text_encoder": ("CLIPTextModel", _clip_l()),
            "text_encoder_2": ("T5EncoderModel", _t5_xxl(transformers.T5Config, 32128)),
        },
        tokenizers={"tokenizer": clip_tokenizer, "tokenizer_2": t5_tokenizer},
        billions={"transformer": 11.90 if guidance else 11.89, "text_encoder_2": 4.76, "text_encoder": 0.123},
    )


def _z_image_turbo() -> Model:
    transformer = {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "cap_feat_dim": 2560,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    }
    return Model(
        pipeline="ZImagePipeline",
        parts={
            "transformer": ("ZImageTransformer2DModel", transformer),
            "vae": ("AutoencoderKL", _FLUX_VAE),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
        encoders={"text_encoder": ("Qwen3Model", _qwen3_4b())},
        tokenizers={"tokenizer": lambda: qwen_tokenizer(chat=True)},
        billions={"transformer": 6.15, "text_encoder": 4.02},
    )


def _wan(*, heads: int, layers: int, ffn: int, billions: float) -> Model:
    transformer = {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "num_layers": layers,
        "ffn_dim": ffn,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "patch_size": [1, 2, 2],
        "rope_max_seq_len": 1024,
    }
    vae = {
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    }
    scheduler = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return Model(
        pipeline="WanPipeline",
        parts={
            "transformer": ("WanTransformer3DModel", transformer),
            "vae": ("AutoencoderKLWan", vae),
            "scheduler": ("UniPCMultistepScheduler", scheduler),
        },
        encoders={"text_encoder": ("UMT5EncoderModel", _t5_xxl(transformers.UMT5Config, 256384))},
        tokenizers={"tokenizer": t5_tokenizer},
        billions={"transformer": billions, "text_encoder": 5.68, "vae": 0.127},
    )


MODELS: Mapping[str, Callable[[], Model]] = {
    "flux-schnell": lambda: _flux(guidance=False),
    "flux-dev": lambda: _flux(guidance=True),
    "z-image-turbo": _z_image_turbo,
    "wan2.1-1.3b": lambda: _wan(heads=12, layers=30, ffn=8960, billions=1.42),
    "wan2.1-14b": lambda: _wan(heads=40, layers=40, ffn=13824, billions=14.29),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("dir", type=Path)
    given = parser.parse_args()
    print(write_folder(given.name, given.dir))


if __name__ == "__main__":
    main()
