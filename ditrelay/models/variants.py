"""Relatives of the supported models that have the same pipeline class but are fed or run in another way. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ditrelay.errors import UnsupportedModel
from ditrelay.models.folder import ModelFolder
from ditrelay.models.quirks import Family

_TRANSFORMERS: Mapping[str, str] = MappingProxyType(
    {
        "z-image": "ZImageTransformer2DModel",
        "flux": "FluxTransformer2DModel",
        "flux2-klein": "Flux2Transformer2DModel",
        "flux2-klein-distilled": "Flux2Transformer2DModel",
        "qwen-image": "QwenImageTransformer2DModel",
        "sd3": "SD3Transformer2DModel",
        "wan": "WanTransformer3DModel",
        "wan-i2v": "WanTransformer3DModel",
        "ltx": "LTXVideoTransformer3DModel",
        "cogvideox": "CogVideoXTransformer3DModel",
    }
)
_PACKED = ("flux", "flux2-klein", "flux2-klein-distilled", "qwen-image")  # a token's channels are those of 2x2 pixels
_WAN_FRAMES = 4  # of an image-to-video model, the mask has a channel for each frame of a latent frame

# Keys of the transformer's config that are set in a variant only -> what it is.
_SWITCHES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "wan-i2v": {"pos_embed_seq_len": "first-and-last-frame-to-video (FLF2V)"},
        "qwen-image": {"zero_cond_t": "picture editing", "use_layer3d_rope": "layered pictures"},
    }
)


def check_variant(folder: ModelFolder, family: Family) -> None:
    """Raises ``UnsupportedModel`` for a model that would load as one of ``family`` and fail, or draw something else."""
    if "transformer_2" in folder.components:
        raise UnsupportedModel(
            f"{folder.path / 'model_index.json'} names a transformer_2: models of two transformers are not supported"
        )
    config, path = folder.config("transformer"), folder.path / "transformer" / "config.json"
    found, expected = config.get("_class_name"), _TRANSFORMERS[family.name]
    if found is not None and found != expected:
        raise UnsupportedModel(f"{path}: a {found} is not supported in a {family.pipeline_classes[0]}; only {expected}")
    for key, variant in _SWITCHES.get(family.name, {}).items():
        if config.get(key):
            raise UnsupportedModel(f"{path}: {key} is set: models for {variant} are not supported")
    _check_channels(family, config, folder.config("vae"), str(path))


def _check_channels(family: Family, transformer: Mapping[str, Any], vae: Mapping[str, Any], path: str) -> None:
    """More channels than the latents have are for something else: a mask, a control picture, a picture to fill."""
    latent, taken = vae.get("latent_channels", vae.get("z_dim")), transformer.get("in_channels")
    if latent is None or taken is None:
        return
    expected = latent * 4 if family.name in _PACKED else latent
    if family.name == "wan-i2v":
        expected = 2 * latent + _WAN_FRAMES
    if taken != expected:
        raise UnsupportedModel(
            f"{path}: in_channels is {taken}, and {family.name} models take {expected} with this VAE: variants that "
            "are given something else as well (Fill, Control, Inpaint, ...) are not supported"
        )
