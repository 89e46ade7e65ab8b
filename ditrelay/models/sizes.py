"""Which heights, widths and frame counts a model takes, computed from its config files. No torch import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ditrelay.models.quirks import Family

_MAX_SIDE = 8192
_MAX_FRAMES = 1025


@dataclass(frozen=True)
class Sizes:
    """Height and width are multiples of ``multiple`` up to ``max_side``; frames are k * ``frame_multiple`` + 1.

    Attributes:
        trained: height, width (pixels) and frames that the transformer's config says it was made for.
        ends_there: it can make no larger picture.
    """

    multiple: int
    frame_multiple: int
    max_side: int
    max_frames: int
    trained: tuple[int, int, int] | None = None
    ends_there: bool = False


def sizes_of(family: Family, vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> Sizes:
    """Source of the rules: the scale factors that diffusers' pipelines compute from the same config keys."""
    spatial, temporal = _compression(vae)
    pixels_per_token = spatial * (family.patch or _patch(transformer))
    multiple = math.lcm(pixels_per_token, family.min_multiple)
    tokens = _max_tokens(transformer.get(family.max_side_key)) if family.max_side_key else None
    max_side = _MAX_SIDE if tokens is None else tokens * pixels_per_token
    max_frames = _MAX_FRAMES if tokens is None else (tokens - 1) * temporal + 1
    frames = 1 if family.media == "image" else max_frames
    sizes = Sizes(multiple, temporal, max_side // multiple * multiple, frames)
    return _of_cogvideox(sizes, spatial, transformer) if family.name == "cogvideox" else sizes


def _of_cogvideox(sizes: Sizes, spatial: int, transformer: Mapping[str, Any]) -> Sizes:
    """With a patch in time (CogVideoX 1.5) the table of positions is cut to a size, without one it is stretched."""
    height, width = (
        transformer.get(key, default) * spatial // sizes.multiple * sizes.multiple
        for key, default in (("sample_height", 60), ("sample_width", 90))
    )
    frames = (transformer.get("sample_frames", 49) - 1) // sizes.frame_multiple * sizes.frame_multiple + 1
    return replace(sizes, trained=(height, width, frames), ends_there=transformer.get("patch_size_t") is not None)


def _compression(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels per latent pixel, frames per latent frame; the keys' defaults are those of the VAE classes."""
    match vae.get("_class_name"):
        case "AutoencoderKLWan" | "AutoencoderKLQwenImage":
            downsample = vae.get("temperal_downsample", [False, True, True])
            return 2 ** len(downsample), 2 ** sum(downsample)
        case "AutoencoderKLLTXVideo":
            scaling = 2 ** sum(vae.get("spatio_temporal_scaling", [True, True, True, False]))
            return vae.get("patch_size", 4) * scaling, vae.get("patch_size_t", 1) * scaling
        case _:
            spatial = 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
            return spatial, int(vae.get("temporal_compression_ratio", 1))


def _patch(transformer: Mapping[str, Any]) -> int:
    patch = transformer.get("patch_size", 2)
    return int(patch[-1] if isinstance(patch, list) else patch)


def _max_tokens(limit: int | list[int] | None) -> int | None:
    """A list is (text or time, height, width)."""
    return min(limit[1:]) if isinstance(limit, list) else limit
