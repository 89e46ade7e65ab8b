"""Pictures that clients send: what is one, what is refused, and that the refusal decodes nothing and is quick."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture_samples import (
    animated,
    chunk,
    huge,
    lying,
    many_exif,
    many_exif_chunks,
    many_scans,
    picture,
    png_of,
)
from PIL import Image

from ditrelay.errors import InvalidRequest
from ditrelay.models import picture_formats
from ditrelay.models.picture_files import MAX_PIXELS, read_picture

KINDS = ("PNG", "JPEG", "WEBP")


def refusal(content: bytes) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read_picture(content)
    assert caught.value.param == "image"
    assert "allowed" in caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}),
        ("GIF", {}),
        ("AVIF", {}),
    ],
)
def test_kind_and_size_are_read(kind: str, options: dict[str, object]) -> None:
    found = read_picture(picture(50, 31, kind, **options))
    assert (found.kind, found.width, found.height) == (kind.lower(), 50, 31)


@pytest.mark.parametrize("kind", [*KINDS, "AVIF"])
def test_a_picture_that_lies_on_its_side_has_the_size_of_the_upright_one(kind: str) -> None:
    found = read_picture(lying(kind))
    assert (found.width, found.height) == (32, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_anywhere_is_refused(kind: str) -> None:
    whole = picture(16, 16, kind)
    for length in range(len(whole)):
        refusal(whole[:length])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF"])
def test_an_animated_picture_is_refused(kind: str) -> None:
    assert "animated" in refusal(animated(kind))


@pytest.mark.parametrize("content", [b"", b"no picture", b"/etc/passwd", b"%PDF-1.7", b"<svg/>"])
def test_what_is_no_picture_is_refused(content: bytes) -> None:
    refusal(content)


def test_a_picture_of_more_than_100_megapixels_is_refused_by_its_header_alone() -> None:
    assert str(MAX_PIXELS) in refusal(huge())
    assert read_picture(huge(10_000, 10_000)).width == 10_000
    assert "65535 a side" in refusal(huge(1, 99_999_999))


def test_a_file_of_a_million_parts_is_not_read_to_its_end() -> None:
    whole = huge(16, 16)
    refusal(whole[:33] + b"\0\0\0\0tEXt\0\0\0\0" * 1_000_000 + whole[33:])


@given(st.sampled_from(KINDS), st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
def test_damage_ends_in_a_refusal_or_in_a_size_and_never_otherwise(kind: str, place: int, damage: bytes) -> None:
    whole = picture(16, 16, kind)
    place %= len(whole)
    try:
        found = read_picture(whole[:place] + damage + whole[place + len(damage) :])
    except InvalidRequest as error:
        assert error.param == "image"
    else:
        assert 0 < found.width * found.height <= MAX_PIXELS


def test_a_phones_picture_of_several_parts_is_one_picture() -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 16)).save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert read_picture(file.getvalue()).width == 32


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heix", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "MP4"),
        (b"BM\x36\0", "BMP"),
        (b"II*\0\x08", "TIFF"),
        (b"\xff\x0a\0", "JPEG XL"),
        (b"%PDF-1.7", "PDF"),
        (b"  <SVG xmlns", "SVG"),
        (b"<!DOCTYPE html>", "web page"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_name(content: bytes, name: str) -> None:
    assert name in refusal(content)


def test_a_file_that_would_take_long_to_decode_is_refused_before_it_is() -> None:
    packed = b"x\0\0" + bytes(20)
    whole = png_of(8, 8, 2, 8)
    assert "Exif segments; allowed: 64" in refusal(many_exif(65))
    assert "scans of 10000x10000 pixels; allowed: 15" in refusal(many_scans(2500))
    assert "scans of 64x64 pixels; allowed: 100" in refusal(many_scans(101, 64))
    assert "parts iCCP; allowed: 1" in refusal(whole[:33] + chunk(b"iCCP", packed) * 2 + whole[33:])
    assert "packed texts; allowed: 64" in refusal(whole[:33] + chunk(b"zTXt", packed) * 65 + whole[33:])
    assert read_picture(many_exif(64)).width == 48
    assert read_picture(many_scans(15)).width == 10_000
    assert read_picture(picture(64, 64, "JPEG", progressive=True)).width == 64


@pytest.mark.parametrize("content", [many_exif(60), many_exif_chunks(3000)], ids=["JPEG", "WebP"])
def test_of_many_exif_parts_only_the_first_is_looked_into(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr(picture_formats, "_is_turned", lambda exif: bool(looked.append(len(exif))))
    read_picture(content)
    assert len(looked) == 1


def test_an_exif_directory_without_end_is_left_after_some_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_formats, "_MAX_ENTRIES", 0)
    assert read_picture(lying("JPEG")).width == 48  # not turned: the entry was not reached
