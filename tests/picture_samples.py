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
