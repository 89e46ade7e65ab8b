"""The application against its own OpenAPI page, as schemathesis reads it: requests that fit it, and that nearly do."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import msgspec
import pytest
import requests
import schemathesis
from hypothesis import settings
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from server_fakes import ADDRESS, CardEngine, FakeEngine, FakeTicket, Server

from ditrelay.runtime.request import SamplingParams
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.server.app import create_app

# Not every body that fits the page is drawn: what sizes, steps and guidance a model takes is its card's to say.
CONFIG = {"seed": 1, "checks": {"positive_data_acceptance": {"enabled": False}}}
PAGE = schemathesis.openapi.from_dict(create_app(FakeEngine()).openapi(), config=SchemathesisConfig.from_dict(CONFIG))
PAGE = PAGE.exclude(path="/v1/activity")  # it has no end
TELLS = [status_code_conformance, content_type_conformance, response_schema_conformance]


class EasyEngine(CardEngine):
    """Its model takes any size and guidance, so that most bodies that fit the page come as far as to an answer."""

    model_card = msgspec.structs.replace(
        CardEngine.model_card,
        size_multiple=1,
        max_side=2**64,
        max_pixels=2**128,
        max_steps=2**64,
        supports_guidance=True,
        supports_negative_prompt=True,
        guidance_above=-1.0,
    )

    async def submit(self, params: SamplingParams, **how: object) -> FakeTicket:
        resolved = self.model_card.resolve(params)
        return await FakeEngine.submit(self, msgspec.structs.replace(resolved, height=None))


@pytest.fixture(scope="module", params=[CardEngine, EasyEngine], ids=["strict model", "easy model"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    made = Server(request.param())
    yield made
    made.close()


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    made = Server(FakeEngine(args=ServerArgs(api_key="secret")))
    yield made
    made.close()


def send(case: schemathesis.Case, server: Server) -> httpx.Response:
    sent = requests.Request(**case.as_transport_kwargs(base_url=ADDRESS)).prepare()
    return server.ask(sent.method, sent.url, content=sent.body, headers=sent.headers)


def is_carried(case: schemathesis.Case) -> bool:
    """If what breaks the page's rules is seen in what is sent. Of a null or an empty list a form sends nothing, and
    of a list with one element that element."""
    is_form = case.media_type == "multipart/form-data" and isinstance(case.body, dict)
    return not is_form or not any(value is None or isinstance(value, list | dict) for value in case.body.values())


@PAGE.parametrize()
@settings(max_examples=100, deadline=None, database=None)
def test_no_answer_is_5xx_and_each_is_as_the_page_says(case: schemathesis.Case, server: Server) -> None:
    excluded = [] if is_carried(case) else [negative_data_rejection]
    case.validate_response(send(case, server), excluded_checks=excluded)


@PAGE.parametrize()
@settings(max_examples=10, deadline=None, database=None)
def test_the_page_tells_of_the_answer_to_a_client_without_a_key(case: schemathesis.Case, locked: Server) -> None:
    answer = send(case, locked)
    is_open = case.path in ("/health", "/ready", "/v1/images/{file_id}/content")
    assert is_open or answer.status_code == 401
    case.validate_response(answer, checks=TELLS)
