"""``POST /v1/images/generations``: pictures, seeds, addresses, cancellation."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import re

import msgspec
import pytest
from server_fakes import DRAWN_SEED, CardEngine, FakeEngine, post, running, settle

from ditrelay.errors import QueueFull
from ditrelay.runtime.metrics import Timings
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.server.app import create_app

ADDRESS = "/v1/images/generations"


def test_b64_json_holds_the_file_its_seed_and_its_timings():
    response = post(FakeEngine(), prompt="a cat", response_format="b64_json", seed=5)
    assert response.status_code == 200
    assert response.json()["created"] > 1_700_000_000
    [picture] = response.json()["data"]
    assert base64.b64decode(picture.pop("b64_json")) == b"PNG of a cat with 5"
    assert picture.pop("seed") == 5
    assert picture.pop("timings") == dataclasses.asdict(Timings(denoise=0.5, total=0.75))
    assert not picture


@pytest.mark.parametrize("by", ["request", "server"])
def test_a_url_is_absolute_and_getting_it_gives_the_png(by):
    async def main() -> None:
        args = ServerArgs(served_model_name="tiny", default_response_format="url" if by == "server" else "b64_json")
        body = {"prompt": "a cat", "seed": 5} | ({"response_format": "url"} if by == "request" else {})
        async with running(FakeEngine(args=args)) as client:
            [picture] = (await client.post(ADDRESS, json=body)).json()["data"]
            assert re.fullmatch(r"http://pictures.test:8000/v1/images/[\w-]{32}/content", picture["url"])
            assert "b64_json" not in picture
            file = await client.get(picture["url"])
            assert file.content == b"PNG of a cat with 5"
            assert file.headers["content-type"] == "image/png"
            assert file.headers["x-content-type-options"] == "nosniff"

    asyncio.run(main())


@pytest.mark.parametrize("how", [{}, {"response_format": None}])
def test_an_answer_has_the_form_of_gpt_image_models_where_nothing_else_is_asked_for(how):
    answer = post(FakeEngine(), prompt="a cat", seed=5, **how).json()
    [picture] = answer["data"]
    assert base64.b64decode(picture["b64_json"]) == b"PNG of a cat with 5" and "url" not in picture
    assert answer["usage"]["total_tokens"] == 0 and "warnings" not in answer
    assert (answer["background"], answer["output_format"], answer["size"]) == ("opaque", "png", "128x128")


def test_a_seed_of_minus_one_is_drawn_for_each_picture_and_returned():
    engine = FakeEngine()
    pictures = post(engine, prompt="a cat", n=2, seed=-1).json()["data"]
    assert [picture["seed"] for picture in pictures] == [DRAWN_SEED, DRAWN_SEED]


def test_more_pictures_than_may_ever_wait_are_refused_by_n_and_not_told_to_come_back():
    args = ServerArgs(max_queue=2)
    response = post(FakeEngine(args=args), prompt="a cat", n=3)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
    assert "allowed: 1 to 2 (--max-queue)" in response.json()["error"]["message"]
    assert "retry-after" not in response.headers
    assert post(FakeEngine(args=args), prompt="a cat", n=2).status_code == 200


def test_picture_i_uses_seed_plus_i_and_they_come_in_order():
    response = post(FakeEngine(), prompt="a cat", n=3, seed=40, response_format="b64_json")
    pictures = response.json()["data"]
    assert [picture["seed"] for picture in pictures] == [40, 41, 42]
    assert base64.b64decode(pictures[2]["b64_json"]) == b"PNG of a cat with 42"


def test_a_seed_that_is_not_given_is_left_to_the_engine_and_returned():
    engine = FakeEngine()
    pictures = post(engine, prompt="a cat", n=2).json()["data"]
    assert [picture["seed"] for picture in pictures] == [DRAWN_SEED, DRAWN_SEED]


def test_every_parameter_reaches_the_engine():
    engine = FakeEngine()
    extensions = {"num_inference_steps": 7, "guidance_scale": 3, "negative_prompt": "a dog", "seed": 1}
    assert post(engine, prompt="a cat", size="64x128", **extensions).status_code == 200
    params = engine.tickets[0].params
    assert (params.prompt, params.width, params.height) == ("a cat", 64, 128)
    assert (params.num_inference_steps, params.guidance_scale, params.negative_prompt) == (7, 3.0, "a dog")


@pytest.mark.parametrize(
    ("fields", "height", "width"),
    [
        ({}, None, None),
        ({"size": "auto"}, None, None),
        ({"size": None, "height": 64}, 64, None),
        ({"size": "auto", "height": 64, "width": 128}, 64, 128),
        ({"size": "128x64", "height": 64}, 64, 128),
    ],
)
def test_size_and_height_and_width_may_agree(fields, height, width):
    engine = FakeEngine()
    assert post(engine, prompt="a cat", **fields).status_code == 200
    assert (engine.tickets[0].params.height, engine.tickets[0].params.width) == (height, width)


@pytest.mark.parametrize(
    "field",
    [
        {"user": "me"},
        {"quality": "standard"},
        *({"quality": quality} for quality in ("auto", "low", "medium", "high")),
        {"style": "natural"},
        {"style": "vivid"},
        {"background": "auto"},
        {"moderation": "auto"},
        {"seed": -1},
        {"seed": -1.0, "n": 1.0},
        {"n": 1.0, "output_compression": 100.0, "partial_images": 0.0, "num_inference_steps": 8.0, "width": 64.0},
        {"background": "opaque"},
        {"moderation": "low"},
        {"output_format": None, "output_compression": None},
        {"stream": False, "partial_images": None},
        {"partial_images": 0},
        {"model": "tiny"},
        {"n": None, "seed": None, "response_format": None, "model": None},
    ],
)
def test_openai_fields_that_change_nothing_are_accepted(field):
    assert post(FakeEngine(), prompt="a cat", **field).status_code == 200


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_format_reaches_the_engine_and_the_answer_tells_it(kind):
    async def main() -> None:
        engine = FakeEngine()
        async with running(engine) as client:
            body = {"prompt": "a cat", "output_format": kind, "output_compression": 100, "size": "64x128"}
            body["response_format"] = "url"
            answer = (await client.post(ADDRESS, json=body)).json()
            assert (answer["output_format"], answer["size"], answer["background"]) == (kind, "64x128", "opaque")
            file = await client.get(answer["data"][0]["url"])
            assert file.headers["content-type"] == f"image/{kind}"
        params = engine.tickets[0].params
        assert (params.output_format, params.output_compression) == (kind, 100)

    asyncio.run(main())


def test_a_compression_that_png_lacks_is_400():
    response = post(CardEngine(), prompt="a cat", output_compression=50)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "output_compression"
    assert post(CardEngine(), prompt="a cat", output_compression=50, output_format="webp").status_code == 200


def test_requests_run_at_once():
    async def main() -> None:
        engine = FakeEngine()
        async with running(engine) as client:
            body = {"prompt": "[wait]", "response_format": "b64_json"}
            requests = [asyncio.create_task(client.post(ADDRESS, json=body | {"seed": seed})) for seed in range(8)]
            while len(engine.tickets) < 8:
                await asyncio.sleep(0.001)
            for ticket in reversed(engine.tickets):
                ticket.finish()
            responses = await asyncio.gather(*requests)
        assert [response.json()["data"][0]["seed"] for response in responses] == list(range(8))

    asyncio.run(main())


def test_a_bad_request_among_others_leaves_them_untouched():
    async def main() -> None:
        engine = FakeEngine()
        async with running(engine) as client:
            good = asyncio.create_task(client.post(ADDRESS, json={"prompt": "[wait]"}))
            bad = [{"prompt": 1}, {"prompt": "x", "size": "13x13"}, {"prompt": "[fail]"}, {"prompt": "x", "model": "y"}]
            answers = [await client.post(ADDRESS, json=body) for body in bad]
            assert [answer.status_code for answer in answers] == [400, 400, 500, 404]
            assert not engine.tickets[0].cancelled
            engine.tickets[0].finish()
            assert (await good).status_code == 200

    asyncio.run(main())


def test_a_client_that_disconnects_cancels_all_its_pictures():
    async def main() -> None:
        engine = FakeEngine()
        app = create_app(engine)
        left = asyncio.Event()
        sent: list[dict[str, object]] = []
        body = [{"type": "http.request", "body": b'{"prompt": "[wait]", "n": 3}', "more_body": False}]

        async def receive() -> dict[str, object]:
            if body:
                return body.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": ADDRESS,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        async with app.router.lifespan_context(app):
            engine.loaded.set()
            await settle()
            call = asyncio.create_task(app(scope, receive, send))
            while len(engine.tickets) < 3:
                await asyncio.sleep(0.001)
            assert not any(ticket.cancelled for ticket in engine.tickets)
            left.set()
            await asyncio.wait_for(call, 5)
            assert all(ticket.cancelled for ticket in engine.tickets)
        assert sent[0]["status"] == 499

    asyncio.run(main())


def test_a_server_that_drops_a_request_cancels_its_pictures():
    async def main() -> None:
        engine = FakeEngine()
        async with running(engine) as client:
            request = asyncio.create_task(client.post(ADDRESS, json={"prompt": "[wait]"}))
            while not engine.tickets:
                await asyncio.sleep(0.001)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            assert engine.tickets[0].cancelled

    asyncio.run(main())


def test_one_failed_picture_cancels_the_others_of_its_request():
    class SecondFails(FakeEngine):
        async def submit(self, params, **how: object):
            prompt = "[fail]" if self.tickets else "[wait]"
            return await super().submit(msgspec.structs.replace(params, prompt=prompt))

    engine = SecondFails()
    assert post(engine, prompt="a cat", n=2).status_code == 500
    assert engine.tickets[0].cancelled


def test_a_queue_that_fills_midway_cancels_the_pictures_already_taken():
    engine = FakeEngine(max_queue=2)
    response = post(engine, prompt="[wait]", n=3)
    assert response.status_code == 429
    assert response.headers["retry-after"] == str(QueueFull(2, 7).retry_after)
    assert [ticket.cancelled for ticket in engine.tickets] == [True, True]


def test_a_request_past_its_time_is_504_and_cancelled():
    engine = FakeEngine(args=ServerArgs(request_timeout=0.05))
    response = post(engine, prompt="[wait]")
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"
    assert "--request-timeout" in response.json()["error"]["message"]
    assert engine.tickets[0].cancelled
