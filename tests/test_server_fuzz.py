"""Requests made from the application's own OpenAPI page, valid and damaged: answers are told of there, none is 5xx."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_fakes import FakeEngine, FakeTicket, settle

from ditrelay.models.card import load_card
from ditrelay.runtime.request import SamplingParams
from ditrelay.server.app import create_app

Schema = dict[str, Any]

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


class CardEngine(FakeEngine):
    """Checks parameters as the real engine does."""

    model_card = load_card("builtin:emoji")

    async def submit(self, params: SamplingParams) -> FakeTicket:
        return await super().submit(self.model_card.resolve(params))


class Server:
    """One application whose lifespan runs, used from synchronous tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._engine = CardEngine(max_queue=10**9)
        self._app = create_app(self._engine)
        self.page: Schema = self._app.openapi()
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://fuzz.test")
        self._life = self._app.router.lifespan_context(self._app)
        self._loop.run_until_complete(self._start())

    async def _start(self) -> None:
        await self._life.__aenter__()
        self._engine.loaded.set()
        await settle()

    def ask(self, method: str, address: str, **how: Any) -> httpx.Response:
        self._engine.tickets.clear()
        return self._loop.run_until_complete(self._client.request(method, address, **how))

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.run_until_complete(self._life.__aexit__(None, None, None))
        self._loop.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


# ---------------------------------------------------------------- values from a schema


def valid(schema: Schema, page: Schema) -> st.SearchStrategy[Any]:
    """Values that ``schema`` allows (and a few beyond its limits, which it states in words only)."""
    if "$ref" in schema:
        return valid(page["components"]["schemas"][schema["$ref"].rpartition("/")[2]], page)
    if "anyOf" in schema:
        return st.one_of([valid(each, page) for each in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    match schema.get("type"):
        case "object":
            return objects(schema, page)
        case "array":
            return st.lists(valid(schema.get("items", {}), page), max_size=3)
        case "integer":
            return NUMBERS | st.integers(schema.get("minimum"), schema.get("maximum"))
        case "number":
            return st.floats(allow_nan=False, allow_infinity=False) | NUMBERS
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    sizes = st.tuples(NUMBERS, NUMBERS).map(lambda size: f"{size[0]}x{size[1]}")
    return st.one_of(ANY_TEXT, st.just("a cat"), sizes)


@st.composite
def objects(draw: st.DrawFn, schema: Schema, page: Schema) -> dict[str, Any]:
    """What is required and at most three more fields: with all of them, one would always be refused first."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    more = draw(st.lists(st.sampled_from(sorted(properties)), max_size=3)) if properties else []
    return {name: draw(valid(properties[name], page)) for name in (*required, *more)}


@st.composite
def bodies(draw: st.DrawFn, schema: Schema, page: Schema) -> Any:
    """A body that the schema allows, with none or some of its fields replaced, dropped or added."""
    body = draw(valid(schema, page))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        name = draw(st.sampled_from([*body, "prompt", "unknown"]) | ANY_TEXT)
        if draw(st.booleans()):
            body[name] = draw(ANY_JSON)
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
def test_bodies_by_the_schema_and_damaged_ones(server: Server, data: st.DataObject) -> None:
    posts = [(path, each["post"]) for path, each in server.page["paths"].items() if "post" in each]
    path, operation = data.draw(st.sampled_from(posts))
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    body = as_bytes(data.draw(bodies(schema, server.page)))
    headers = {"content-type": data.draw(st.sampled_from(["application/json"] * 8 + ["text/plain", "", "x/y; q"]))}
    check(server.ask("POST", path, content=body, headers=headers), server.page, path, "post")


@FUZZ
@given(st.one_of(st.binary(max_size=300), ANY_JSON.map(as_bytes)))
def test_bodies_of_anything(server: Server, body: bytes) -> None:
    path = "/v1/images/generations"
    response = server.ask("POST", path, content=body, headers={"content-type": "application/json"})
    check(response, server.page, path, "post")


@FUZZ
@given(st.data())
def test_addresses_with_anything_in_their_place(server: Server, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(server.page["paths"])))
    address = path
    for part in ("{file_id}", "{model_id}"):
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
