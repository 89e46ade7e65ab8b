"""Data URLs: as clients write them, and nothing that is none."""

from __future__ import annotations

import base64
import textwrap
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditrelay.server import data_urls
from ditrelay.server.data_urls import payload_of, unpack

CONTENT = bytes(range(256)) * 3
PLAIN = base64.b64encode(CONTENT).decode()


def read(address: str) -> bytes | None:
    found = payload_of(address)
    return found and unpack(found[0], is_base64=found[1])


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "data:;base64,",
        "DATA:IMAGE/PNG;BASE64,",
        "data:image/png;charset=utf-8;base64,",
        "data:image/png;name=a%20cat.png;base64,",
        'data:image/png;name="a, b.png";base64,',
        "data:image/png; charset=binary ; base64,",
        "data:application/octet-stream;base64,",
        "\n data:image/svg+xml;base64,",
    ],
)
def test_a_head_may_have_parameters_and_may_name_any_type_or_none(head: str) -> None:
    assert read(head + PLAIN) == CONTENT


@pytest.mark.parametrize(
    "body",
    [
        "\r\n".join(textwrap.wrap(PLAIN, 76)),
        "\n" + PLAIN + "\n",
        " ".join(PLAIN),
        base64.urlsafe_b64encode(CONTENT).decode(),
        quote(PLAIN, safe=""),
        "%0A".join(textwrap.wrap(PLAIN, 64)),
        PLAIN.rstrip("="),
    ],
)
def test_base64_may_have_line_breaks_escapes_either_alphabet_and_no_padding(body: str) -> None:
    assert read("data:image/png;base64," + body) == CONTENT


def test_data_that_is_not_base64_is_what_its_escapes_say() -> None:
    assert read("data:image/png,%89PNG%0d%0a") == b"\x89PNG\r\n"
    assert read("data:,100%") == b"100%"


@pytest.mark.parametrize("body", ["a", "abcde", "ab==cdef", "ab=c", "ü", "ab!d", "%", "a%4"])
def test_what_is_no_base64_is_refused(body: str) -> None:
    with pytest.raises(ValueError):
        read("data:image/png;base64," + body)


@pytest.mark.parametrize(
    "address", ["", "data", "data:image/png;base64", "http://a.test/x.png", 'data:a/b;name=",' + PLAIN, "adata:,x"]
)
def test_other_addresses_are_none(address: str) -> None:
    assert payload_of(address) is None


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200), piece=st.integers(1, 40), width=st.integers(1, 30), escaped=st.booleans())
def test_wherever_a_large_one_is_cut_into_pieces_its_bytes_are_the_same(
    content: bytes, piece: int, width: int, escaped: bool
) -> None:
    text = "\n".join(textwrap.wrap(base64.b64encode(content).decode(), width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_urls, "_PIECE", piece)
        assert unpack(quote(text, safe="") if escaped else text, is_base64=True) == content
        assert unpack(quote(content, safe=""), is_base64=False) == content
