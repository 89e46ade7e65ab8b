"""Pictures as clients send them, good and bad."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(width: int = 48, height: int = 32, kind: str = "PNG", **options: object) -> bytes:
    """A noisy picture's file; ``options`` are Pillow's."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def lying(kind: str) -> bytes:
    """48 x 32 pixels in the file, to be looked at as 32 x 48."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(kind=kind, exif=exif)


def animated(kind: str) -> bytes:
    """Two frames."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def huge(width: int = 20_000, height: int = 20_000) -> bytes:
    """A small PNG file that claims to be a huge picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(name: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, kind: int, depth: int, *, interlaced: bool = False, short: int = 0) -> bytes:
    """A PNG of a colour type and a depth, black or (6) transparent; the last ``short`` bytes of pixels are missing."""
    bits = depth * {0: 1, 2: 3, 3: 1, 6: 4}[kind]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    sizes = [(len(range(x, width, across)), len(range(y, height, down))) for x, y, across, down in passes]
    pixels = b"".join((b"\0" + bytes((across * bits + 7) // 8)) * down for across, down in sizes if across)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels[: len(pixels) - short])), (b"IEND", b"")]
    if kind == 3:
        parts.insert(1, (b"PLTE", bytes(48)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts)


def many_exif(segments: int) -> bytes:
    """A JPEG with as many Exif segments, each with 5,400 entries."""
    entries = b"".join(struct.pack("<HHIHH", 0x9000, 3, 1, 1, 0) for _ in range(5400))
    body = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5400) + entries
    whole = picture(kind="JPEG")
    return whole[:2] + (b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body) * segments + whole[2:]


def many_exif_chunks(count: int) -> bytes:
    """A WebP with as many Exif parts, the first of which says that it lies on its side."""
    whole = lying("WEBP")
    exif = whole[whole.index(b"EXIF") :]
    body = whole[8:] + exif * (count - 1)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def many_scans(scans: int, side: int = 10_000) -> bytes:
    """A progressive JPEG of one colour that says it is ``side`` large; each of its scans is a few bytes."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 120).save(file, "JPEG", progressive=True)
    whole = bytearray(file.getvalue())
    frame = whole.find(b"\xff\xc2")
    whole[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    last = bytes(whole[whole.rfind(b"\xff\xda") : -2])
    first = whole.find(b"\xff\xda")
    return bytes(whole[:first]) + last * scans + b"\xff\xd9"
