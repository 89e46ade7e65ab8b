"""What a picture's file says of itself, read without decoding it. No torch import, and no code that decodes.

Sources: PNG, W3C Recommendation (chunks, ``acTL``); ITU-T T.81 annex B (JPEG's markers); RFC 9649 (WebP's chunks);
Exif 2.3, 4.6.4 (the orientation).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ditrelay.errors import InvalidRequest
from ditrelay.runtime.request import PictureFormat

MAX_PIXELS = 100_000_000
ALLOWED = "allowed: a PNG, JPEG or WebP picture"

_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_PARTS = 100_000  # a picture of 100 megapixels has some ten thousand
_ORIENTATION = 0x0112
_LYING = range(5, 9)  # orientations that swap height and width


@dataclass(frozen=True)
class PictureFile:
    """A picture as it is to be looked at: its ``width`` and ``height`` in pixels are those of the upright picture."""

    kind: PictureFormat
    width: int
    height: int


@dataclass
class _Header:
    width: int = 0
    height: int = 0
    orientation: int = 1
    animated: bool = False
    complete: bool = False


def read_picture(content: bytes) -> PictureFile:
    """The file's kind and size.

    Raises:
        InvalidRequest: naming ``image``: it is no PNG, JPEG or WebP, it is cut off, animated, or too large.
    """
    if not content:
        raise InvalidRequest("image", f"it is empty; {ALLOWED}")
    kind = _kind(content)
    try:
        header = {"png": _read_png, "jpeg": _read_jpeg, "webp": _read_webp}[kind](content)
    except (struct.error, IndexError):
        header = _Header()
    if header.animated:
        raise InvalidRequest("image", "it is animated; allowed: one picture")
    if not header.complete:
        raise InvalidRequest("image", f"it is cut off or damaged: {len(content)} bytes; {ALLOWED}")
    width, height = header.width, header.height
    if not width or not height:
        raise InvalidRequest("image", f"its size cannot be read; {ALLOWED}")
    if width * height > MAX_PIXELS:
        reason = f"{width}x{height} are {width * height} pixels; allowed: at most {MAX_PIXELS}"
        raise InvalidRequest("image", reason)
    return PictureFile(kind, *((height, width) if header.orientation in _LYING else (width, height)))


def _kind(content: bytes) -> PictureFormat:
    if content.startswith(_PNG):
        return "png"
    if content.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "webp"
    raise InvalidRequest("image", f"it is no picture that can be read; {ALLOWED}")


def _read_png(content: bytes) -> _Header:
    header = _Header()
    for name, start, size in _png_chunks(content):
        if name == b"IHDR":
            header.width, header.height = struct.unpack_from(">II", content, start)
        elif name == b"acTL":
            header.animated = struct.unpack_from(">I", content, start)[0] > 1
        elif name == b"eXIf":
            header.orientation = _orientation(content[start : start + size])
        elif name == b"IEND":
            header.complete = True
    return header


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and size of each chunk that is there as a whole, up to the last, ``IEND``."""
    place = len(_PNG)
    for _ in range(_MAX_PARTS):
        size, name = struct.unpack_from(">I4s", content, place)
        if place + size + 12 > len(content):
            return
        yield name, place + 8, size
        if name == b"IEND":
            return
        place += size + 12


def _read_jpeg(content: bytes) -> _Header:
    header, place = _Header(), 2
    for _ in range(_MAX_PARTS):
        marker = content[place + 1]
        if content[place] != 0xFF:
            break
        if marker == 0xFF:  # a byte to fill
            place += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # without a content
            place += 2
            continue
        size = struct.unpack_from(">H", content, place + 2)[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            header.height, header.width = struct.unpack_from(">HH", content, place + 5)
        elif marker == 0xE1 and content[place + 4 : place + 10] == b"Exif\0\0":
            header.orientation = _orientation(content[place + 10 : place + 2 + size])
        elif marker == 0xDA:
            # From here on the pixels, in which no end of image can be but the end. What follows that is nobody's.
            header.complete = content.find(b"\xff\xd9", place + 2 + size) >= 0
            break
        place += 2 + size
    return header


def _read_webp(content: bytes) -> _Header:
    header = _Header(complete=len(content) >= 8 + struct.unpack_from("<I", content, 4)[0])
    place = 12
    for _ in range(_MAX_PARTS):
        if place + 8 > len(content):
            break
        name, size = struct.unpack_from("<4sI", content, place)
        _read_webp_chunk(header, name, content, place + 8, size)
        place += 8 + size + size % 2
    return header


def _read_webp_chunk(header: _Header, name: bytes, content: bytes, start: int, size: int) -> None:
    if name == b"VP8X":
        flags, width, height = content[start], content[start + 4 : start + 7], content[start + 7 : start + 10]
        header.animated = bool(flags & 0x02)
        header.width, header.height = (int.from_bytes(side, "little") + 1 for side in (width, height))
    elif name == b"EXIF":
        header.orientation = _orientation(content[start : start + size].removeprefix(b"Exif\0\0"))
    elif name == b"VP8L" and not header.width and content[start] == 0x2F:
        bits = struct.unpack_from("<I", content, start + 1)[0]
        header.width, header.height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif name == b"VP8 " and not header.width and content[start + 3 : start + 6] == b"\x9d\x01\x2a":
        sides = struct.unpack_from("<HH", content, start + 6)
        header.width, header.height = (side & 0x3FFF for side in sides)


def _orientation(exif: bytes) -> int:
    """1 (upright) where it is not told. What it is said to be is for the size alone: nothing depends on it."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        place = struct.unpack_from(f"{order}I", exif, 4)[0]
        for number in range(struct.unpack_from(f"{order}H", exif, place)[0]):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, place + 2 + 12 * number)
            if tag == _ORIENTATION:
                return int(value)
    except struct.error:
        pass
    return 1
