"""Pixels become files: PNG, JPEG or WebP for a picture, MP4 (H.264) for a clip."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from PIL import Image

from ditrelay.runtime.request import PictureFormat

if TYPE_CHECKING:
    from ditrelay.models.adapter import Frames

PNG_LEVEL = 3  # a 1024x1024 picture in a third of level 6's time, 5% larger
FULL_COLOUR = 90  # from this JPEG quality on every pixel keeps its own colour; below, four share one

# x264's macroblock tree reads memory that nobody wrote (seen with PyAV 18.1): with it, one clip has many files.
# Without it 21 is as near to the frames as 18 is with it, at 1.5 times the bytes.
H264 = {"crf": "21", "preset": "veryfast", "mbtree": "0"}


@dataclass(frozen=True)
class Media:
    """One finished file. ``media_type`` is ``image/png`` (``jpeg``, ``webp``) or ``video/mp4``; sizes in pixels."""

    data: bytes
    media_type: str
    width: int
    height: int
    num_frames: int


def encode_media(frames: Frames, *, fps: int = 0, kind: PictureFormat = "png", quality: int = 100) -> Media:
    """The file of ``frames``, uint8 [frames, height, width, 3]: a clip of ``fps`` frames a second, or with 0 a picture.

    A clip whose height or width is odd is refused by H.264's 4:2:0 layout; ditrelay's size rules exclude it.

    Args:
        kind: format of a picture's file.
        quality: of a JPEG or WebP file, 0 to 100; a PNG file loses nothing.
    """
    if fps:
        return encode_clip([frames], fps)
    num_frames, height, width, _ = frames.shape
    return Media(encode_picture(Image.fromarray(frames[0]), kind, quality), f"image/{kind}", width, height, num_frames)


def encode_clip(parts: Iterable[Frames], fps: int) -> Media:
    """The MP4 file of frames that come in parts, each uint8 [frames, height, width, 3]; however they are cut, the same.

    Raises:
        ValueError: there is no frame.
    """
    import av

    buffer, height, width, num_frames = io.BytesIO(), 0, 0, 0
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.pix_fmt = "yuv420p"
        stream.options = H264
        for frames in parts:
            if not num_frames:
                stream.height, stream.width = height, width = frames.shape[1:3]
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            num_frames += len(frames)
        if not num_frames:
            raise ValueError("a clip needs a frame")
        container.mux(stream.encode())
    return Media(buffer.getvalue(), "video/mp4", width, height, num_frames)


def encode_picture(image: Image.Image, kind: PictureFormat, quality: int = 100) -> bytes:
    """The file of an RGB picture, in the format and quality that ``encode_media`` describes."""
    buffer = io.BytesIO()
    match kind:
        case "png":
            image.save(buffer, "PNG", compress_level=PNG_LEVEL)
        case "jpeg":
            image.save(buffer, "JPEG", quality=quality, subsampling="4:4:4" if quality >= FULL_COLOUR else "4:2:0")
        case "webp":
            image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()
