"""The ``openai`` package, unchanged, against a server (a process of its own, two ranks) with the built-in model."""

from __future__ import annotations

import base64
import io
import os
import queue
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from PIL import Image

STEPS = 3
EXTRA = {"seed": 7, "num_inference_steps": STEPS}
SECONDS = 120.0
COMMAND = [sys.executable, "-m", "ditrelay"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
KEY = "a key of the tests"


def address_of(server: subprocess.Popen[str]) -> str:
    """Where it listens, as it says in its log, which is read to its end so that the server can go on writing."""
    lines: queue.Queue[str] = queue.Queue()
    assert server.stderr is not None
    threading.Thread(target=lambda log: [lines.put(line) for line in log], args=(server.stderr,), daemon=True).start()
    while True:
        line = lines.get(timeout=SECONDS)
        if "Listening on " in line:
            return line.split("Listening on ")[1].strip()


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    ranks = ["--device", "cpu", "--enable-disagg", "--num-gpus", "2", "--num-non-dit-ranks", "1"]
    flags = ["--model-path", "builtin:emoji", *ranks, "--port", "0", "--api-key", KEY, "--no-warmup"]
    with subprocess.Popen([*COMMAND, "serve", *flags], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = address_of(server)
            # Retries: until the model is loaded the server answers 503, and the client waits as Retry-After tells it.
            with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=20, timeout=SECONDS) as client:
                client.images.generate(prompt="warm up", extra_body=EXTRA)
                yield client
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def inline(client: openai.OpenAI, **fields: object) -> bytes:
    answer = client.images.generate(prompt="a red apple", response_format="b64_json", extra_body=EXTRA, **fields)
    return base64.b64decode(answer.data[0].b64_json)


@pytest.mark.parametrize(("kind", "size"), [("png", "128x128"), ("jpeg", "64x128"), ("webp", "128x64")])
def test_pictures_of_each_format_and_size(client: openai.OpenAI, kind: str, size: str) -> None:
    answer = client.images.generate(
        prompt="a red apple", output_format=kind, size=size, response_format="b64_json", user="me", extra_body=EXTRA
    )
    assert (answer.output_format, answer.size) == (kind, size)
    [picture] = answer.data
    image = opened(base64.b64decode(picture.b64_json))
    assert (image.format, f"{image.width}x{image.height}") == (kind.upper(), size)
    assert picture.seed == 7  # an extension: the package hands fields on that it does not know


def test_less_quality_is_a_smaller_file(client: openai.OpenAI) -> None:
    fine, coarse = (inline(client, output_format="jpeg", output_compression=quality) for quality in (100, 20))
    assert len(coarse) < len(fine) / 2


def test_n_pictures_by_address_are_those_of_their_seeds_and_need_no_key(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red apple", n=2, extra_body=EXTRA)
    files = [urllib.request.urlopen(picture.url, timeout=SECONDS).read() for picture in answer.data]
    assert [picture.seed for picture in answer.data] == [7, 8]
    assert files[0] == inline(client) != files[1]


def test_a_picture_is_byte_for_byte_that_of_the_command_line(client: openai.OpenAI, tmp_path: Path) -> None:
    flags = ["--seed", "7", "--num-inference-steps", str(STEPS), "--model-path", "builtin:emoji", "--device", "cpu"]
    command = [*COMMAND, "generate", "a red apple", *flags, "--output", "apple.png"]
    subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, check=True, capture_output=True, timeout=SECONDS)
    assert inline(client) == (tmp_path / "apple.png").read_bytes()


def test_a_stream_tells_progress_and_ends_with_the_picture(client: openai.OpenAI) -> None:
    with client.images.generate(prompt="a red apple", stream=True, partial_images=0, extra_body=EXTRA) as stream:
        events = list(stream)
    *progress, last = events
    assert {event.type for event in progress} == {"image_generation.progress"}
    steps = [event.step for event in progress if event.state == "denoising"]
    assert steps == sorted(steps) and steps[-1] == STEPS
    assert last.type == "image_generation.completed" and last.usage.total_tokens == 0
    assert base64.b64decode(last.b64_json) == inline(client)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "100x100"}, "size"),
        ({"n": 11}, "n"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"stream": True, "partial_images": 1}, "partial_images"),
        ({"stream": True, "size": "100x100"}, "size"),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
    ],
)
def test_a_bad_field_is_the_packages_own_error_and_names_it(
    client: openai.OpenAI, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a red apple", **fields)
    assert caught.value.param == param
    assert "allowed" in caught.value.message or "should be" in caught.value.message


def test_another_model_is_not_found_and_a_wrong_key_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a red apple", model="gpt-image-1")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").images.generate(prompt="a red apple")
