"""A picture's file becomes pixels: upright, in sRGB, what is transparent white. Neither torch nor NumPy is needed.

What runs here is other people's code (libjpeg, libpng, libwebp, dav1d, Little CMS) on bytes of strangers. A server
calls it in a process of its own only: see ``runtime/pictures``.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image, ImageCms, ImageOps

_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF")
_CHUNK = 1 << 20
_PROFILED = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # what a profile is for -> the mode that it is applied to
_GREYS = ("1", "L", "LA", "La")
_FACTORY_SRGB = ("srgb", "c2")  # a profile of that name changes nothing; "c2" is Facebook's short one

ERRORS = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,  # of AVIF's decoder
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises of damaged files."""


def decode(content: bytes, *, most: int) -> Image.Image:
    """The picture in ``content``, as RGB. Of an animation it is the first frame.

    Args:
        most: pixels that it may have.

    Raises:
        those in ``ERRORS``: it is none, it is damaged, or it is larger than ``most``.
        MemoryError: there is none for it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's, about sizes, which are limited here
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > most:
                raise ValueError(f"it has {image.width}x{image.height} pixels, and its header told less")
            image.load()
            if image.format == "PNG":
                _check_rows(image, content)
            ImageOps.exif_transpose(image, in_place=True)
            return _as_rgb(image)


def fitted(image: Image.Image, width: int, height: int, most: int) -> Image.Image:
    """The picture at a size, resized as diffusers' ``VaeImageProcessor`` would do; with 0x0 at its own, but made
    smaller in its proportions where it has more pixels than ``most``."""
    if not width:
        scale = min(1.0, (most / (image.width * image.height)) ** 0.5)
        width, height = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    size = (width, height)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _as_rgb(image: Image.Image) -> Image.Image:
    """What is transparent becomes white: what lies under it, black as a rule, nobody has seen."""
    profile = image.info.get("icc_profile")
    image = _of_eight_bits(image)
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    layer = image.convert("RGBA")
    if profile:
        alpha = layer.getchannel("A")
        layer = _in_srgb(image.convert("L") if image.mode in _GREYS else layer.convert("RGB"), profile)
        layer.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey, which Pillow would cut off at 255."""
    if image.mode == "I":
        image = image.convert("I;16")
    if not image.mode.startswith("I;16"):
        return image
    order = "L;16B" if image.mode.endswith("B") else "L;16"
    return Image.frombytes("L", image.size, image.tobytes(), "raw", order)


def _in_srgb(image: Image.Image, profile: object) -> Image.Image:
    """``image`` as RGB; one that cannot be understood or is not for such a picture is left aside, as browsers do."""
    if not isinstance(profile, bytes) or not profile:
        return image.convert("RGB")
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(found).strip().lower()
        mode = _PROFILED.get(found.profile.xcolor_space.strip())
        fits = {"L": image.mode in _GREYS, "CMYK": image.mode == "CMYK"}.get(mode or "", image.mode not in _GREYS)
        if name.startswith(_FACTORY_SRGB) or mode is None or not fits or (mode == "RGB" and image.mode == "CMYK"):
            return image.convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        changed = ImageCms.profileToProfile(image.convert(mode), found, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return image.convert("RGB")
    return image.convert("RGB") if changed is None else changed


def _check_rows(image: Image.Image, content: bytes) -> None:
    """Raises ``ValueError`` where the pixels end early: Pillow leaves what is missing black, and says nothing."""
    size, bits = image.size, _bits(content)
    interlaced = content[28] != 0
    if not interlaced and _has_colour(image.crop((0, image.height - 1, image.width, image.height))):
        return
    needed = sum(_pass_bytes(size, bits, *each) for each in (_PASSES if interlaced else ((0, 0, 1, 1),)))
    if _inflated(content, needed) < needed:
        raise ValueError("its last rows are missing")


def _has_colour(row: Image.Image) -> bool:
    return any(row.tobytes())


# Of an interlaced PNG: the first column and row of each pass, and the steps between two.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _pass_bytes(size: tuple[int, int], bits: int, column: int, row: int, across: int, down: int) -> int:
    width, height = -(-(size[0] - column) // across), -(-(size[1] - row) // down)
    return height * (1 + -(-width * bits // 8)) if width > 0 and height > 0 else 0


def _bits(content: bytes) -> int:
    """Bits of a pixel, by a PNG's first chunk."""
    depth, kind = content[24], content[25]
    return depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(kind, 1)


def _inflated(content: bytes, needed: int) -> int:
    """Bytes that a PNG's pixels unpack to, counted up to ``needed``."""
    unpacking, total = zlib.decompressobj(), 0
    for part in _pixel_parts(content):
        while part and total < needed and not unpacking.eof:
            total += len(unpacking.decompress(part, _CHUNK))
            part = unpacking.unconsumed_tail
    return total


def _pixel_parts(content: bytes) -> Iterator[bytes]:
    place = 8
    while place + 12 <= len(content):
        size, name = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        if name == b"IDAT":
            yield content[place + 8 : place + 8 + size]
        place += size + 12
