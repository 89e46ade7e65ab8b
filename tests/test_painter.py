"""Previews as pictures: by the VAE where that is quick, else by colours that were learnt; one answer in any case."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from preview_rig import SECONDS, as_state, picture, request, wait_until

from ditrelay.models.card import load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.previews import latent_grid
from ditrelay.runtime.payloads import State, StateValue
from ditrelay.runtime.pipelines_core.executors import painter as painter_module
from ditrelay.runtime.pipelines_core.executors.lane import Lane
from ditrelay.runtime.pipelines_core.executors.painter import LONGER_SIDE, LearningDecoder, Painter
from ditrelay.runtime.pipelines_core.executors.previews import PreviewTaker, Shot, SpoolOutlet
from ditrelay.runtime.pipelines_core.executors.progress import HostProgress
from ditrelay.runtime.pipelines_core.executors.state_files import to_host
from ditrelay.runtime.preview_messages import Previewed
from ditrelay.runtime.spool import Spool
from ditrelay.runtime.topology import COLOCATED


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(str(tmp_path)).make()


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


class FakeVae:
    """Makes what ``picture`` says a VAE makes; ``error``: raised instead."""

    def __init__(self) -> None:
        self.decoded = 0
        self.error: Exception | None = None

    def decode(self, requests: object, state: State, give: object = None) -> list[np.ndarray]:
        self.decoded += 1
        if self.error is not None:
            raise self.error
        grid = latent_grid(state)
        assert grid is not None
        colours = np.rint(200 * grid.numpy()[..., [2, 0, 1]] + 20).astype(np.uint8)
        return [np.repeat(np.repeat(colours, 4, axis=0), 4, axis=1)[None]]


class Easel:
    """A painter, its VAE and lane, and what it says."""

    def __init__(self, spool: Spool) -> None:
        self.vae, self.spool = FakeVae(), spool
        self.said: list[Previewed] = []
        self.lane = Lane("test", torch.device("cpu"))
        self.painter = Painter(5, self.vae, self.lane, spool, self.said.append)  # type: ignore[arg-type]
        self.decoder = LearningDecoder(self.vae, self.painter)

    def shoot(self, grid: torch.Tensor, side: int = 16) -> None:
        SpoolOutlet(0, self.spool, lambda event: None).put(Shot(request(side=side), 3, 8, as_state(grid)))

    def paint(self, side: int = 16, spare: float = 5.0) -> Previewed:
        """What comes of the shot in the spool."""
        before = len(self.said)
        self.painter.make(request(side=side), spare)
        wait_until(lambda: len(self.said) > before)
        assert len(self.said) == before + 1
        return self.said[-1]


@pytest.fixture
def easel(spool: Spool) -> Iterator[Easel]:
    easel = Easel(spool)
    yield easel
    easel.lane.close(SECONDS)


def pixels_of(answer: Previewed) -> np.ndarray:
    assert answer.jpeg is not None
    image = Image.open(io.BytesIO(answer.jpeg))
    assert image.format == "JPEG"
    return np.asarray(image).astype(int)


def test_before_the_first_decode_a_preview_comes_to_nothing(easel: Easel) -> None:
    easel.shoot(picture(1)[0])
    answer = easel.paint()
    assert (answer.rank, answer.request_id, answer.jpeg) == (5, "r", None)
    assert easel.vae.decoded == 0


def test_without_a_shot_a_preview_comes_to_nothing(easel: Easel) -> None:
    assert easel.paint().jpeg is None


def test_a_shot_that_can_not_be_read_is_answered_whatever_it_was(easel: Easel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Shot:
        raise AttributeError("no")

    easel.decoder.decode([request()], as_state(picture(1)[0]))
    with monkeypatch.context() as broken_spool:
        broken_spool.setattr(painter_module, "take_shot", broken)
        assert easel.paint().jpeg is None
    easel.shoot(picture(2)[0])
    assert easel.paint().jpeg is not None


def test_a_size_that_is_decoded_quickly_is_decoded(easel: Easel) -> None:
    easel.decoder.decode([request()], as_state(picture(1)[0]))
    grid, pixels = picture(2)
    easel.shoot(grid)
    answer = easel.paint()
    assert easel.vae.decoded == 2 and (answer.step, answer.total) == (3, 8)
    assert np.abs(pixels_of(answer) - pixels).mean() < 12


def test_a_size_that_is_decoded_slowly_or_was_never_is_mapped_to_colours(
    easel: Easel, monkeypatch: pytest.MonkeyPatch
) -> None:
    easel.decoder.decode([request()], as_state(picture(1)[0]))
    grid, pixels = picture(2, side=6)
    easel.shoot(grid, side=24)
    answer = easel.paint(side=24)
    assert easel.vae.decoded == 1
    assert np.abs(pixels_of(answer) - pixels[::2, ::2]).mean() < 12
    easel.shoot(picture(2)[0])
    assert easel.paint(spare=0.0).jpeg is not None and easel.vae.decoded == 1, "other work is expected"
    monkeypatch.setattr(painter_module, "QUICK_SECONDS", 0.0)
    easel.shoot(picture(2)[0])
    assert easel.paint().jpeg is not None and easel.vae.decoded == 1


def test_a_decode_that_fails_is_answered_and_the_lane_lives_on(easel: Easel) -> None:
    easel.decoder.decode([request()], as_state(picture(1)[0]))
    for error in (RuntimeError("no"), torch.OutOfMemoryError("no"), AttributeError("no")):
        easel.vae.error = error
        easel.shoot(picture(2)[0])
        assert easel.paint().jpeg is None
    easel.vae.error = None
    easel.shoot(picture(2)[0])
    assert easel.paint().jpeg is not None


def test_a_preview_comes_after_everything_on_the_lane_and_is_not_decoded_when_that_took_long(easel: Easel) -> None:
    easel.decoder.decode([request()], as_state(picture(1)[0]))
    go, order = threading.Event(), []
    easel.lane.put(2, lambda: order.append(go.wait(SECONDS)))
    easel.shoot(picture(2)[0])
    easel.painter.make(request(), 0.3)
    wait_until(lambda: not easel.spool.preview("r").exists())
    wait_until(lambda: easel.lane._jobs.qsize() == 1)
    easel.lane.put(2, lambda: order.append(len(easel.said)))
    time.sleep(0.4)
    go.set()
    wait_until(lambda: easel.said)
    assert order == [True, 0] and easel.said[0].jpeg is not None
    assert easel.vae.decoded == 1


def test_a_large_picture_gets_a_small_file(easel: Easel) -> None:
    grid, _ = picture(1, side=96)
    easel.decoder.decode([request(side=384)], as_state(grid))
    easel.shoot(grid, side=384)
    answer = easel.paint(side=384)
    assert pixels_of(answer).shape == (LONGER_SIDE, LONGER_SIDE, 3)


def test_a_rank_that_denoises_and_decodes_paints_without_its_lane_and_without_a_file(easel: Easel) -> None:
    taker = PreviewTaker(easel.painter)
    grid, _ = picture(2)
    taker.take(request(), 3, 8, lambda: as_state(grid), HostProgress())
    taker.forget(request())
    easel.decoder.decode([request()], as_state(picture(1)[0]))
    easel.painter._thread.submit(lambda: None).result(SECONDS)
    taker.take(request(), 4, 8, lambda: as_state(grid), HostProgress())
    taker._thread.shutdown()
    shown = [(answer.step, answer.jpeg is not None) for answer in easel.said]
    assert shown == [(3, False), (4, True)], "before the first decode there was nothing to show"
    assert easel.vae.decoded == 1 and list(easel.spool.folder.iterdir()) == []


def test_colours_of_a_clip_are_learnt_from_the_part_in_the_middle(easel: Easel) -> None:
    grid, pixels = picture(1)
    clip = torch.stack([torch.zeros_like(grid), grid, torch.zeros_like(grid)])
    state: State = {"latents": StateValue(clip.permute(3, 0, 1, 2)[None])}
    given: list[object] = []

    class ClipVae:
        def decode(self, requests: object, state: State, give: Callable[[object], None]) -> list[np.ndarray]:
            for frames in (
                np.zeros((1, 16, 16, 3), np.uint8),
                np.stack([pixels] * 4),
                np.zeros((4, 16, 16, 3), np.uint8),
            ):
                give(lambda frames=frames: frames)
            return []

    LearningDecoder(ClipVae(), easel.painter).decode([request()], state, given.append)  # type: ignore[arg-type]
    assert len(given) == 3
    easel.shoot(picture(2)[0])
    assert np.abs(pixels_of(easel.paint()) - picture(2)[1][::2, ::2]).mean() < 12


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_a_clip_that_is_denoised_is_shown_as_its_family_decodes_it(family: str, tiny_root: Path, spool: Spool) -> None:
    """Wan's VAE gives the frames in parts, LTX's all at once."""
    card = load_card(str(tiny_models.build(family, tiny_root)))
    adapter = load_adapter(LoadSpec(card=card, roles=COLOCATED))
    wanted = tiny_models.small_request(card, previews=10)
    session = adapter.begin([wanted], adapter.encode([wanted]))
    adapter.step(session)
    shot = Shot(wanted, 1, 3, to_host(adapter.preview(session)))
    while adapter.step(session):
        pass
    said: list[Previewed] = []
    lane = Lane("test", torch.device("cpu"))
    painter = Painter(5, adapter, lane, spool, said.append)  # type: ignore[arg-type]
    with torch.no_grad():
        LearningDecoder(adapter, painter).decode([wanted], adapter.finish(session), lambda part: None)
    painter._thread.submit(painter.put, shot).result(SECONDS)
    lane.close(SECONDS)
    (answer,) = said
    height, width, _ = pixels_of(answer).shape
    assert height * (wanted.params.width or 0) == width * (wanted.params.height or 0)


def test_pixels_that_can_not_be_drawn_are_answered(easel: Easel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(pixels: object) -> bytes:
        raise RuntimeError("no")

    easel.decoder.decode([request()], as_state(picture(1)[0]))
    monkeypatch.setattr(painter_module, "to_jpeg", broken)
    for spare in (0.0, 5.0):
        easel.shoot(picture(2)[0])
        assert easel.paint(spare=spare).jpeg is None
