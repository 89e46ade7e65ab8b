"""A clip on a GPU: the same file as from all of its frames, and little left to do after the last one."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from model_configs import write_folder
from rig import DEVICE, ON_GPUS, Record, needs

from ditrelay.models.card import load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.runtime.payloads import State, StateValue
from ditrelay.runtime.pipelines_core.media import encode_media
from ditrelay.runtime.pipelines_core.pipeline import Batch, Uncontrolled
from ditrelay.runtime.pipelines_core.stages.decode import DecodeStage
from ditrelay.runtime.request import Request

pytestmark = needs(1)


def decoder(folder: Path, **options: Any) -> Any:
    card = load_card(str(folder), options.get("load_format", "auto"))
    return load_adapter(LoadSpec(card, frozenset({"decode"}), device=DEVICE, dtype="bfloat16", **options))


def latents(frames: int, height: int, width: int) -> State:
    """Noise for a clip of so many latent frames."""
    noise = torch.randn(1, 16, frames, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    return {"latents": StateValue(noise.to(DEVICE))}


def settle() -> float:
    if ON_GPUS:
        torch.cuda.current_stream().synchronize()
    return time.monotonic()


@torch.no_grad()
def in_parts(stage: DecodeStage, request: Request, state: State) -> tuple[bytes, float, float]:
    """The file, the seconds until the device had decoded, and those until the file was there."""
    batch, began = Batch((request,), state=dict(state)), settle()
    stage.run(batch, Uncontrolled())
    decoded = settle()
    stage.finish(batch)
    return batch.media[0].data, decoded - began, time.monotonic() - began


@torch.no_grad()
def at_once(adapter: Any, request: Request, state: State) -> tuple[bytes, float, float]:
    began = settle()
    [frames] = adapter.decode([request], dict(state))
    decoded = settle()
    return encode_media(frames, fps=16).data, decoded - began, time.monotonic() - began


@pytest.mark.parametrize("family", ["wan", "wan-i2v"])
def test_a_clip_has_the_same_file_from_its_parts_as_from_all_frames(family: str, tmp_path: Path) -> None:
    adapter = decoder(tiny_models.build(family, tmp_path))
    request = tiny_models.small_request(load_card(str(tmp_path / family)))
    state = latents(5, 64, 96)
    assert in_parts(DecodeStage(adapter, 16), request, state)[0] == at_once(adapter, request, state)[0]


@pytest.mark.skipif(not ON_GPUS, reason="the VAE at its real size takes minutes on a CPU")
def test_what_is_left_after_the_last_frame_is_short(tmp_path: Path, record_property: Record) -> None:
    folder = write_folder("wan2.1-1.3b", tmp_path / "wan")
    adapter = decoder(folder, load_format="dummy")
    request = tiny_models.small_request(load_card(str(folder), "dummy"))
    state, stage = latents(21, 480, 832), DecodeStage(adapter, 16)
    for run in (partial(in_parts, stage), partial(at_once, adapter)):
        run(request, state)  # the first run chooses kernels and loads them
    parts, whole = in_parts(stage, request, state), at_once(adapter, request, state)
    assert parts[0] == whole[0]
    for name, (_, decoded, done) in {"in parts": parts, "at once": whole}.items():
        record_property(f"81 frames of 832x480 {name}", f"decode {decoded:.2f} s, file {done - decoded:.2f} s later")
    assert parts[2] - parts[1] < whole[2] - whole[1]
