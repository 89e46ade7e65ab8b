"""Files become pixels: of each format, upright, in sRGB, whole, and else as Pillow has them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_samples import animated, lying, picture, png_of
from PIL import Image, ImageCms, ImageOps

from ditrelay.models.picture_decoding import ERRORS, decode, fitted
from ditrelay.models.picture_files import read_picture

MOST = 10_000


def pixels(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(decode(content, most=MOST))


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "AVIF"])
def test_an_ordinary_picture_has_the_pixels_that_pillow_gives_it(kind: str) -> None:
    for content in (picture(kind=kind), lying(kind) if kind != "GIF" else picture(kind=kind)):
        with Image.open(io.BytesIO(content)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(pixels(content), expected)
        found = read_picture(content)
        assert (found.kind, found.height, found.width) == (kind.lower(), *expected.shape[:2])


def test_of_a_gif_the_first_frame_is_the_picture() -> None:
    found = pixels(animated("GIF"))
    assert (found == (255, 0, 0)).all()


def test_greys_of_any_depth_and_order_keep_their_shade() -> None:
    shades = np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 42
    assert np.array_equal(pixels(file_of(Image.fromarray(shades)))[..., 0], shades >> 8)
    dark = Image.new("1", (8, 8), 1)
    assert (pixels(file_of(dark)) == 255).all()


def test_a_size_is_resized_as_diffusers_does_and_a_larger_one_than_allowed_keeps_its_proportions() -> None:
    image = decode(picture(100, 50), most=MOST)
    assert fitted(image, 100, 50, MOST) is image and fitted(image, 0, 0, MOST) is image
    assert np.array_equal(fitted(image, 32, 24, MOST), image.resize((32, 24), Image.Resampling.LANCZOS))
    assert fitted(image, 0, 0, 1250).size == (50, 25)


# ---------------------------------------------------------------- colours


def profile_of(space: str = "RGB", gamma: float = 1.0) -> bytes:
    """A profile of a linear RGB space with sRGB's primaries (or of linear grey), under a name that says nothing."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, int(gamma * 256), 0)
    tags = {srgb[at : at + 4]: struct.unpack_from(">II", srgb, at + 4) for at in range(132, 132 + 12 * srgb[131], 12)}
    kept = {name: srgb[place : place + size] for name, (place, size) in tags.items() if name not in (b"chrm", b"cprt")}
    kept |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    kept[b"desc"] = srgb[tags[b"desc"][0] :][: tags[b"desc"][1]].replace(b"\0s\0R\0G\0B", b"\0w\0i\0d\0e")
    if space == "GRAY":
        kept = {name: kept[name] for name in (b"desc", b"wtpt")} | {b"kTRC": curve}
    table, data = b"", b""
    for name, content in kept.items():
        table += name + struct.pack(">II", 132 + 12 * len(kept) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    body = srgb[4:16] + space.encode().ljust(4) + srgb[20:128] + struct.pack(">I", len(kept)) + table + data
    return struct.pack(">I", len(body) + 4) + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_a_picture_in_another_colour_space_is_converted_to_srgb(kind: str) -> None:
    content = file_of(Image.new("RGB", (16, 16), (55, 55, 55)), kind, icc_profile=profile_of(), quality=100)
    assert np.abs(pixels(content).astype(int) - 128).max() <= 3  # linear light of 0.216 is 0.5 in sRGB


def test_transparency_and_greys_are_converted_too() -> None:
    layer = Image.new("RGBA", (8, 8), (55, 55, 55, 255))
    layer.paste((55, 55, 55, 0), (0, 4, 8, 8))
    found = pixels(file_of(layer, icc_profile=profile_of())).astype(int)
    assert np.abs(found[:4] - 128).max() <= 2 and (found[4:] == 255).all()
    for mode in ("L", "LA"):
        grey = file_of(Image.new("L", (8, 8), 55).convert(mode), icc_profile=profile_of("GRAY"))
        assert np.abs(pixels(grey).astype(int) - 128).max() <= 2


def test_a_picture_in_srgb_keeps_every_value() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(picture(icc_profile=srgb)), pixels(picture()))


@pytest.mark.parametrize("profile", [b"no profile", profile_of()[:150], profile_of("GRAY"), b"\0" * 4000])
def test_a_profile_that_is_damaged_or_for_another_kind_of_picture_is_left_aside(profile: bytes) -> None:
    assert np.array_equal(pixels(picture(icc_profile=profile)), pixels(picture()))


# ---------------------------------------------------------------- what is not whole


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("kind", "depth"), [(2, 8), (6, 8), (0, 16), (0, 1), (3, 4)])
def test_a_png_with_rows_missing_is_damaged_and_a_black_one_is_not(kind: int, depth: int, interlaced: bool) -> None:
    for width, height in ((9, 7), (1, 1), (3, 30)):
        found = pixels(png_of(width, height, kind, depth, interlaced=interlaced))
        assert (found == (255 if kind == 6 else 0)).all()
        with pytest.raises(ERRORS, match="rows are missing|truncated"):
            decode(png_of(width, height, kind, depth, interlaced=interlaced, short=1), most=MOST)


def test_a_picture_larger_than_its_header_was_read_to_be_is_refused() -> None:
    with pytest.raises(ValueError, match="48x32"):
        decode(picture(), most=48 * 32 - 1)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "AVIF"]), st.integers(0, 10_000), st.binary(min_size=1, max_size=8)
)
def test_damage_ends_in_a_picture_or_in_a_known_error(kind: str, place: int, damage: bytes) -> None:
    whole = picture(16, 16, kind)
    place %= len(whole)
    try:
        decode(whole[:place] + damage + whole[place + len(damage) :], most=MOST)
    except (*ERRORS, MemoryError):
        pass


def test_a_png_is_unpacked_no_further_than_its_pixels_go() -> None:
    """A part of a gigabyte behind them costs nothing."""
    content = png_of(8, 8, 2, 8)
    bomb = zlib.compress(bytes(1 << 24), 9)
    part = struct.pack(">I4s", len(bomb), b"IDAT") + bomb + struct.pack(">I", zlib.crc32(b"IDAT" + bomb))
    assert not pixels(content[:-12] + part + content[-12:]).any()
