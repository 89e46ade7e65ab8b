"""What a Python program sees of a result, of wrong values and of an engine without settings."""

from __future__ import annotations

import asyncio
import gc
import io
from pathlib import Path

import pytest
from PIL import Image

from ditrelay.async_engine import AsyncEngine, AsyncTicket
from ditrelay.engine import Engine
from ditrelay.errors import ConfigError, EngineClosed, InvalidRequest, StartupError, fields_of_flags, settings_as_fields
from ditrelay.models.card import load_card
from ditrelay.runtime.metrics import Timings
from ditrelay.runtime.pipelines_core.media import encode_picture
from ditrelay.runtime.request import Request, RequestState, Sampling, SamplingParams, spread
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.tickets import Result, Ticket

PICTURE = Image.linear_gradient("L").resize((32, 16)).convert("RGB")
CLIP = b"\0\0\0\x18ftypmp42"


def result(media: bytes, media_type: str, frames: int = 1) -> Result:
    params = SamplingParams(prompt="a cat", seed=7, image=b"x" * 5000)
    return Result("r1", params, media, media_type, 32, 16, frames, Timings(total=1.5))


PNG = result(encode_picture(PICTURE, "png"), "image/png")
WEBP = result(encode_picture(PICTURE, "webp"), "image/webp")
MP4 = result(CLIP, "video/mp4", 9)


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("name, kind", [("y.jpg", "JPEG"), ("y.JPEG", "JPEG"), ("y.webp", "WEBP"), ("y.png", "PNG")])
@pytest.mark.parametrize("made", [PNG, WEBP])
def test_a_saved_picture_has_the_format_of_its_suffix(tmp_path: Path, made: Result, name: str, kind: str) -> None:
    path = made.save(tmp_path / "new folder" / name)
    with Image.open(path) as saved:
        assert (saved.format, saved.size) == (kind, (32, 16))
    if kind == made.media_type.partition("/")[2].upper():
        assert path.read_bytes() == made.media


def test_a_result_without_a_suffix_is_saved_as_it_is(tmp_path: Path) -> None:
    assert MP4.save(tmp_path / "clip").read_bytes() == MP4.save(tmp_path / "clip.mp4").read_bytes() == CLIP


@pytest.mark.parametrize(
    "made, name, allowed", [(PNG, "y.mp4", ".png, .jpg, .jpeg, .webp"), (PNG, "y.tiff", ".png"), (MP4, "y.png", ".mp4")]
)
def test_a_suffix_that_the_result_can_not_have_is_refused_and_nothing_is_written(
    tmp_path: Path, made: Result, name: str, allowed: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^path: .*allowed: {allowed}"):
        made.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_is_printed_of_a_result_is_one_line_without_bytes() -> None:
    assert repr(PNG) == f"<Result r1: image/png, 32x16, {len(PNG.media)} bytes, seed 7, 1.50 s>"
    assert "9 frames" in str(MP4)
    assert repr(PNG.params) == "SamplingParams(prompt='a cat', seed=7, image=<5000 bytes>, previews=0)"


def test_a_notebook_shows_pictures_and_plays_clips() -> None:
    assert PNG._repr_png_() == PNG.media and PNG._repr_html_() is None
    shown = WEBP._repr_png_()
    assert shown is not None and Image.open(io.BytesIO(shown)).format == "PNG"
    assert MP4._repr_png_() is None
    assert "<video controls" in str(MP4._repr_html_()) and "data:video/mp4;base64,AAAAGGZ0eX" in str(MP4._repr_html_())


# ---------------------------------------------------------------- keywords and settings


def test_the_typed_keywords_are_the_fields_of_the_sampling_parameters() -> None:
    assert {"prompt", *Sampling.__annotations__} == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(
    "name, value",
    [("seed", "x"), ("seed", 1.5), ("seed", True), ("num_images", "2"), ("num_images", True), ("prompt", 5)],
)
def test_a_value_of_a_wrong_type_is_refused_by_the_name_of_its_field(name: str, value: object) -> None:
    given = {"prompt": "a cat", "num_images": 1} | {name: value}
    with pytest.raises(InvalidRequest, match=f"^{name}: .*not allowed; allowed: ") as caught:
        for params in spread(**given):  # type: ignore[arg-type]
            load_card("builtin:timed").resolve(params)
    assert caught.value.param == name


def test_an_engine_needs_no_settings() -> None:
    assert Engine().args == ServerArgs() == AsyncEngine().args


@pytest.mark.parametrize(
    "flags, fields",
    [
        ("--sp-degree: 0 is not allowed", "sp_degree: 0 is not allowed"),
        ("raise it, or set --no-warmup", "raise it, or set warmup=False"),
        ("(--dist-timeout; usual 1 s)", "(dist_timeout; usual 1 s)"),
        ("a cat -- and a dog", "a cat -- and a dog"),
    ],
)
def test_settings_are_spelled_as_flags_or_as_fields(flags: str, fields: str) -> None:
    assert fields_of_flags(flags) == fields


def test_an_error_names_the_field_in_python_and_the_flag_on_the_command_line() -> None:
    with pytest.raises(ConfigError) as caught:
        ServerArgs(enable_disagg=True, num_gpus=1)
    assert str(caught.value) == "num_gpus: 1 is too few for enable_disagg; allowed: 2 or more"
    assert caught.value.on_command_line == "--num-gpus: 1 is too few for --enable-disagg; allowed: 2 or more"
    with pytest.raises(ConfigError, match="^model_path: "):
        Engine(ServerArgs(model_path="builtin:nothing"))
    with pytest.raises(StartupError, match="^startup_timeout 5 s$"), settings_as_fields():
        raise StartupError("--startup-timeout 5 s")


# ---------------------------------------------------------------- asyncio


def test_a_task_that_is_cancelled_while_it_waits_leaves_no_complaint() -> None:
    complaints: list[str] = []

    async def cancel_then_fail() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
        ticket = Ticket(Request(request_id="r", params=SamplingParams(prompt="a cat")), lambda _: None)
        waiting = asyncio.create_task(AsyncTicket(ticket).result())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        ticket.fail(EngineClosed("over"), RequestState.FAILED, 0.0)
        del ticket, waiting
        await asyncio.sleep(0.01)
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(cancel_then_fail())
    assert complaints == []
