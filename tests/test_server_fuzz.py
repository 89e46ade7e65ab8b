"""Requests that no schema describes (test_server_schemathesis.py has the others): an error of the page, never a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picture_samples import picture
from server_fakes import CardEngine, Server

from ditrelay.server.image_schemas import ImageGenerationRequest

Schema = dict[str, Any]

PNG = picture()
ENDLESS = "/v1/activity"  # its answer has no end

# Everything JSON can say, with what is awkward about it first.
ANY_TEXT = st.one_of(
    st.text(max_size=20), st.sampled_from(["", " ", "\x00", "\ud800", "a" * 5000, "../..", "{}", "null"])
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)
NUMBERS = st.sampled_from([0, -1, 1, 7, 8, 13, 64, 128, 2**31, 2**63, 2**64, -(2**63), 10**30])
SIZES = st.tuples(NUMBERS, NUMBERS).map(lambda size: f"{size[0]}x{size[1]}")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server(CardEngine())
    yield made
    made.close()


# ---------------------------------------------------------------- bodies


@st.composite
def bodies(draw: st.DrawFn, fields: list[str]) -> Any:
    """A good body with up to three fields, known or unknown, replaced, dropped or added."""
    body = {"prompt": "a cat"}
    for name in draw(st.lists(st.sampled_from(fields) | ANY_TEXT, min_size=1, max_size=3)):
        if draw(st.booleans()):
            body[name] = draw(ANY_JSON | NUMBERS | SIZES)
        else:
            body.pop(name, None)
    return body


def as_bytes(body: Any) -> bytes:
    """JSON, with NaN and half surrogates written as Python writes them: a client may do so too."""
    return json.dumps(body).encode()


# ---------------------------------------------------------------- what every answer must be


def check(response: httpx.Response, page: Schema, path: str, method: str) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(response.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
        assert error["message"] and "Traceback" not in error["message"]
        assert len(response.content) < 3000
    operation = page["paths"].get(path, {}).get(method)
    if operation is not None and response.status_code != 404:
        told = operation["responses"]
        assert {str(response.status_code), f"{response.status_code // 100}XX"} & told.keys(), response.status_code


FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(st.data())
def test_bodies_with_damaged_fields(server: Server, data: st.DataObject) -> None:
    path = "/v1/images/generations"
    body = as_bytes(data.draw(bodies(sorted(ImageGenerationRequest.model_fields))))
    headers = {"content-type": data.draw(st.sampled_from(["application/json"] * 8 + ["text/plain", "", "x/y; q"]))}
    check(server.ask("POST", path, content=body, headers=headers), server.page, path, "post")


@FUZZ
@given(st.one_of(st.binary(max_size=300), ANY_JSON.map(as_bytes)))
def test_bodies_of_anything(server: Server, body: bytes) -> None:
    path = "/v1/images/generations"
    response = server.ask("POST", path, content=body, headers={"content-type": "application/json"})
    check(response, server.page, path, "post")


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    """Parts of a form, most of them well made, whose names, headers and contents are anything."""
    part = b""
    for name in draw(st.lists(st.sampled_from(["prompt", "image", "image[]", "mask", "n", "seed", "x"]), max_size=4)):
        file = draw(st.sampled_from([b"", b'; filename="x.png"', b'; filename=""', b"; filename*=utf-8''%ff"]))
        kind = draw(st.sampled_from([b"", b"\r\nContent-Type: image/png", b"\r\nContent-Type: \xff"]))
        content = draw(st.sampled_from([PNG, b"a cat", b"1"]) | st.binary(max_size=40))
        part += b'--x\r\nContent-Disposition: form-data; name="' + name.encode() + b'"' + file + kind
        part += b"\r\n\r\n" + content + b"\r\n"
    return part + draw(st.sampled_from([b"--x--\r\n", b"", b"--x"]))


@FUZZ
@given(st.one_of(forms(), st.binary(max_size=300)))
def test_forms_of_anything(server: Server, body: bytes) -> None:
    path = "/v1/images/edits"
    response = server.ask("POST", path, content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    check(response, server.page, path, "post")


@FUZZ
@given(st.data())
def test_addresses_with_anything_in_their_place(server: Server, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(set(server.page["paths"]) - {ENDLESS})))
    address = path
    for part in ("{file_id}", "{model_id}", "{video_id}", "{job_id}"):
        text = data.draw(ANY_TEXT.filter(lambda text: "\ud800" not in text))
        address = address.replace(part, quote(text, safe=data.draw(st.sampled_from(["", "/"]))))
    method = data.draw(st.sampled_from(["GET", "GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]))
    query = data.draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
    response = server.ask(method, address, params=query)
    if method != "HEAD":
        check(response, server.page, path, method.lower())
    assert response.status_code < 500


@FUZZ
@given(
    st.dictionaries(st.sampled_from(["authorization", "content-length", "host", "accept", "x"]), st.binary(max_size=30))
)
def test_headers_of_anything(server: Server, headers: dict[str, bytes]) -> None:
    response = server.ask("POST", "/v1/images/generations", content=b'{"prompt": "a cat"}', headers=headers)
    assert response.status_code < 500
