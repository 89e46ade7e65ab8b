"""Fields of other servers and their clients: refused or ignored with a warning, ``extra_body``, several names."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from picture_samples import picture
from server_fakes import CardEngine, FakeEngine, running
from test_server_videos import serving

from ditrelay.errors import ConfigError
from ditrelay.runtime.server_args import ServerArgs

GENERATIONS, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
PNG = picture()
FILE = ("x.png", PNG, "image/png")
LENIENT = ServerArgs(served_model_name="tiny", extra_fields="ignore")


def video(folder: Path, *, extra_fields: str = "refuse", **how: Any) -> httpx.Response:
    """The answer to a request for a video."""

    async def main() -> httpx.Response:
        async with serving(folder, extra_fields=extra_fields) as (client, _), asyncio.timeout(30):
            return await client.post(VIDEOS, **how)

    return asyncio.run(main())


def post(address: str, engine: FakeEngine, **how: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with running(engine) as client, asyncio.timeout(10):
            return await client.post(address, **how)

    return asyncio.run(main())


def error(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


# ---------------------------------------------------------------- unknown fields

UNKNOWN: list[tuple[str, dict[str, Any]]] = [
    (GENERATIONS, {"json": {"prompt": "a cat", "true_cfg_scale": 4.0}}),
    (EDITS, {"data": {"prompt": "a cat", "true_cfg_scale": "4"}, "files": {"image": FILE}}),
    (EDITS, {"data": {"prompt": "a cat"}, "files": {"image": FILE, "true_cfg_scale": FILE}}),
    (GENERATIONS, {"json": {"prompt": "a cat", "extra_body": {"true_cfg_scale": 4.0}}}),
]


@pytest.mark.parametrize(("address", "how"), UNKNOWN)
def test_an_unknown_field_is_refused_by_default_and_ignored_with_a_warning_where_the_server_is_told_so(
    address: str, how: dict[str, Any]
) -> None:
    assert error(post(address, CardEngine(), **how))["param"] == "true_cfg_scale"
    answer = post(address, CardEngine(LENIENT), **how).json()
    assert answer["warnings"] == ["true_cfg_scale: unknown field, ignored"] and len(answer["data"]) == 1


def test_a_stream_and_an_answer_in_advance_tell_what_was_ignored_too() -> None:
    body = {"prompt": "a cat", "sys_type": "x"}
    stream = post(GENERATIONS, CardEngine(LENIENT), json=body | {"stream": True}).text
    last = json.loads(stream.strip().rpartition("data: ")[2])
    assert last["type"] == "image_generation.completed"
    assert last["warnings"] == ["sys_type: unknown field, ignored"]
    jobs = post(GENERATIONS, CardEngine(LENIENT), json=body, headers={"Prefer": "respond-async"})
    assert jobs.status_code == 202 and jobs.json()["warnings"] == last["warnings"]


@pytest.mark.parametrize(
    ("wrong", "param"), [({"n": 0}, "n"), ({"seed": "x"}, "seed"), ({"mask": "x"}, "mask"), ({"size": "1"}, "size")]
)
def test_a_known_field_that_is_wrong_is_refused_all_the_same(wrong: dict[str, Any], param: str) -> None:
    body = {"prompt": "a cat", "image": "data:,", "colour": "red"} | wrong
    assert error(post(EDITS, CardEngine(LENIENT), json=body))["param"] == param


# ---------------------------------------------------------------- extra_body


@pytest.mark.parametrize(
    "how",
    [
        {"json": {"prompt": "a cat", "seed": 5, "extra_body": {"size": "64x64", "seed": 5}}},
        {"json": {"prompt": "a cat", "seed": None, "extra_body": {"size": "64x64", "seed": 5}}},
        {"data": {"prompt": "a cat", "seed": "5", "extra_body": '{"size": "64x64", "seed": 5}'}},
    ],
)
def test_fields_in_extra_body_count_as_if_they_stood_beside_it(how: dict[str, Any]) -> None:
    engine = CardEngine()
    if "data" in how:
        response = post(EDITS, engine, files={"image": FILE}, **how)
    else:
        response = post(GENERATIONS, engine, **how)
    assert response.status_code == 200, response.text
    params = engine.tickets[0].params
    assert (params.seed, params.width, params.height) == (5, 64, 64)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"seed": 6}, "seed"),
        ({"prompt": "a dog"}, "prompt"),
        ([], "extra_body"),
        ("x", "extra_body"),
        ("[" * 5000, "extra_body"),
        ({"extra_body": {}}, "extra_body"),
        ({"n": "2"}, "n"),
    ],
)
def test_an_extra_body_that_contradicts_or_is_none_is_refused_by_name(extra: object, param: str) -> None:
    found = error(post(GENERATIONS, CardEngine(), json={"prompt": "a cat", "seed": 5, "extra_body": extra}))
    assert found["param"] == param


@pytest.mark.parametrize(
    ("extra", "status"),
    [({"negative_prompt": "x" * 5000}, 413), ([[]] * 500, 400), ({"image": "data:," + "x" * 5000}, 400)],
)
def test_what_is_in_extra_body_has_the_limits_of_what_is_beside_it(extra: object, status: int) -> None:
    args = ServerArgs(served_model_name="tiny", max_request_bytes=4096, max_json_bytes=1024)
    how = {"data": {"prompt": "a", "extra_body": json.dumps(extra)}}
    error(post(EDITS, CardEngine(args), **how, files={} if "image" in extra else {"image": FILE}), status)


# ---------------------------------------------------------------- clients, as they were seen on the wire

VERCEL = {"model": "tiny", "prompt": "a red apple", "n": 1}
BENCHMARK = {"model": "tiny", "prompt": "Random prompt 0", "n": 1, "size": "128x128", "response_format": "b64_json"}
CLIENTS: list[tuple[str, dict[str, Any]]] = [
    # the Vercel AI SDK (ai, @ai-sdk/openai)
    (GENERATIONS, {"json": VERCEL | {"size": "128x128"}}),
    (GENERATIONS, {"json": VERCEL | {"quality": "high", "style": "vivid", "background": "opaque", "user": "me"}}),
    (EDITS, {"data": VERCEL | {"quality": "medium", "background": "auto", "input_fidelity": "high"}}),
    # SGLang's and vLLM-Omni's serving benchmarks
    (GENERATIONS, {"json": BENCHMARK | {"num_inference_steps": 1, "seed": -1}}),
    (EDITS, {"data": {**BENCHMARK, "seed": "42", "guidance_scale": "1.0", "negative_prompt": "grey"}}),
]


@pytest.mark.parametrize(("address", "how"), CLIENTS)
def test_clients_of_gpt_image_models_get_the_files_themselves(address: str, how: dict[str, Any]) -> None:
    files = {"files": {"image": ("blob", PNG, "application/octet-stream")}} if "data" in how else {}
    response = post(address, CardEngine(ServerArgs(served_model_name="tiny")), **how, **files)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert [sorted(each) for each in answer["data"]] == [["b64_json", "seed", "timings"]]
    assert "warnings" not in answer


def test_a_field_that_a_benchmark_sends_for_one_model_of_its_own_server_is_told_and_ignored() -> None:
    how = {"data": {**BENCHMARK, "bot_task": "think"}, "files": {"image": FILE}}
    assert post(EDITS, CardEngine(LENIENT), **how).json()["warnings"] == ["bot_task: unknown field, ignored"]


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize("as_form", [False, True])
def test_a_video_takes_its_size_by_width_and_height_and_its_frames_as_other_servers_name_them(
    tmp_path: Path, as_form: bool
) -> None:
    fields = {"prompt": "a cat", "width": 64, "height": 32, "num_frames": 5, "fps": 16, "n": 1}
    fields |= {"num_outputs_per_prompt": 1, "num_inference_steps": 3, "seed": -1}
    how = {"files": {name: (None, str(value)) for name, value in fields.items()}} if as_form else {"json": fields}
    response = video(tmp_path, **how)
    assert response.status_code == 200, response.text
    made = response.json()
    assert (made["size"], made["num_frames"], made["warnings"]) == ("64x32", 5, [])
    assert made["seed"] >= 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"fps": 24}, "fps"),
        ({"fps": 0}, "fps"),
        ({"n": 2}, "n"),
        ({"num_outputs_per_prompt": 2}, "num_outputs_per_prompt"),
        ({"size": "64x64", "width": 32}, "width"),
        ({"width": 7}, "width"),
        ({"size": "7x64"}, "size"),
        ({"seconds": 4, "num_frames": 5}, "num_frames"),
    ],
)
def test_what_a_video_cannot_be_is_refused_by_the_name_that_its_client_wrote(
    tmp_path: Path, fields: dict[str, Any], param: str
) -> None:
    assert error(video(tmp_path, json={"prompt": "a cat"} | fields))["param"] == param


def test_another_rate_than_the_models_is_ignored_with_a_warning_where_the_server_is_told_so(tmp_path: Path) -> None:
    asked = {"prompt": "a cat", "fps": 24, "enable_teacache": False}
    assert video(tmp_path, extra_fields="ignore", json=asked).json()["warnings"] == [
        "enable_teacache: unknown field, ignored",
        "fps: 24 is not allowed; allowed: 16, the rate of this model's clips; ignored",
    ]


# ---------------------------------------------------------------- names


def test_a_model_is_served_under_each_of_its_names() -> None:
    args = ServerArgs(served_model_name="a, b/c,a")
    for name in ("a", "b/c"):
        response = post(GENERATIONS, FakeEngine(args=args), json={"prompt": "a cat", "model": name})
        assert response.status_code == 200
    message = error(post(GENERATIONS, FakeEngine(args=args), json={"prompt": "a cat", "model": "d"}), 404)["message"]
    assert message.endswith("served: 'a', 'b/c'")

    async def models() -> list[Any]:
        async with running(FakeEngine(args=args)) as client:
            assert (await client.get("/v1/models/b/c")).json()["id"] == "b/c"
            return (await client.get("/v1/models")).json()["data"]

    assert [model["id"] for model in asyncio.run(models())] == ["a", "b/c"]
    assert args.model_name == "a"


@pytest.mark.parametrize("names", [",", "a,", ",a", "a,,b"])
def test_a_name_that_is_none_is_refused(names: str) -> None:
    with pytest.raises(ConfigError, match="served_model_name"):
        ServerArgs(served_model_name=names)
