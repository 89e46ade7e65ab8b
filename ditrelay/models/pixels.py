"""Pictures in and pixels out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image

from ditrelay.errors import InvalidRequest
from ditrelay.models.picture_decoding import ERRORS, decode
from ditrelay.models.picture_files import MAX_PIXELS
from ditrelay.models.raw_picture import unpack
from ditrelay.runtime.request import SamplingParams

if TYPE_CHECKING:
    from ditrelay.models.adapter import Frames, LazyFrames


def open_image(params: SamplingParams) -> Image.Image:
    """The request's picture, upright and as RGB.

    From an engine it comes as pixels (``raw_picture``): no rank decodes what a client has sent. A file is for those
    who run stages by themselves.

    Raises:
        InvalidRequest: it is no picture that Pillow reads.
    """
    content = params.image or b""
    try:
        if (raw := unpack(content)) is not None:
            return Image.frombytes("RGB", *raw)
        return decode(content, most=MAX_PIXELS)
    except ERRORS as error:
        reason = f"it can't be read ({error}); allowed: a whole PNG, JPEG, WebP, AVIF or GIF"
        raise InvalidRequest("image", reason) from error


def stretched(image: Image.Image, params: SamplingParams) -> Image.Image:
    """The picture at the request's height and width, resized as diffusers' ``VaeImageProcessor`` would do.

    With the size right from the start, blocks that derive the size from the picture keep that of the request.
    """
    size = (params.width or image.width, params.height or image.height)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def to_frames(pixels: torch.Tensor) -> Frames:
    """Pixels in [0, 1], [channels, height, width] or [frames, channels, height, width], as uint8 [frames, h, w, 3].

    Rounds as diffusers' ``VaeImageProcessor.numpy_to_pil``, but on the device: a quarter of the bytes leaves it. From a
    GPU they come through pinned memory, several times faster than without.

    Raises:
        ArithmeticError: there is NaN among them, which would look black.
    """
    return start_to_frames(pixels)()


def start_to_frames(pixels: torch.Tensor) -> LazyFrames:
    """As ``to_frames``, but the copy is only launched: what is returned waits for it, on any thread."""
    frames = pixels if pixels.ndim == 4 else pixels.unsqueeze(0)
    scaled = (frames.float() * 255).round_()
    broken = scaled.sum().isnan()
    rounded = scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    if not rounded.is_cuda:
        _refuse(broken)
        return rounded.numpy
    device = rounded.device
    pinned, pinned_broken = (
        torch.empty(each.shape, dtype=each.dtype, pin_memory=True).copy_(each, non_blocking=True)
        for each in (rounded, broken)
    )
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(device))

    def arrived() -> Frames:
        with torch.cuda.device(device):  # else a thread that has set none makes a context on the first GPU
            copied.synchronize()
        _refuse(pinned_broken)
        return pinned.numpy()

    return arrived


def _refuse(broken: torch.Tensor) -> None:
    if broken:
        raise ArithmeticError(
            "pixels are NaN: the model's values left the range of --dtype; allowed: --dtype bfloat16 or float32, or a "
            "smaller guidance_scale"
        )
