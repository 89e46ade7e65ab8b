"""How a picture comes to a rank: its pixels alone, with their size before them. Clients send files, never this."""

from __future__ import annotations

import struct

_MARK = b"\0ditrelay-rgb8\n\0"
_SIZE = struct.Struct("<II")
_BEGIN = len(_MARK) + _SIZE.size


def pack(width: int, height: int, *parts: bytes) -> bytes:
    """``parts`` are the pixels together, RGB, row by row."""
    return b"".join((_MARK, _SIZE.pack(width, height), *parts))


def unpack(content: bytes) -> tuple[tuple[int, int], memoryview] | None:
    """The size and the pixels; ``None``: it is something else."""
    if not content.startswith(_MARK):
        return None
    width, height = _SIZE.unpack_from(content, len(_MARK))
    pixels = memoryview(content)[_BEGIN:]
    if len(pixels) != width * height * 3:
        raise ValueError(f"{width}x{height} pixels need {width * height * 3} bytes, and there are {len(pixels)}")
    return (width, height), pixels
