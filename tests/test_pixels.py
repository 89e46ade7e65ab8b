"""Pictures in and pixels out."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ditrelay.models.pixels import open_image, to_frames
from ditrelay.runtime.request import SamplingParams


def test_a_picture_is_turned_upright() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
    assert open_image(SamplingParams(prompt="", image=file.getvalue())).size == (10, 20)


def test_sixteen_bits_of_grey_stay_grey() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x7FFF, np.uint16)).save(file, "PNG")
    assert (np.asarray(open_image(SamplingParams(prompt="", image=file.getvalue()))) == 127).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    layer = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    layer.paste((200, 200, 200, 255), (0, 0, 8, 4))
    file = io.BytesIO()
    layer.convert(mode).save(file, "PNG")
    pixels = np.asarray(open_image(SamplingParams(prompt="", image=file.getvalue())))
    assert pixels.shape == (8, 8, 3)
    assert (pixels[4:] == 255).all() and (pixels[:4] == 200).all()


def test_pixels_are_rounded_as_diffusers_rounds_them() -> None:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image[0, 0, 0, :8] = torch.tensor([-1, 1, -1.5, 1.5, 0, 1 / 255, -1 / 255, 3 / 255])
    processor = VaeImageProcessor()
    expected = np.asarray(processor.postprocess(image, output_type="pil")[0])
    frames = to_frames(processor.postprocess(image, output_type="pt")[0])
    assert np.array_equal(frames, expected[None]) and frames.flags["C_CONTIGUOUS"]
    assert to_frames(torch.zeros(5, 3, 4, 6)).shape == (5, 4, 6, 3)


def test_nan_is_refused_and_is_no_black_picture() -> None:
    pixels = torch.full((2, 3, 4, 6), 0.5)
    assert (to_frames(pixels) == 128).all()
    pixels[1, 2, 3, 5] = float("nan")
    with pytest.raises(ArithmeticError, match="NaN.*allowed: --dtype bfloat16 or float32"):
        to_frames(pixels)
