"""Clips whose file is written while their frames come: the same bytes, sooner; and what ends one early."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_models
import torch

from ditrelay.models.card import load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.video_frames import GivenAway, gives_frames
from ditrelay.runtime.pipelines_core.clips import ClipEncoders, ClipFile
from ditrelay.runtime.pipelines_core.media import encode_clip, encode_media
from ditrelay.runtime.pipelines_core.pipeline import Batch, StageCancelled, Uncontrolled
from ditrelay.runtime.pipelines_core.stages.decode import DecodeStage
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.topology import COLOCATED

FRAMES = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
REQUEST = Request(request_id="r", params=SamplingParams(prompt="x"))
SECONDS = 20.0


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


@pytest.fixture(autouse=True)
def no_encoder_stays() -> Iterator[None]:
    yield
    encoders_end()


def encoders_end() -> None:
    until = time.monotonic() + SECONDS
    while any(thread.name == "clip-encoder" for thread in threading.enumerate()):
        assert time.monotonic() < until, "a clip's encoder was left over"
        time.sleep(0.01)


class Parts:
    """An adapter whose decode gives ``FRAMES`` in parts, and calls ``between`` after each."""

    def __init__(self, between: Callable[[int], None] = lambda part: None, frames: Any = FRAMES) -> None:
        self.between = between
        self.parts = [frames[:1], frames[1:5], frames[5:]]

    def decode(self, requests: Sequence[Request], state: Any, give: Any = None) -> list[Any]:
        for number, part in enumerate(self.parts):
            give(lambda part=part: part)
            self.between(number)
        return []


def whole() -> bytes:
    return encode_media(FRAMES, fps=16).data


def decoded(stage: DecodeStage, control: Any = None) -> bytes:
    batch = Batch((REQUEST,))
    stage.run(batch, control or Uncontrolled())
    stage.finish(batch)
    assert (batch.clip, batch.frames) == (None, ())
    return batch.media[0].data


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("cuts", [[], [1, 5], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_a_clip_has_the_same_bytes_however_its_frames_are_cut(cuts: list[int]) -> None:
    media = encode_clip(iter(np.split(FRAMES, cuts)), 16)
    assert media.data == whole()
    assert (media.media_type, media.width, media.height, media.num_frames) == ("video/mp4", 48, 32, 9)


def test_a_clip_has_the_same_bytes_whatever_was_in_memory_before() -> None:
    moving = np.stack([np.roll(np.mgrid[0:96, 0:96].sum(0) * 3 % 256, 5 * i, 1) for i in range(9)])
    frames, noise = np.stack([moving] * 3, axis=-1).astype(np.uint8), np.random.default_rng(0)
    files = set()
    for _ in range(40):
        files.add(encode_clip([frames], 16).data)
        noise.bytes(int(noise.integers(1_000, 300_000)))
    assert len(files) == 1


def test_the_stage_writes_the_same_file_from_parts_as_from_all_frames() -> None:
    assert decoded(DecodeStage(Parts(), 16)) == whole()  # type: ignore[arg-type]


def test_an_adapter_that_gives_no_parts_makes_the_same_file() -> None:
    class Whole(Parts):
        def decode(self, requests: Sequence[Request], state: Any, give: Any = None) -> list[Any]:
            return [FRAMES]

    assert decoded(DecodeStage(Whole(), 16)) == whole()  # type: ignore[arg-type]


def test_the_first_frames_are_encoded_while_later_ones_are_still_made() -> None:
    encoding = threading.Event()

    def frames() -> Any:
        encoding.set()
        return FRAMES[:1]

    adapter = Parts(lambda number: None if number else waits(encoding))
    adapter.parts = []
    adapter.decode = lambda requests, state, give: (give(frames), waits(encoding), give(lambda: FRAMES[1:]), [])[-1]  # type: ignore[method-assign]
    assert decoded(DecodeStage(adapter, 16)) == whole()  # type: ignore[arg-type]


def waits(event: threading.Event) -> None:
    assert event.wait(SECONDS), "the frames that were given were not looked at before the decode ended"


# ---------------------------------------------------------------- Wan's VAE


def test_wan_gives_each_latent_frame_and_the_pixels_are_those_of_the_stock_vae(tiny_root: Path) -> None:
    vae = tiny_models.BUILDERS["wan"]().vae.eval()
    check_parts(vae, torch.randn(1, 16, 4, 4, 6), sizes=[1, 4, 4, 4])


def test_a_vae_that_puts_patches_together_gives_the_same_pixels_too() -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    ).eval()
    check_parts(vae, torch.randn(1, 8, 3, 2, 2), sizes=[1, 4, 4])


@torch.no_grad()
def check_parts(vae: Any, latents: torch.Tensor, sizes: list[int]) -> None:
    parts: list[Any] = []
    GivenAway(vae, lambda part: (part / 2 + 0.5).transpose(1, 2), parts.append).decode(latents)
    frames = [part() for part in parts]
    stock = vae.decode(latents, return_dict=False)[0]
    expected = ((stock / 2 + 0.5) * 255).round().to(torch.uint8)[0].permute(1, 2, 3, 0).numpy()
    assert [len(part) for part in frames] == sizes
    assert np.ptp(expected) > 50
    np.testing.assert_array_equal(np.concatenate(frames), expected)
    assert all(kept is None for kept in vae._feat_map)


def test_only_vaes_that_go_frame_by_frame_give_parts() -> None:
    assert not gives_frames(tiny_models.BUILDERS["ltx"]().vae)
    vae = tiny_models.BUILDERS["wan"]().vae
    assert gives_frames(vae)
    vae.enable_tiling()  # tiles are put together from all frames
    assert not gives_frames(vae)


@pytest.fixture(scope="module")
def wan(tiny_root: Path) -> tuple[Any, Request, Any]:
    """An adapter, a request of nine frames, and its latents."""
    card = load_card(str(tiny_models.build("wan", tiny_root)))
    adapter = load_adapter(LoadSpec(card=card, roles=COLOCATED))
    request = tiny_models.small_request(card, num_inference_steps=1)
    with torch.no_grad():
        session = adapter.begin([request], adapter.encode([request]))
        while adapter.step(session):
            pass
        return adapter, request, adapter.finish(session)


@torch.no_grad()
def run(wan: tuple[Any, Request, Any], control: Any = None) -> bytes:
    adapter, request, latents = wan
    batch, stage = Batch((request,), state=dict(latents)), DecodeStage(adapter, 16)
    stage.run(batch, control or Uncontrolled())
    stage.finish(batch)
    return batch.media[0].data


@torch.no_grad()
def test_the_file_of_a_wan_clip_is_the_same_as_from_all_its_pixels_at_once(wan: tuple[Any, Request, Any]) -> None:
    adapter, request, latents = wan
    [frames] = adapter.decode([request], dict(latents))
    assert len(frames) == 9
    assert run(wan) == encode_media(frames, fps=16).data


def test_a_clip_that_was_cancelled_half_way_leaves_nothing_to_the_next(wan: tuple[Any, Request, Any]) -> None:
    with pytest.raises(StageCancelled):
        run(wan, CancelAfter(2))
    assert run(wan) == run(wan)


# ---------------------------------------------------------------- ends


class CancelAfter(Uncontrolled):
    def __init__(self, parts: int) -> None:
        self._left = parts

    def before_step(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise StageCancelled


def test_a_cancelled_clip_stops_between_two_parts_and_frees_its_encoder() -> None:
    stage, seen = DecodeStage(Parts(lambda number: seen.append(number)), 16, timeout=SECONDS), []  # type: ignore[arg-type]
    for _ in range(3):
        seen.clear()
        with pytest.raises(StageCancelled):
            decoded(stage, CancelAfter(2))
        assert seen == [0, 1]


def test_a_decode_that_fails_half_way_frees_its_encoder() -> None:
    def fail(number: int) -> None:
        raise RuntimeError("the device is lost")

    stage = DecodeStage(Parts(fail), 16, timeout=SECONDS)  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(RuntimeError, match="the device is lost"):
            decoded(stage)


def test_what_can_not_be_encoded_fails_at_the_end_and_frees_its_encoder() -> None:
    stage = DecodeStage(Parts(frames=FRAMES[:, :31]), 16, timeout=SECONDS)  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(Exception, match="avcodec_open2|Invalid argument|external library"):
            decoded(stage)


def test_a_device_that_fails_under_the_copy_of_a_frame_fails_the_clip() -> None:
    def lost() -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    clip = ClipEncoders(16, SECONDS).open()
    clip.add(lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        clip.finish()


def test_a_clip_without_frames_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs a frame"):
        ClipEncoders(16, SECONDS).open().finish()


def test_one_clip_more_than_there_are_encoders_waits_until_one_ends() -> None:
    encoders = ClipEncoders(16, SECONDS, limit=2)
    first, second = encoders.open(), encoders.open()
    opened: list[ClipFile] = []
    waiting = threading.Thread(target=lambda: opened.append(encoders.open()))
    waiting.start()
    waiting.join(0.1)
    assert opened == []
    first.add(lambda: FRAMES)
    assert first.finish().data == whole()
    waiting.join(SECONDS)
    second.abandon()
    opened[0].abandon()


def test_a_clip_whose_frames_do_not_come_ends() -> None:
    clip = ClipEncoders(16, 0.05).open()
    encoders_end()
    with pytest.raises(RuntimeError, match=r"no frame of the video came within 0\.05 s"):
        clip.finish()


def test_a_frame_that_never_arrives_holds_up_nobody_for_ever() -> None:
    encoders, go_on = ClipEncoders(16, 0.05, limit=1), threading.Event()
    slow = encoders.open()
    slow.add(lambda: (go_on.wait(SECONDS), FRAMES)[1])
    with pytest.raises(RuntimeError, match=r"none of this rank's 1 video encoders came free within 0\.05 s"):
        encoders.open()
    with pytest.raises(RuntimeError, match=r"the video was not encoded within 0\.05 s"):
        slow.finish()
    go_on.set()
