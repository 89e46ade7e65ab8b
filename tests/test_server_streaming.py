"""``stream``: events while pictures are drawn, in OpenAI's form; how a stream ends."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
from typing import Any

import httpx
import msgspec
import pytest
from openai.types import ImageGenPartialImageEvent
from PIL import Image
from server_fakes import FakeEngine, FakeTicket, post, running, settle

from ditrelay.runtime.request import RequestState
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.tickets import Progress
from ditrelay.server.app import create_app

ADDRESS = "/v1/images/generations"

Event = tuple[str, dict[str, Any]]


def events_of(response: httpx.Response) -> list[Event]:
    """Name and data of each event, read as strictly as the format allows."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    blocks = [block.split("\n") for block in response.text[:-2].split("\n\n")]
    assert all(len(block) == 2 for block in blocks)
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def stream(engine: FakeEngine | None = None, **body: object) -> list[Event]:
    return events_of(post(engine or FakeEngine(), **({"prompt": "a cat", "stream": True} | body)))


def test_progress_comes_first_and_the_picture_last():
    events = stream(seed=5, size="64x128", output_format="jpeg", partial_images=0)
    assert [name for name, _ in events] == [data["type"] for _, data in events]
    progress = [data for name, data in events if name == "image_generation.progress"]
    assert [(data["state"], data["step"], data["total_steps"]) for data in progress] == [
        ("queued", 0, 0),
        ("denoising", 0, 2),
        ("denoising", 1, 2),
        ("denoising", 2, 2),
    ]
    name, last = events[-1]
    assert name == "image_generation.completed"
    assert base64.b64decode(last["b64_json"]) == b"PNG of a cat with 5"
    assert (last["seed"], last["size"], last["output_format"], last["index"]) == (5, "64x128", "jpeg", 0)
    assert last["usage"]["total_tokens"] == 0


def test_while_a_picture_is_decoded_all_its_steps_are_done():
    class Decoded(FakeTicket):
        async def events(self):
            async for each in super().events():
                if each.state.ended:
                    yield Progress(self.request_id, RequestState.DECODING)
                yield each

    class DecodedEngine(FakeEngine):
        async def submit(self, params, **how: object):
            self.tickets.append(Decoded("r", msgspec.structs.replace(params, seed=1)))
            return self.tickets[-1]

    decoding = [data for _, data in stream(DecodedEngine()) if data.get("state") == "decoding"]
    assert [(data["step"], data["total_steps"]) for data in decoding] == [(2, 2)]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_previews_come_in_openais_form_and_in_the_format_asked_for(kind):
    jpeg = io.BytesIO()
    Image.new("RGB", (32, 16), "red").save(jpeg, "JPEG")

    class Previewed(FakeTicket):
        async def events(self):
            async for each in super().events():
                yield each
                if each.step:
                    yield dataclasses.replace(each, preview=jpeg.getvalue())

    class PreviewEngine(FakeEngine):
        async def submit(self, params, **how: object):
            assert params.previews == 2
            self.tickets.append(Previewed("r", msgspec.structs.replace(params, seed=1)))
            return self.tickets[-1]

    events = stream(PreviewEngine(), partial_images=2, output_format=kind)
    partial = [data for name, data in events if name == "image_generation.partial_image"]
    assert [(data["partial_image_index"], data["step"], data["size"]) for data in partial] == [
        (0, 1, "32x16"),
        (1, 2, "32x16"),
    ]
    assert set(ImageGenPartialImageEvent.model_fields) <= set(partial[0])
    for data in partial:
        assert data["output_format"] == kind
        with Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))) as picture:
            assert (picture.format, picture.size) == (kind.upper(), (32, 16))
    assert len([name for name, _ in events if name == "image_generation.progress"]) == 4  # a preview is no progress


def test_n_pictures_of_a_stream_are_told_apart_and_each_completes_once():
    completed = [data for name, data in stream(n=3, seed=40) if name.endswith(".completed")]
    assert sorted((data["index"], data["seed"]) for data in completed) == [(0, 40), (1, 41), (2, 42)]


@pytest.mark.parametrize(
    ("body", "status", "param"), [({"height": 130}, 400, "height"), ({"prompt": ""}, 400, "prompt"), ({}, 429, None)]
)
def test_what_is_refused_before_the_first_event_has_its_own_status(body, status, param):
    response = post(FakeEngine(max_queue=0 if status == 429 else 9), **({"prompt": "x", "stream": True} | body))
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(("prompt", "code"), [("[fail]", "request_failed"), ("[bad size]", "invalid_value")])
def test_a_failure_in_the_middle_is_the_last_event_in_openais_form(prompt, code):
    name, data = stream(prompt=prompt, size="64x64")[-1]
    assert (name, data["type"], data["error"]["code"]) == ("error", "error", code)
    assert set(data["error"]) == {"message", "type", "param", "code"}
    assert data["error"]["param"] == ("size" if prompt == "[bad size]" else None)


def test_one_failed_picture_ends_the_stream_and_cancels_the_others():
    class SecondFails(FakeEngine):
        async def submit(self, params, **how: object):
            prompt = "[fail]" if self.tickets else "[wait]"
            return await super().submit(msgspec.structs.replace(params, prompt=prompt))

    engine = SecondFails()
    events = stream(engine, n=2)
    assert [name for name, _ in events].count("error") == 1 and events[-1][0] == "error"
    assert engine.tickets[0].cancelled


def test_a_stream_past_its_time_ends_with_an_error_and_is_cancelled():
    engine = FakeEngine(args=ServerArgs(request_timeout=0.05))
    name, data = stream(engine, prompt="[wait]")[-1]
    assert (name, data["error"]["code"]) == ("error", "timeout")
    assert engine.tickets[0].cancelled


def test_a_fault_of_the_servers_own_cuts_the_stream_off_and_tells_nothing():
    response = post(FakeEngine(), prompt="[bug]", stream=True)
    assert "secret" not in response.text
    assert "image_generation.completed" not in response.text


def test_an_event_is_sent_when_it_happens_and_a_client_that_leaves_cancels_its_pictures():
    async def main() -> None:
        engine = FakeEngine()
        app = create_app(engine)
        left = asyncio.Event()
        sent: list[dict[str, Any]] = []
        body = [{"type": "http.request", "body": b'{"prompt": "[wait]", "n": 2, "stream": true}', "more_body": False}]

        async def receive() -> dict[str, Any]:
            if body:
                return body.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": ADDRESS, "query_string": b"", "headers": headers}
        async with app.router.lifespan_context(app):
            engine.loaded.set()
            await settle()
            call = asyncio.create_task(app(scope, receive, send))
            async with asyncio.timeout(5):
                while len(sent) < 1 + 2 * 4:  # the head of the answer; queued and three times denoising, twice
                    await asyncio.sleep(0.001)
            assert app.state.context.running == 1
            left.set()
            await asyncio.wait_for(call, 5)
            assert all(ticket.cancelled for ticket in engine.tickets)
            assert app.state.context.running == 0
        assert not any(b"error" in message.get("body", b"") for message in sent)

    asyncio.run(main())


def test_requests_that_are_not_streamed_go_on_beside_a_stream():
    async def main() -> None:
        engine = FakeEngine()
        async with running(engine) as client:
            streamed = asyncio.create_task(client.post(ADDRESS, json={"prompt": "[wait]", "stream": True}))
            while not engine.tickets:
                await asyncio.sleep(0.001)
            assert (await client.post(ADDRESS, json={"prompt": "a dog"})).status_code == 200
            engine.tickets[0].finish()
            assert events_of(await streamed)[-1][0] == "image_generation.completed"

    asyncio.run(main())
