"""Previews with real ranks: on GPUs, or over gloo with ``DITRELAY_TEST_DEVICE=cpu`` (see rig.py)."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from rig import BACKENDS, SECONDS, needs, pixels, settings

from ditrelay import Engine, SamplingParams
from ditrelay.runtime.tickets import Ticket

EMOJI = "builtin:emoji"


def submit(engine: Engine, seed: int, previews: int) -> Ticket:
    return engine.submit(SamplingParams(prompt="a red apple", seed=seed, previews=previews, num_inference_steps=24))


def previews_of(ticket: Ticket) -> list[tuple[int, bytes]]:
    return [(progress.step, progress.preview) for progress in ticket.events() if progress.preview is not None]


def likeness(file: bytes, final: np.ndarray) -> float:
    image = Image.open(io.BytesIO(file))
    small = Image.fromarray(final.astype(np.uint8)).resize(image.size, Image.Resampling.BOX)
    return float(np.corrcoef(np.asarray(image).ravel(), np.asarray(small).ravel())[0, 1])


def check(engine: Engine) -> None:
    plain = [submit(engine, seed, 0).result(SECONDS).media for seed in range(4)]
    tickets = [submit(engine, seed, 6) for seed in range(4)]
    results = [ticket.result(SECONDS) for ticket in tickets]
    assert [result.media for result in results] == plain
    shown = [previews_of(ticket) for ticket in tickets]
    assert sum(len(each) for each in shown) >= 4
    for result, previews in zip(results, shown, strict=True):
        steps = [step for step, _ in previews]
        assert steps == sorted(set(steps))
        assert all(likeness(file, pixels(result)) > 0.9 for step, file in previews if step > 16)
    assert engine._controller is not None
    assert not list(engine._controller._spool.folder.glob("*.preview*"))


@needs(2)
@pytest.mark.parametrize("backend", BACKENDS)
def test_previews_of_a_dit_rank_are_painted_by_the_rank_that_decodes(backend: str) -> None:
    with Engine(settings(model_path=EMOJI, warmup=True, transfer_backend=backend)) as engine:
        check(engine)


@needs(1)
def test_a_rank_that_does_everything_paints_its_own() -> None:
    with Engine(settings(model_path=EMOJI, warmup=True, enable_disagg=False, num_gpus=1)) as engine:
        check(engine)
