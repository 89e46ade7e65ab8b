"""Every error of the API: its status, its OpenAI form, the field it names."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest
from server_fakes import CardEngine, FakeEngine, post, running, settle

from ditrelay.runtime.server_args import ServerArgs

ADDRESS = "/v1/images/generations"
JSON = {"content-type": "application/json"}


def fetch(method: str, address: str, *, engine: FakeEngine | None = None, **how: object) -> httpx.Response:
    async def main() -> httpx.Response:
        async with running(engine or FakeEngine()) as client:
            return await client.request(method, address, **how)

    return asyncio.run(main())


def error_of(response: httpx.Response, status: int) -> dict[str, str | None]:
    """The response's error, which has OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == {429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return error


@pytest.mark.parametrize(
    ("fields", "param", "allowed"),
    [
        ({"prompt": 7}, "prompt", "string"),
        ({"prompt": None}, "prompt", "string"),
        ({"n": 0}, "n", "1"),
        ({"n": 11}, "n", "10"),
        ({"n": "2"}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "-1x8"}, "size", "WIDTHxHEIGHT"),
        ({"size": "128x128 "}, "size", "WIDTHxHEIGHT"),
        ({"size": "١٢٨x128"}, "size", "WIDTHxHEIGHT"),
        ({"response_format": "png"}, "response_format", "'url' or 'b64_json'"),
        ({"quality": "hd"}, "quality", "'auto', 'standard', 'low', 'medium' or 'high'"),
        ({"style": "wild"}, "style", "'natural' or 'vivid'"),
        ({"background": "transparent"}, "background", "'auto' or 'opaque'"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 101}, "output_compression", "100"),
        ({"output_compression": "9"}, "output_compression", "integer"),
        ({"partial_images": 4}, "partial_images", "3"),
        ({"partial_images": -1, "stream": True}, "partial_images", "0"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream": True, "response_format": "url"}, "response_format", "b64_json"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"num_inference_steps": "8"}, "num_inference_steps", "integer"),
        ({"guidance_scale": "2"}, "guidance_scale", "number"),
        ({"size": "64x64", "height": 128}, "height", "contradicts size 64x64"),
        ({"size": "64x64", "width": 128}, "width", "contradicts size 64x64"),
        ({"steps": 3}, "steps", "num_inference_steps"),
        ({"prompt": ""}, "prompt", "must not be empty"),
    ],
)
def test_a_refused_field_is_400_and_named_with_what_is_allowed(fields, param, allowed):
    error = error_of(post(FakeEngine(), **({"prompt": "a cat"} | fields)), 400)
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert allowed in error["message"]


def test_a_missing_prompt_is_400():
    assert error_of(post(FakeEngine(), n=1), 400)["param"] == "prompt"


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999", b"1" + b"0" * 400])
def test_a_guidance_scale_that_is_not_finite_is_400(number):
    response = fetch("POST", ADDRESS, content=b'{"prompt": "x", "guidance_scale": %s}' % number, headers=JSON)
    assert error_of(response, 400)["param"] == "guidance_scale"


@pytest.mark.parametrize("prompt", ["a cat", "[bad size]"])
def test_a_size_that_the_engine_refuses_is_named_as_the_client_wrote_it(prompt):
    error = error_of(post(FakeEngine(), prompt=prompt, size="64x130"), 400)
    assert error["param"] == "size"
    assert error["message"] == "size: height 130 is not allowed; allowed: a multiple of 8"
    assert error_of(post(FakeEngine(), prompt=prompt, height=130), 400)["param"] == "height"


@pytest.mark.parametrize(
    "body",
    [
        b"{not json",
        b"",
        b"[]",
        b'"a cat"',
        b'{"prompt": "a cat"',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": "x", "seed": %s}' % (b"1" * 5000),
    ],
)
def test_a_body_that_is_not_a_json_object_is_400(body):
    assert error_of(fetch("POST", ADDRESS, content=body, headers=JSON), 400)["code"] == "invalid_json"


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-type": "multipart/form-data"}, {}])
def test_a_content_type_other_than_json_is_400(headers):
    error = error_of(fetch("POST", ADDRESS, content=b'{"prompt": "a cat"}', headers=headers), 400)
    assert error["code"] == "invalid_content_type"
    assert "application/json" in error["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "x", "negative_prompt": "\\ud800"}', 400),
        (b'{"prompt": "x", "\\ud800": 1}', 400),
        (b'{"prompt": "x", "model": "\\ud800"}', 404),
    ],
)
def test_text_that_utf8_cannot_hold_is_refused(body, status):
    error_of(fetch("POST", ADDRESS, content=body, headers=JSON), status)


def test_a_long_name_is_not_sent_back_in_full():
    assert len(post(FakeEngine(), prompt="x", **{"y" * 100_000: 1}).content) < 2_000
    assert len(post(FakeEngine(), prompt="x", model="y" * 100_000).content) < 2_000


def test_a_body_too_large_is_413_also_where_its_length_is_not_declared():
    async def chunks():
        for _ in range(3):
            yield b" " * (1 << 19)

    for content in (b" " * (1 << 20) + b"{}", chunks()):
        response = fetch("POST", ADDRESS, content=content, headers=JSON)
        assert error_of(response, 413)["code"] == "body_too_large"
        assert response.headers["connection"] == "close"


def test_a_model_that_is_not_served_is_404():
    error = error_of(post(FakeEngine(), prompt="a cat", model="dall-e-3"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'tiny'" in error["message"]
    assert error_of(fetch("GET", "/v1/models/dall-e-3"), 404)["code"] == "model_not_found"


def test_unknown_addresses_and_methods():
    assert error_of(fetch("GET", "/v1/nothing"), 404)["code"] == "unknown_url"
    response = fetch("GET", ADDRESS)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["message"].endswith("allowed: POST")


def test_a_file_that_is_not_there_is_404():
    assert error_of(fetch("GET", "/v1/images/nothing/content"), 404)["code"] == "file_not_found"
    assert error_of(fetch("GET", "/v1/images/..%2f..%2fetc%2fpasswd/content"), 404)


def test_a_video_model_is_refused_and_what_it_makes_is_said(tmp_path):
    args = ServerArgs(served_model_name="tiny", output_dir=str(tmp_path))
    error = error_of(post(FakeEngine(args, media="video"), prompt="a cat"), 400)
    assert error["param"] == "model"
    assert "'tiny' makes videos" in error["message"] and error["message"].endswith("such as builtin:emoji")


def test_a_full_queue_is_429_with_retry_after():
    response = post(FakeEngine(max_queue=0), prompt="a cat")
    assert error_of(response, 429)["code"] == "queue_full"
    assert response.headers["retry-after"] == "7"


def test_a_failed_request_is_500_and_names_the_request():
    error = error_of(post(FakeEngine(), prompt="[fail]"), 500)
    assert error["code"] == "request_failed"
    assert "r0" in error["message"]


def test_a_bug_is_500_and_tells_the_client_nothing():
    response = post(FakeEngine(), prompt="[bug]")
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text


def test_a_request_while_the_model_loads_is_503_and_says_what_is_missing():
    async def main() -> httpx.Response:
        async with running(FakeEngine(), loaded=False) as client:
            return await client.post(ADDRESS, json={"prompt": "a cat"})

    response = asyncio.run(main())
    error = error_of(response, 503)
    assert error["code"] == "not_ready"
    assert "(dit: rank 0 is starting, rank 1 is starting; non_dit: rank 2 is starting)" in error["message"]
    assert int(response.headers["retry-after"]) > 0


def test_a_request_after_the_engine_closed_is_503():
    async def main() -> httpx.Response:
        engine = FakeEngine()
        async with running(engine) as client:
            await engine.close()
            return await client.post(ADDRESS, json={"prompt": "too late"})

    assert "shutting down" in error_of(asyncio.run(main()), 503)["message"]


def test_a_role_that_is_gone_for_good_is_503_also_for_requests_that_run():
    for prompt in ("a cat", "[fail]"):
        engine = FakeEngine(lost_roles=(("decode", "worker 2 died (killed by signal 9)"),))
        if prompt == "[fail]":  # lost while it ran
            engine = LosesRole()
        error = error_of(post(engine, prompt=prompt), 503)
        assert error["code"] == "role_down"
        assert "no rank is left for decode (worker 2 died" in error["message"]


class LosesRole(FakeEngine):
    """Loses a role between the submission of a request and its end."""

    async def submit(self, params, **how: object):
        self.lost_roles = (("decode", "worker 2 died"),)
        return await super().submit(params)


def test_a_lost_worker_does_not_turn_requests_away():
    async def main() -> httpx.Response:
        engine = FakeEngine()
        async with running(engine) as client:
            engine.down[0] = "killed by signal 9"
            await settle()
            return await client.post(ADDRESS, json={"prompt": "a cat"})

    assert asyncio.run(main()).status_code == 200


@pytest.mark.parametrize(
    ("kind", "begin"), [(b"application/json", b'{"prompt'), (b"multipart/form-data; boundary=x", b"--x\r\nContent")]
)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_the_servers(path, kind, begin, caplog):
    async def main() -> None:
        parts = [{"type": "http.disconnect"}, {"type": "http.request", "body": begin, "more_body": True}]
        sent = []

        async def receive():
            return parts.pop()

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", kind)]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        async with running(CardEngine()) as client:
            await client._transport.app(scope, receive, send)
        assert sent[0]["status"] == 499

    asyncio.run(main())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("count", [51, 90_000])
def test_a_body_of_more_fields_than_any_request_has_is_refused_before_each_becomes_an_error(count):
    error = error_of(fetch("POST", ADDRESS, json=dict.fromkeys(map(str, range(count)), 0)), 400)
    assert (error["code"], error["param"]) == ("invalid_json", None)
    assert error["message"] == f"the body has {count} fields in one object; allowed: 50"
