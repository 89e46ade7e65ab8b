"""The ``openai`` package, unchanged, against a server (a process of its own, two ranks) with the built-in model."""

from __future__ import annotations

import base64
import io
import os
import queue
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
import tiny_models
from picture_samples import animated, huge, picture
from PIL import Image

STEPS = 3
EXTRA = {"seed": 7, "num_inference_steps": STEPS}
FINE = {"num_inference_steps": 8}  # of three steps the least that can be done is one, which starts from half noise
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


@contextmanager
def serving(model: str, *flags: str) -> Iterator[openai.OpenAI]:
    ranks = ["--device", "cpu", "--enable-disagg", "--num-gpus", "2", "--num-non-dit-ranks", "1"]
    command = [*COMMAND, "serve", "--model-path", model, *ranks, "--port", "0", "--api-key", KEY, "--no-warmup", *flags]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = address_of(server)
            # Retries: until the model is loaded the server answers 503, and the client waits as Retry-After tells it.
            with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=20, timeout=SECONDS) as client:
                yield client
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with serving("builtin:emoji") as client:
        client.images.generate(prompt="warm up", extra_body=EXTRA)
        yield client


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
    answer = client.images.generate(prompt="a red apple", n=2, response_format="url", extra_body=EXTRA)
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


def test_previews_of_a_stream_come_in_order_and_change_nothing(client: openai.OpenAI) -> None:
    extra = EXTRA | {"num_inference_steps": 12}
    with client.images.generate(prompt="a red apple", stream=True, partial_images=2, extra_body=extra) as stream:
        events = list(stream)
    previews = [event for event in events if event.type == "image_generation.partial_image"]
    assert 1 <= len(previews) <= 2  # one that a busy rank has no time for is left out
    assert [event.partial_image_index for event in previews] == list(range(len(previews)))
    for event in previews:
        image = opened(base64.b64decode(event.b64_json))
        assert (image.format, f"{image.width}x{image.height}", event.output_format) == ("PNG", event.size, "png")
    plain = client.images.generate(prompt="a red apple", response_format="b64_json", extra_body=extra)
    assert events[-1].b64_json == plain.data[0].b64_json


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "100x100"}, "size"),
        ({"n": 11}, "n"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
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


def edited(client: openai.OpenAI, image: object, **extra: object) -> bytes:
    answer = client.images.edit(
        image=image, prompt="a green apple", response_format="b64_json", extra_body=EXTRA | extra
    )
    assert answer.data[0].seed == 7
    return base64.b64decode(answer.data[0].b64_json)


def test_an_edit_starts_from_the_picture_by_strength(client: openai.OpenAI, tmp_path: Path) -> None:
    apple = inline(client)
    (tmp_path / "apple.png").write_bytes(apple)
    with (tmp_path / "apple.png").open("rb") as file:
        little = edited(client, file, strength=0.1, **FINE)
    much = edited(client, ("apple.png", apple), strength=1, **FINE)
    before = np.asarray(opened(apple)).astype(int)
    near, far = (np.abs(np.asarray(opened(after)).astype(int) - before).mean() for after in (little, much))
    assert near < far / 2
    assert edited(client, [apple], strength=0.1, **FINE) == little


def test_an_edit_is_byte_for_byte_that_of_the_command_line(client: openai.OpenAI, tmp_path: Path) -> None:
    apple = tmp_path / "apple.png"
    apple.write_bytes(inline(client))
    flags = ["--seed", "7", "--num-inference-steps", str(STEPS), "--model-path", "builtin:emoji", "--device", "cpu"]
    flags += ["--image", str(apple), "--strength", "0.4", "--output", "green.png"]
    command = [*COMMAND, "generate", "a green apple", *flags]
    subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, check=True, capture_output=True, timeout=SECONDS)
    assert edited(client, apple, strength=0.4) == (tmp_path / "green.png").read_bytes()


def test_a_streamed_edit_ends_with_the_picture(client: openai.OpenAI) -> None:
    apple = inline(client)
    extra = EXTRA | {"strength": 0.4}
    asked = {"image": apple, "prompt": "a green apple", "stream": True, "partial_images": 2, "extra_body": extra}
    with client.images.edit(**asked) as stream:
        *before, last = list(stream)
    # Previews are made where a rank has the time.
    assert (
        "image_edit.progress" in {each.type for each in before} <= {"image_edit.progress", "image_edit.partial_image"}
    )
    assert last.type == "image_edit.completed" and last.output_format == "png"
    assert base64.b64decode(last.b64_json) == edited(client, apple, strength=0.4)


@pytest.mark.parametrize(
    ("image", "fields", "param"),
    [
        (b"no picture", {}, "image"),
        (animated("PNG"), {}, "image"),
        (huge(), {}, "image"),
        (picture()[:60] + bytes(40) + picture()[100:], {}, "image"),
        ([picture(), picture()], {}, "image"),
        (picture(), {"mask": picture()}, "mask"),
        (picture(), {"extra_body": {"strength": 2}}, "strength"),
    ],
)
def test_a_bad_edit_is_the_packages_own_error_and_names_the_field(
    client: openai.OpenAI, image: object, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=image, prompt="a green apple", **fields)
    assert caught.value.param == param
    assert "allowed" in caught.value.message or "leave it out" in caught.value.message


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_video_starts_from_an_input_reference(tmp_path: Path) -> None:
    model = str(tiny_models.build("wan-i2v", tmp_path))
    size = {"size": "64x32", "extra_body": {"num_frames": 5, "num_inference_steps": 2, "seed": 7}}
    with serving(model, "--output-dir", str(tmp_path / "videos")) as client:
        files = []
        for reference in (picture(64, 32), ("x.jpg", picture(64, 32, "JPEG"), "image/jpeg")):
            video = client.videos.create_and_poll(prompt="a boat", input_reference=reference, **size)
            assert (video.status, video.size, video.error) == ("completed", "64x32", None)
            files.append(client.videos.download_content(video.id).read())
        assert files[0][4:8] == b"ftyp" and files[0] != files[1]
        for bad in (b"no picture", animated("WEBP"), huge(), picture()[:-20]):
            with pytest.raises(openai.BadRequestError) as caught:
                client.videos.create(prompt="a boat", input_reference=bad, **size)
            assert caught.value.param == "input_reference"


def test_another_model_is_not_found_and_a_wrong_key_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a red apple", model="gpt-image-1")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").images.generate(prompt="a red apple")
