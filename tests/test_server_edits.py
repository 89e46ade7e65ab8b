"""``POST /v1/images/edits``: pictures that start from a picture, as a form and as JSON, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from picture_samples import animated, huge, picture
from server_fakes import CardEngine, FakeEngine, running, settle

from ditrelay.runtime.server_args import ServerArgs
from ditrelay.server.edit_schemas import ImageEditRequest

ADDRESS = "/v1/images/edits"
PNG = picture()


def edit(engine: FakeEngine | None = None, **how: Any) -> httpx.Response:
    """The answer to one request."""

    async def main() -> httpx.Response:
        async with running(engine or CardEngine()) as client, asyncio.timeout(10):
            return await client.post(ADDRESS, **how)

    return asyncio.run(main())


def form(content: bytes = PNG, kind: str = "image/png", name: str = "image", **fields: Any) -> dict[str, Any]:
    return {"data": {"prompt": "a cat"} | fields, "files": [(name, ("../../etc/x.png", content, kind))]}


def data_url(content: bytes = PNG, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def refused(response: httpx.Response, param: str = "image", status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    return error["message"]


@pytest.mark.parametrize(
    "how",
    [
        form(),
        form(name="image[]"),
        form(kind="application/octet-stream"),
        form(picture(kind="JPEG"), "image/jpg"),
        form(picture(kind="WEBP"), "image/webp"),
        form(picture(kind="AVIF"), "image/avif"),
        form(animated("GIF"), "image/gif"),
        form(kind="text/plain"),
        form(kind="image/jpeg"),
        {"json": {"prompt": "a cat", "image": data_url(kind="image/png;name=a.png")}},
        {"json": {"prompt": "a cat", "image": data_url(kind="")}},
        {"json": {"prompt": "a cat", "image": data_url(kind="text/plain")}},
        {"files": {"prompt": (None, "a cat"), "image": (None, data_url())}},
        {"json": {"prompt": "a cat", "image": data_url()}},
        {"json": {"prompt": "a cat", "image": {"image_url": data_url(picture(kind="JPEG"), "image/jpeg")}}},
    ],
)
def test_a_picture_reaches_the_engine_as_it_is_however_it_is_sent(how: dict[str, Any]) -> None:
    engine = CardEngine()
    response = edit(engine, **how)
    assert response.status_code == 200, response.text
    [ticket] = engine.tickets
    assert ticket.params.image in (animated("GIF"), *(picture(kind=each) for each in ("PNG", "JPEG", "WEBP", "AVIF")))
    size = (16, 16) if ticket.params.image == animated("GIF") else (48, 32)
    assert (ticket.params.width, ticket.params.height, ticket.params.strength) == (*size, 0.5)
    assert response.json()["size"] == f"{size[0]}x{size[1]}"


def test_a_data_url_in_a_form_may_be_as_large_as_one_in_json() -> None:
    large, engine = picture(900, 900), CardEngine()  # 2 MB
    response = edit(engine, files={"prompt": (None, "a cat"), "image": (None, data_url(large))})
    assert response.status_code == 200, response.text
    assert engine.tickets[0].params.image == large


def test_every_field_of_a_form_reaches_the_engine() -> None:
    engine = CardEngine()
    fields = {
        "n": "2",
        "size": "128x64",
        "response_format": "b64_json",
        "output_format": "webp",
        "output_compression": "80",
        "user": "me",
        "seed": "5",
        "strength": "0.25",
        "num_inference_steps": "3",
        "guidance_scale": "1.5",
        "negative_prompt": "a dog",
        "model": engine.args.model_name,
        "partial_images": "0",
        "stream": "false",
    }
    response = edit(engine, **form(**fields))
    assert response.status_code == 200, response.text
    assert [each["seed"] for each in response.json()["data"]] == [5, 6]
    params = engine.tickets[1].params
    assert (params.width, params.height, params.strength, params.image) == (128, 64, 0.25, PNG)
    assert (params.output_format, params.output_compression, params.num_inference_steps) == ("webp", 80, 3)
    assert (params.guidance_scale, params.negative_prompt) == (1.5, "a dog")


def test_a_stream_has_the_events_of_an_edit() -> None:
    response = edit(**form(stream="true", n="2"))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data")]
    assert {event["type"] for event in events} == {"image_edit.progress", "image_edit.completed"}
    assert {event["index"] for event in events if event["type"] == "image_edit.completed"} == {0, 1}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "image/png"),
        (b"GIF89a", "image/png"),
        (b"no picture", "application/octet-stream"),
        (animated("PNG"), "image/png"),
        (animated("WEBP"), "image/webp"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "image/heic"),
        (huge(), "image/png"),
        (PNG[:-20], "image/png"),
        (picture(kind="JPEG")[:-20], "image/jpeg"),
    ],
    ids=[
        "empty", "broken", "text", "animated png", "animated webp", "heic", "400 megapixels", "cut off", "cut off jpeg",
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_form", [True, False], ids=["form", "data url"])
def test_what_is_no_picture_that_is_taken_is_refused(content: bytes, kind: str, as_form: bool) -> None:
    how = form(content, kind) if as_form else {"json": {"prompt": "a cat", "image": data_url(content, kind)}}
    assert "allowed" in refused(edit(**how))


@pytest.mark.parametrize(
    "address",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1/x.png",
        "https://169.254.169.254/latest/meta-data",
        "x.png",
        "data:image/png;base64,%%%",
        "",
    ],
)
def test_paths_and_addresses_are_refused(address: str) -> None:
    for image in (address, {"image_url": address}):
        assert "data:image/png" in refused(edit(json={"prompt": "a cat", "image": image}))


def test_an_address_is_refused_too_where_another_host_is_allowed() -> None:
    args = ServerArgs(served_model_name="tiny", allow_remote_media="pictures.test,other.test:8080")
    for address in (
        "http://127.0.0.1/x.png",
        "https://else.test/x",
        "http://other.test/x",
        "http://pictures.test:81/x",
    ):
        message = refused(edit(CardEngine(args), json={"prompt": "a cat", "image": address}))
        assert "pictures.test" in message


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"strength": "0"}, "strength"),
        ({"strength": "1.1"}, "strength"),
        ({"strength": "nan"}, "strength"),
        ({"strength": "much"}, "strength"),
        ({"n": "11"}, "n"),
        ({"n": "0"}, "n"),
        ({"size": "130x130"}, "size"),
        ({"size": "big"}, "size"),
        ({"prompt": " "}, "prompt"),
        ({"seed": "-2"}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": "50"}, "output_compression"),
        ({"num_inference_steps": "0"}, "num_inference_steps"),
        ({"response_format": "file"}, "response_format"),
        ({"input_fidelity": "full"}, "input_fidelity"),
        ({"partial_images": "4"}, "partial_images"),
        ({"mask": data_url()}, "mask"),
        ({"colour": "red"}, "colour"),
        ({"image": "x"}, "image"),
    ],
)
def test_a_bad_field_is_named(changed: dict[str, str], param: str) -> None:
    refused(edit(**form(**changed)), param)


def test_masks_and_several_pictures_are_refused_with_what_is_there_instead() -> None:
    file = ("x.png", PNG, "image/png")
    assert "strength" in refused(edit(data={"prompt": "a"}, files={"image": file, "mask": file}), "mask")
    assert "strength" in refused(edit(data={"prompt": "a", "mask": ""}, files={"image": file}), "mask")
    for name in ("image", "image[]"):
        several = edit(data={"prompt": "a"}, files=[(name, file), (name, file)])
        assert "2 pictures; allowed: one" in refused(several)
    assert "files are taken as" in refused(edit(data={"prompt": "a"}, files={"markup": file}), "markup")


def test_a_picture_and_a_prompt_are_needed() -> None:
    assert "required" in refused(edit(json={"prompt": "a cat"}))
    assert "required" in refused(edit(files={"image": ("x.png", PNG, "image/png")}), "prompt")


@pytest.mark.parametrize(
    "how",
    [
        {"content": b"prompt=a", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        {"content": b"{", "headers": {"Content-Type": "application/json"}},
        {"content": b"[]", "headers": {"Content-Type": "application/json"}},
        {"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"--y\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ],
)
def test_a_body_that_is_neither_json_nor_a_form_is_400(how: dict[str, Any]) -> None:
    response = edit(**how)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_model_that_edits_nothing_says_which_do() -> None:
    class TextOnly(CardEngine):
        @property
        def card(self) -> Any:
            return msgspec.structs.replace(self.model_card, edits=False)

    assert "z-image" in refused(edit(TextOnly(), **form()), "model")
    assert "is not served" in refused(edit(**form(model="another")), "model", status=404)


def test_an_upload_may_be_larger_than_other_bodies_up_to_its_own_limit() -> None:
    args = ServerArgs(served_model_name="tiny", max_request_bytes=1000, max_upload_bytes=100_000)
    large = picture(100, 100)
    assert 10_000 < len(large) < 90_000
    assert edit(CardEngine(args), **form(large)).status_code == 200
    response = edit(CardEngine(args), **form(picture(300, 300)))
    assert response.status_code == 413 and "--max-upload-bytes" in response.json()["error"]["message"]


def test_pictures_that_nobody_waits_for_count_among_the_bytes_under_way_until_they_are_drawn() -> None:
    large = picture(256, 256)
    args = ServerArgs(served_model_name="tiny", max_request_bytes=1000, max_total_bytes=2 * len(large))

    async def main() -> None:
        engine = CardEngine(args=args)
        async with running(engine) as client, asyncio.timeout(10):

            async def draw() -> httpx.Response:
                later = {"Prefer": "respond-async"}
                return await client.post(ADDRESS, **form(large, prompt="a cat [wait]", n="2"), headers=later)

            assert (await draw()).status_code == 202
            turned_away = await draw()
            assert (turned_away.status_code, turned_away.headers["retry-after"]) == (429, "9")
            for ticket in engine.tickets:
                ticket.finish()
            await settle()
            assert (await draw()).status_code == 202

    asyncio.run(main())


@pytest.mark.parametrize("charset", ["punycode", "undefined", '"idna"', "latin-1", "no-such"])
def test_a_form_is_in_utf_8_and_read_by_no_other_codec(charset: str) -> None:
    fields = {"prompt-": (None, f"{'b' * 100_000}-{'a' * 100_000}"), "image": (None, data_url())}
    request = httpx.Request("POST", "http://x", files=fields)  # punycode would take a second for this prompt
    kind = f"{request.headers['content-type']}; charset={charset}"
    answer = edit(content=request.read(), headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_content_type")
    assert "utf-8" in answer.json()["error"]["message"]


@pytest.mark.parametrize("charset", ["utf-8", '"UTF-8"', "us-ascii"])
def test_a_form_may_say_that_it_is_in_utf_8(charset: str) -> None:
    request = httpx.Request("POST", "http://x", **form(prompt="a café"))
    kind = f"{request.headers['content-type']}; charset={charset}"
    assert edit(content=request.read(), headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize("wrap", [lambda fields: fields, lambda fields: {"prompt": "a cat", "image": fields}])
def test_a_body_of_a_hundred_thousand_fields_is_refused_before_each_becomes_an_error(
    wrap: Callable[[dict[str, int]], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*what: object, **how: object) -> None:
        raise AssertionError("it was checked field by field")

    monkeypatch.setattr(ImageEditRequest, "model_validate", refuse)
    answer = edit(json=wrap(dict.fromkeys(map(str, range(100_000)), 0)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert answer.json()["error"]["message"].startswith("the body has 100000 fields in one object; allowed: ")


@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda url: url,
        lambda url: [url],
        lambda url: {"image_url": url},
        lambda url: [{"image_url": url}],
    ],
)
def test_json_refers_to_a_picture_in_each_form_of_openais_clients(name: str, wrap: Callable[[str], Any]) -> None:
    engine = CardEngine()
    assert edit(engine, json={"prompt": "a cat", name: wrap(data_url())}).status_code == 200
    assert engine.tickets[0].params.image == PNG


@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize(
    "reference",
    [
        {"file_id": "file-1"},
        [{"file_id": "file-1"}],
        [{"image_url": data_url(), "file_id": "file-1"}],
        [{"image_url": {"url": data_url()}}],
        {"url": data_url()},
        [],
        [None],
        [[data_url()]],
        5,
        "x.png",
    ],
)
def test_a_form_of_reference_that_is_not_taken_says_which_are(name: str, reference: Any) -> None:
    message = refused(edit(json={"prompt": "a cat", name: reference}), name)
    assert "allowed: " in message and "data" in message


def test_as_many_pictures_as_the_model_takes_and_by_one_field_only() -> None:
    url = {"image_url": data_url()}
    assert "2 pictures; allowed: one" in refused(edit(json={"prompt": "a cat", "images": [url, url]}), "images")
    assert "beside image" in refused(edit(json={"prompt": "a", "image": url, "images": [url]}), "images")
    texts = [("image[]", (None, data_url())), ("image[]", (None, data_url())), ("prompt", (None, "a"))]
    assert "2 pictures; allowed: one" in refused(edit(files=texts))
    assert edit(files=texts[1:]).status_code == 200
    assert "given twice" in refused(edit(files=[("image", (None, "x")), *texts]))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("2048x2048", "size: 2048x2048 pixels; allowed: at most"),
        ("130x128", "size: width 130 is not allowed; allowed:"),
    ],
)
def test_a_size_that_is_too_large_is_said_in_words_that_make_sense(size: str, message: str) -> None:
    class Small(CardEngine):
        model_card = msgspec.structs.replace(CardEngine.model_card, size_multiple=16, max_side=4096, max_pixels=1 << 18)

    assert refused(edit(Small(), json={"prompt": "a", "image": data_url(), "size": size}), "size").startswith(message)
