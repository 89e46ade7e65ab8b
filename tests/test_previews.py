"""Previews: what the latents of a denoise will be, what they look like without a VAE, who takes and who paints them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from noisy_schedulers import NO_SHIFT, drawing
from preview_rig import SECONDS, as_state, picture, request, wait_until

from ditrelay.errors import CodecError, InvalidRequest
from ditrelay.models.card import load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.previews import LESSONS, ColourMap, finished, latent_grid, middle_of
from ditrelay.runtime.messages import WorkerEvent
from ditrelay.runtime.payloads import State, StateValue
from ditrelay.runtime.pipelines_core.executors.previews import PreviewTaker, Shot, SpoolOutlet, is_due, take_shot
from ditrelay.runtime.pipelines_core.executors.progress import HostProgress, Reached
from ditrelay.runtime.preview_messages import PreviewTaken
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.spool import Spool
from ditrelay.runtime.topology import COLOCATED

FAMILIES = sorted(set(tiny_models.BUILDERS) - {"cogvideox"})
STEPS = 6


# ---------------------------------------------------------------- the latents


def test_a_straight_way_is_seen_to_its_end_from_any_place_on_it() -> None:
    end, noise = torch.randn(2, 1, 4, 3, 3)
    sigmas = torch.tensor([1.0, 0.8, 0.3, 0.0])
    for index, sigma in enumerate(sigmas):
        scheduler, scope = SimpleNamespace(sigmas=sigmas, step_index=index + 1), SimpleNamespace(noise_pred=noise - end)
        assert torch.allclose(finished(sigma * noise + (1 - sigma) * end, scope, scheduler), end, atol=1e-5)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


@pytest.mark.parametrize("family", FAMILIES)
def test_previews_come_nearer_to_what_decode_gets_and_change_none_of_it(family: str, tiny_root: Path) -> None:
    card = load_card(str(tiny_models.build(family, tiny_root)))
    adapter = load_adapter(LoadSpec(card=card, roles=COLOCATED))
    plain = tiny_models.small_request(card, num_inference_steps=STEPS)
    wanted = tiny_models.small_request(card, num_inference_steps=STEPS, previews=10)
    conditioning = adapter.encode([plain])
    session, other = adapter.begin([wanted], conditioning), adapter.begin([plain], conditioning)
    shown: list[State] = []
    while adapter.step(session):
        adapter.step(other)
        shown.append(adapter.preview(session))
    adapter.step(other)
    made, expected = adapter.finish(session), adapter.finish(other)
    assert torch.equal(made["latents"].value, expected["latents"].value)
    assert all(state.keys() == made.keys() for state in shown)
    grid = latent_grid(made)
    assert grid is not None and grid.shape[0] == grid.shape[1]
    ways_off = []
    for state in shown:
        latents = state["latents"].value
        assert isinstance(latents, torch.Tensor) and (latents.ndim == 4 or latents.shape[2] == 1)
        seen = latent_grid(state)
        assert seen is not None
        ways_off.append(float((seen - grid).norm()))
    assert ways_off[-1] == min(ways_off) < 0.6 * max(ways_off)
    if card.media == "image":
        (seen_pixels,), (pixels,) = adapter.decode([wanted], shown[-1]), adapter.decode([wanted], made)
        assert seen_pixels.shape == pixels.shape


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_a_denoise_that_goes_on_elsewhere_shows_there_what_it_would_have_shown_here(
    family: str, tiny_root: Path
) -> None:
    card = load_card(str(tiny_models.build(family, tiny_root)))
    adapter = load_adapter(LoadSpec(card=card, roles=COLOCATED))
    wanted = tiny_models.small_request(card, num_inference_steps=STEPS, previews=10)
    conditioning = adapter.encode([wanted])
    here, elsewhere = adapter.begin([wanted], conditioning), adapter.begin([wanted], conditioning)
    with pytest.raises(ValueError, match="no step"):
        adapter.preview(here)
    for _ in range(3):
        adapter.step(here)
    adapter.restore(elsewhere, adapter.capture(here))
    for session in (here, elsewhere):
        adapter.step(session)
    shown, there = (latent_grid(adapter.preview(session)) for session in (here, elsewhere))
    assert shown is not None and there is not None and torch.equal(shown, there)


ODD = ("FlowMatchHeunDiscrete", *NO_SHIFT)


@pytest.mark.parametrize("scheduler", ODD)
def test_what_the_model_sees_is_shown_however_the_scheduler_goes_on_from_there(scheduler: str, tiny_root: Path) -> None:
    """Asked twice a step (Heun), stepping with earlier answers, or putting new noise on the picture."""
    folder = tiny_models.build("sd3", tiny_root)
    card = load_card(str(folder))
    adapter: Any = load_adapter(LoadSpec(card=card, roles=COLOCATED))
    adapter._pipelines["denoise"].scheduler = drawing(scheduler, folder)
    wanted = tiny_models.small_request(card, num_inference_steps=STEPS, previews=10)
    session = adapter.begin([wanted], adapter.encode([wanted]))
    shown = []
    while adapter.step(session):
        shown.append(adapter.preview(session)["latents"].value)
    made = adapter.finish(session)["latents"].value
    assert all(latents.isfinite().all() for latents in shown)
    spread = [float(latents.std()) for latents in shown]
    assert max(spread) < 4 * float(made.std()) and min(spread) > float(made.std()) / 4, (spread, float(made.std()))
    ways_off = [float((latents - made).norm()) for latents in shown]
    assert ways_off[-1] < 0.6 * max(ways_off) and ways_off[-2] < 0.8 * max(ways_off), ways_off


def test_what_the_built_in_shows_before_its_last_step_is_nearly_the_picture() -> None:
    card = load_card("builtin:emoji")
    adapter = load_adapter(LoadSpec(card=card, roles=COLOCATED))
    params = card.resolve(SamplingParams(prompt="a red apple", seed=1, previews=10))
    wanted = Request(request_id="r", params=params)
    session = adapter.begin([wanted], adapter.encode([wanted]))
    pictures = []
    while adapter.step(session):
        pictures.append(adapter.decode([wanted], adapter.preview(session))[0])
    final = adapter.decode([wanted], adapter.finish(session))[0]
    likeness = [np.corrcoef(picture.ravel(), final.ravel())[0, 1] for picture in pictures]
    assert likeness[-1] > 0.98 and 1 - likeness[-1] < 0.5 * (1 - likeness[0]), likeness


def test_a_family_that_can_show_none_says_so_before_anything_starts(tiny_root: Path) -> None:
    card = load_card(str(tiny_models.build("cogvideox", tiny_root)))
    assert not card.previews
    with pytest.raises(InvalidRequest, match="previews.*leave it out"):
        tiny_models.small_request(card, previews=1)
    assert tiny_models.small_request(card).params.previews == 0


@pytest.mark.parametrize("count", [-1, 11, True, 1.5, "3"])
def test_a_count_of_previews_that_is_none_is_refused(count: object) -> None:
    with pytest.raises(InvalidRequest, match="previews"):
        load_card("builtin:timed").resolve(SamplingParams(prompt="a", previews=count))  # type: ignore[arg-type]


# ---------------------------------------------------------------- colours


def test_colours_that_hang_on_latents_linearly_are_found_from_one_picture() -> None:
    colours = ColourMap()
    assert colours.draw(picture(1)[0]) is None, "nothing is known yet"
    colours.learn(*picture(1, side=12, corners=12))
    grid, pixels = picture(2)
    drawn = colours.draw(grid)
    assert drawn is not None and drawn.shape == (8, 8, 3)
    assert np.abs(drawn.astype(int) - pixels[::2, ::2]).max() <= 3


def test_colours_are_learnt_of_so_many_pictures_and_no_more() -> None:
    colours = ColourMap()
    for number in range(LESSONS):
        assert colours.wants_more
        colours.learn(*picture(number))
    assert not colours.wants_more


def test_a_picture_that_does_not_fit_its_latents_is_left_out() -> None:
    colours = ColourMap()
    grid, pixels = picture(1)
    colours.learn(grid, pixels[:-1])
    assert colours.draw(grid) is None


def test_latents_of_another_kind_than_were_learnt_are_not_drawn() -> None:
    colours = ColourMap()
    colours.learn(*picture(1))
    assert colours.draw(torch.zeros(4, 4, 7)) is None
    assert latent_grid({"latents": StateValue(torch.zeros(5))}) is None
    assert latent_grid({"image": StateValue(torch.zeros(1, 3, 4, 4))}) is None


def test_the_frames_in_the_middle_are_those_of_the_latent_frame_in_the_middle() -> None:
    frames = np.arange(9).reshape(9, 1, 1, 1)
    assert middle_of(frames, 3).ravel().tolist() == [1, 2, 3, 4]
    assert middle_of(frames[:5], 5).ravel().tolist() == [2]
    assert middle_of(frames[:1], 1).ravel().tolist() == [0]


# ---------------------------------------------------------------- taking


@pytest.mark.parametrize(
    ("count", "total", "steps"),
    [(0, 8, []), (1, 8, [4]), (3, 8, [2, 4, 6]), (10, 4, [1, 2, 3]), (10, 50, [5, 9, 14, 18, 23, 27, 32, 36, 41, 45])],
)
def test_previews_are_spread_over_the_steps_and_the_last_shows_none(count: int, total: int, steps: list[int]) -> None:
    assert [step for step in range(total + 1) if is_due(step, total, count)] == steps
    assert not is_due(1, 1, count)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(str(tmp_path)).make()


def test_a_shot_goes_through_the_spool_once(spool: Spool) -> None:
    said: list[WorkerEvent] = []
    outlet = SpoolOutlet(3, spool, said.append)
    outlet.put(Shot(request(), 2, 8, as_state(torch.zeros(2, 2, 3))))
    outlet.put(Shot(request(), 4, 8, as_state(torch.ones(2, 2, 3))))
    assert said == [PreviewTaken(3, "r", 2), PreviewTaken(3, "r", 4)]
    shot = take_shot(spool, request())
    assert shot is not None and (shot.step, shot.total) == (4, 8), "the newest counts"
    assert shot.state.keys() == {"latents"} and torch.equal(shot.state["latents"].value, torch.ones(1, 3, 2, 2))
    assert take_shot(spool, request()) is None
    assert list(spool.folder.iterdir()) == []


def test_a_shot_of_another_request_or_a_damaged_one_is_none(spool: Spool) -> None:
    SpoolOutlet(3, spool, lambda event: None).put(Shot(request(name="other"), 2, 8, as_state(torch.zeros(2, 2, 3))))
    spool.preview("other").rename(spool.preview("r"))
    assert take_shot(spool, request()) is None
    spool.preview("r").write_bytes(b"not a file of tensors")
    assert take_shot(spool, request()) is None
    assert list(spool.folder.iterdir()) == []


def test_a_shot_that_goes_while_it_is_read_is_none(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head removes what a cancelled request has; safetensors opens the file, and then torch does."""
    opened = torch.UntypedStorage.from_file
    removed: list[object] = []

    def goes(*args: object, **options: object) -> object:
        removed.append(spool.discard("r"))
        return opened(*args, **options)

    SpoolOutlet(3, spool, lambda event: None).put(Shot(request(), 2, 8, as_state(torch.zeros(2, 2, 3))))
    monkeypatch.setattr(torch.UntypedStorage, "from_file", goes)
    assert take_shot(spool, request()) is None and removed
    assert list(spool.folder.iterdir()) == []


def test_a_shot_that_goes_while_it_is_written_is_not_told_of(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, said = os.replace, list[WorkerEvent]()

    def goes(*files: Path) -> None:
        spool.discard("r")
        replace(*files)

    monkeypatch.setattr(os, "replace", goes)
    SpoolOutlet(3, spool, said.append).put(Shot(request(), 2, 8, as_state(torch.zeros(2, 2, 3))))
    assert said == [] and list(spool.folder.iterdir()) == []


def test_nothing_of_a_request_stays_in_the_spool(spool: Spool) -> None:
    outlet = SpoolOutlet(3, spool, lambda event: None)
    taker = PreviewTaker(outlet)
    taker.take(request(), 4, 8, lambda: as_state(torch.zeros(2, 2, 3)), HostProgress())
    taker.forget(request())
    taker._thread.shutdown()
    assert list(spool.folder.iterdir()) == []
    for file in (spool.preview("r"), spool.unfinished_preview("r"), spool.taken_preview("r"), spool.file("r")):
        file.write_bytes(b"")
    spool.discard("r")
    assert list(spool.folder.iterdir()) == []


class Kept:
    """An outlet that keeps what it is given; while ``open`` is not set it is slow."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.shots: list[Shot] = []
        self.open = threading.Event()
        self.open.set()

    def put(self, shot: Shot) -> None:
        assert self.open.wait(SECONDS)
        self.steps.append(shot.step)
        self.shots.append(shot)

    def forget(self, request_id: str) -> None: ...


def test_a_slow_outlet_costs_previews_and_no_time() -> None:
    kept = Kept()
    kept.open.clear()
    taker = PreviewTaker(kept)
    for step in range(1, 8):
        taker.take(request(), step, 8, lambda: as_state(torch.zeros(2, 2, 3)), HostProgress())
    kept.open.set()
    taker._thread.shutdown()
    assert kept.steps == [1]


def test_what_the_next_step_does_to_the_latents_is_not_shown_and_nothing_is_before_the_device_has_done_it() -> None:
    calls: list[Callable[[Reached], None]] = []

    class Later(HostProgress):
        def then(self, call: Callable[[Reached], None], *, step: bool = False) -> None:
            calls.append(call)

    kept, latents = Kept(), torch.zeros(1, 3, 2, 2)
    taker = PreviewTaker(kept)
    taker.take(request(), 1, 8, lambda: {"latents": StateValue(latents)}, Later())
    latents += 1
    assert not kept.shots
    calls[0](Reached(0.0))
    wait_until(lambda: kept.shots)
    assert torch.equal(kept.shots[0].state["latents"].value, torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("error", [CodecError("no"), AttributeError("no"), torch.OutOfMemoryError("no")], ids=repr)
def test_an_estimate_that_fails_costs_the_denoise_nothing(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def estimate() -> State:
        raise error

    kept = Kept()
    taker = PreviewTaker(kept)
    taker.take(request(), 1, 8, estimate, HostProgress())
    taker.take(request(), 2, 8, lambda: as_state(torch.zeros(2, 2, 3)), HostProgress())
    taker._thread.shutdown()
    assert kept.steps == ([2] if isinstance(error, torch.OutOfMemoryError) else [])
    assert caplog.text.count("no preview of request r") == 1


def test_an_outlet_that_fails_costs_that_preview_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    taker = PreviewTaker(SpoolOutlet(0, Spool(str(tmp_path)), lambda event: None))  # without its folder
    for step in (1, 2):
        taker.take(request(), step, 8, lambda: as_state(torch.zeros(2, 2, 3)), HostProgress())
        wait_until(lambda: not taker._busy.is_set())
    taker._thread.shutdown()
    assert caplog.text.count("is lost") == 2
