"""Pictures in and pixels out."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps

from ditrelay.errors import InvalidRequest
from ditrelay.runtime.request import SamplingParams

if TYPE_CHECKING:
    from ditrelay.models.adapter import Frames


def open_image(params: SamplingParams) -> Image.Image:
    """The request's picture as RGB, stretched to its height and width as diffusers' ``VaeImageProcessor`` would do.

    With the size right from the start, blocks that derive the size from the picture keep that of the request.

    Raises:
        InvalidRequest: it is no picture that Pillow reads.
    """
    try:
        with Image.open(io.BytesIO(params.image or b""), formats=("PNG", "JPEG", "WEBP")) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidRequest("image", f"it can't be read as PNG, JPEG or WebP: {error}") from error
    size = (params.width or upright.width, params.height or upright.height)
    return upright if upright.size == size else upright.resize(size, Image.Resampling.LANCZOS)


def to_frames(pixels: torch.Tensor) -> Frames:
    """Pixels in [0, 1], [channels, height, width] or [frames, channels, height, width], as uint8 [frames, h, w, 3].

    Rounds as diffusers' ``VaeImageProcessor.numpy_to_pil``, but on the device: a quarter of the bytes leaves it. From a
    GPU they come through pinned memory, several times faster than without.
    """
    frames = pixels if pixels.ndim == 4 else pixels.unsqueeze(0)
    rounded = (frames.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    if not rounded.is_cuda:
        return rounded.numpy()
    return torch.empty(rounded.shape, dtype=torch.uint8, pin_memory=True).copy_(rounded).numpy()
