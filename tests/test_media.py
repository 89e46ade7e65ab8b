"""Files of pictures: what each format keeps, and what the quality does."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ditrelay.runtime.pipelines_core.media import Media, encode_media
from ditrelay.runtime.pipelines_core.pipeline import Batch
from ditrelay.runtime.pipelines_core.stages.decode import DecodeStage
from ditrelay.runtime.request import PictureFormat, Request, SamplingParams

# Colour and light that change slowly, and every pixel another one: what a picture is like, and some noise.
_ROWS, _COLUMNS = np.mgrid[0:48, 0:64]
_NOISE = np.random.default_rng(0).integers(0, 8, (48, 64, 3))
PICTURE = (np.stack([_ROWS * 5, _COLUMNS * 3, _ROWS + _COLUMNS], axis=-1) + _NOISE).astype(np.uint8)[None]


def opened(media: Media, kind: str) -> np.ndarray:
    image = Image.open(io.BytesIO(media.data))
    assert (image.format, image.mode, image.size) == (kind.upper(), "RGB", (media.width, media.height))
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("kind", "distance"), [("png", 0), ("jpeg", 2), ("webp", 4)])
def test_a_picture_is_of_the_format_asked_for_and_looks_the_same(kind: PictureFormat, distance: int) -> None:
    media = encode_media(PICTURE, kind=kind)
    assert media.media_type == f"image/{kind}"
    assert (media.width, media.height, media.num_frames) == (64, 48, 1)
    assert np.abs(opened(media, kind) - PICTURE[0]).mean() <= distance


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_less_quality_makes_a_smaller_file_down_to_0(kind: PictureFormat) -> None:
    sizes = [len(encode_media(PICTURE, kind=kind, quality=quality).data) for quality in (100, 90, 89, 50, 0)]
    assert sizes == sorted(set(sizes), reverse=True)


def test_quality_is_nothing_to_a_png() -> None:
    assert encode_media(PICTURE, kind="png", quality=1) == encode_media(PICTURE)


def test_the_decoding_rank_makes_the_file_that_each_request_asks_for() -> None:
    wanted = [("png", None), ("jpeg", 30), ("webp", None), (None, None)]
    requests = tuple(
        Request(request_id=str(i), params=SamplingParams(prompt="x", output_format=kind, output_compression=quality))
        for i, (kind, quality) in enumerate(wanted)
    )
    batch = Batch(requests, frames=[PICTURE] * 4)
    DecodeStage(adapter=None).finish(batch)  # type: ignore[arg-type]
    assert [media.media_type for media in batch.media] == ["image/png", "image/jpeg", "image/webp", "image/png"]
    assert batch.media[1] == encode_media(PICTURE, kind="jpeg", quality=30)
    assert batch.media[2] == encode_media(PICTURE, kind="webp", quality=100)
