"""What a picture's file is, how large it is to be looked at, and whether it is taken. Nothing is decoded; no torch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ditrelay.errors import InvalidRequest
from ditrelay.models.picture_formats import Header, Unreadable, read_avif, read_gif, read_jpeg, read_png, read_webp

PictureKind = Literal["png", "jpeg", "webp", "avif", "gif"]

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535  # of a JPEG file; a line of more would have a million times its pixels where it is made square
ALLOWED = "allowed: a PNG, JPEG, WebP, AVIF or GIF picture"

_READERS: Mapping[PictureKind, Callable[[bytes], Header]] = {
    "png": read_png,
    "jpeg": read_jpeg,
    "webp": read_webp,
    "avif": read_avif,
    "gif": read_gif,
}
_BEGINNINGS: tuple[tuple[bytes, PictureKind], ...] = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
)
# What else is sent for a picture, by how it begins: a message that names it helps.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"BM", "a BMP picture"),
    (b"II*\0", "a TIFF picture, or a camera's raw one"),
    (b"MM\0*", "a TIFF picture, or a camera's raw one"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (b"\0\0\x01\0", "an icon"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF document"),
    (b"\x1a\x45\xdf\xa3", "a WebM or Matroska clip"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an SVG drawing, or other XML"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
)
_HEIC = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"})
_AVIF = frozenset({b"avif", b"avis"})


@dataclass(frozen=True)
class PictureFile:
    """A picture as it is to be looked at: its ``width`` and ``height`` in pixels are those of the upright picture."""

    kind: PictureKind
    width: int
    height: int


def read_picture(content: bytes) -> PictureFile:
    """The file's kind and size, by its content alone.

    Raises:
        InvalidRequest: naming ``image``: it is no picture of a kind that is read, it is cut off, animated (a GIF's
            first frame is taken), too large, or so built that it would take long to decode.
    """
    if not content:
        raise InvalidRequest("image", f"it is empty; {ALLOWED}")
    kind = _kind(content)
    try:
        header = _READERS[kind](content)
    except (struct.error, IndexError):
        header = Header()
    except Unreadable as error:
        raise InvalidRequest("image", str(error)) from error
    if header.animated:
        raise InvalidRequest("image", "it is animated; allowed: one picture")
    if not header.complete:
        raise InvalidRequest("image", f"it is cut off or damaged: {len(content)} bytes; {ALLOWED}")
    _check_size(header.width, header.height)
    return PictureFile(kind, *((header.height, header.width) if header.turned else (header.width, header.height)))


def _check_size(width: int, height: int) -> None:
    if not width or not height:
        raise InvalidRequest("image", f"its size cannot be read; {ALLOWED}")
    if width * height > MAX_PIXELS:
        reason = f"{width}x{height} are {width * height} pixels; allowed: at most {MAX_PIXELS}"
        raise InvalidRequest("image", reason)
    if max(width, height) > MAX_SIDE:
        raise InvalidRequest("image", f"{width}x{height} pixels; allowed: at most {MAX_SIDE} a side")


def _kind(content: bytes) -> PictureKind:
    for begin, kind in _BEGINNINGS:
        if content.startswith(begin):
            return kind
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "webp"
    brands = _brands(content)
    if brands[:1] and brands[0] in _AVIF or b"avif" in brands and not _HEIC.intersection(brands):
        return "avif"
    raise InvalidRequest("image", f"it is {_named(content, brands)}; {ALLOWED}")


def _brands(content: bytes) -> list[bytes]:
    """What the first box of an ISO media file says that it can be read as, the chief one first."""
    if content[4:8] != b"ftyp":
        return []
    size = min(len(content), int.from_bytes(content[:4], "big"), 256)
    return [content[8:12], *(content[at : at + 4] for at in range(16, size - 3, 4))]


def _named(content: bytes, brands: list[bytes]) -> str:
    if brands:
        is_picture = _HEIC.intersection(brands) or brands[0] in (b"mif1", b"msf1")
        return "a HEIC (HEIF) picture, which is not read here" if is_picture else "a clip (MP4, MOV), or no picture"
    begin = content[:64].lstrip().lower()
    for mark, name in _OTHERS:
        if content.startswith(mark) or begin.startswith(mark.lower()):
            return f"{name}, which is not read here"
    return "no picture that can be read"
