"""Multipart forms as they come over the wire: charsets, parts without a file, ends that are missing."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from picture_samples import picture
from server_fakes import CardEngine, running

ADDRESS = "/v1/images/edits"
PNG = picture()
Part = tuple[str, bytes]


def part(name: str, content: bytes, kind: str = "", filename: str | None = None) -> Part:
    headers = f'Content-Disposition: form-data; name="{name}"'
    headers += "" if filename is None else f'; filename="{filename}"'
    return headers + (f"\r\nContent-Type: {kind}" if kind else ""), content


IMAGE = part("image", PNG, "image/png", "x.png")


def post(*parts: Part, end: bytes = b"--x--\r\n", address: str = ADDRESS) -> tuple[httpx.Response, CardEngine]:
    """The answer to a form of these parts, as they are written here; and the engine that may have drawn for it."""
    body = b"".join(b"--x\r\n%s\r\n\r\n%s\r\n" % (headers.encode(), content) for headers, content in parts) + end
    engine = CardEngine()

    async def main() -> httpx.Response:
        async with running(engine) as client, asyncio.timeout(10):
            return await client.post(
                address, content=body, headers={"content-type": "multipart/form-data; boundary=x"}
            )

    return asyncio.run(main()), engine


def error(response: httpx.Response, code: str = "invalid_value") -> dict[str, Any]:
    assert response.status_code == 400, response.text
    found = response.json()["error"]
    assert found["code"] == code
    return found


@pytest.mark.parametrize(
    ("text", "charset"),
    [
        ("a café", "utf-8"),
        ("a café", "ISO-8859-1"),
        ("a “café”", "windows-1252"),
        ("猫", "shift_jis"),
        ("猫", "gb18030"),
        ("кот", '"koi8-r"'),
    ],
)
@pytest.mark.parametrize("by", ["part", "field", "field, last"])
def test_a_field_is_read_in_the_charset_that_its_part_or_the_form_names(text: str, charset: str, by: str) -> None:
    content = text.encode(charset.strip('"'))
    if by == "part":
        parts = [part("prompt", content, f"text/plain; charset={charset}"), IMAGE]
    else:
        parts = [part("_charset_", charset.strip('"').encode()), part("prompt", content), IMAGE]
    response, engine = post(*(reversed(parts) if by == "field, last" else parts))
    assert response.status_code == 200, response.text
    assert engine.tickets[0].params.prompt == text


@pytest.mark.parametrize("kind", ["", "text/plain", "text/plain; charset=utf-8", "text/plain; charset=us-ascii"])
def test_text_that_is_not_in_its_charset_is_refused_by_its_name_and_never_guessed(kind: str) -> None:
    response, engine = post(part("negative_prompt", "a café".encode("latin-1"), kind), part("prompt", b"a cat"), IMAGE)
    found = error(response)
    assert found["param"] == "negative_prompt" and "byte 5 is not" in found["message"]
    assert not engine.tickets


@pytest.mark.parametrize("charset", ["punycode", "idna", "undefined", "unicode_escape", "no-such", "rot13", "utf-7"])
@pytest.mark.parametrize("field", ["prompt", "_charset_"])
def test_a_charset_that_is_not_read_is_refused_with_those_that_are(charset: str, field: str) -> None:
    prompt = part("prompt", b"a" * 100_000, f"text/plain; charset={charset}" if field == "prompt" else "")
    charsets = [part("_charset_", charset.encode())] if field == "_charset_" else []
    found = error(post(*charsets, prompt, IMAGE)[0])
    assert found["param"] == "prompt" and charset in found["message"] and "utf-8" in found["message"]


@pytest.mark.parametrize("filename", ["", "blob"])
@pytest.mark.parametrize("name", ["mask", "image[]", "markup"])
def test_a_file_part_without_a_byte_counts_as_none(name: str, filename: str) -> None:
    empty = part(name, b"", "application/octet-stream", filename)
    response, engine = post(part("prompt", b"a cat"), IMAGE, empty)
    assert response.status_code == 200, response.text
    assert engine.tickets[0].params.image == PNG


def test_where_the_only_picture_is_empty_it_is_missing_and_the_message_says_why() -> None:
    found = error(post(part("prompt", b"a cat"), part("image", b"", "image/png", ""))[0], "missing_required_parameter")
    assert found["param"] == "image" and "an empty one counts as none" in found["message"]


@pytest.mark.parametrize("end", [b"", b"--x", b"--x\r\n", b"--y--\r\n"])
def test_a_form_without_its_end_says_so_instead_of_missing_a_field(end: bytes) -> None:
    found = error(post(IMAGE, part("prompt", b"a cat"), end=end)[0], "invalid_form")
    assert "ends before its last boundary, --x--" in found["message"]


def test_what_follows_the_end_of_a_form_is_nothing() -> None:
    assert post(part("prompt", b"a cat"), IMAGE, end=b"--x--\r\nepilogue")[0].status_code == 200


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([("Content-Disposition: form-data", b"")], "has no name"),
        ([("X: y", b"")], "has no name"),
        ([part(f"f{i}", b"") for i in range(51)], "too many fields; allowed: 50"),
        ([part("image", PNG, "image/png", "x") for i in range(21)], "too many files; allowed: 20"),
        ([part(f"f{i}", b"") for i in range(100)], "too many parts"),
    ],
)
def test_a_form_that_is_none_is_refused_with_the_reason(parts: list[Part], reason: str) -> None:
    assert reason in error(post(*parts)[0], "invalid_form")["message"]
