"""Noise that a scheduler or a VAE draws: a request's seed decides it, wherever and whenever it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_models
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoResnetBlock3d
from noisy_schedulers import EVERYWHERE, NO_SHIFT, drawing
from test_memory import through_the_codec

from ditrelay.models.card import load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.models.noise import DrawnFrom
from ditrelay.runtime.payloads import State
from ditrelay.runtime.request import Request
from ditrelay.runtime.topology import COLOCATED

STEPS = 4
OLDER = ("CogVideoXDDIM", "CogVideoXDPM", "DDPM", "EulerAncestralDiscrete", "DPMSolverMultistep", "SASolver")
# Every scheduler with one family, and every family with a scheduler that draws at each step.
CASES = [
    ("flux", "FlowMatchLCM"),
    ("flux", "FlowMatchEuler"),
    ("flux2-klein", "FlowMatchEuler"),
    ("qwen-image", "FlowMatchLCM"),
    ("z-image", "FlowMatchEuler"),
    ("ltx", "FlowMatchLCM"),
    *[("sd3", name) for name in NO_SHIFT if name not in EVERYWHERE],
    ("wan", "FlowMatchEuler"),
    ("wan", "SASolver"),
    ("wan-i2v", "FlowMatchLCM"),
    *[("cogvideox", name) for name in OLDER],
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """By family and scheduler. The weights of a family are loaded once."""
    root = tmp_path_factory.getbasetemp() / "tiny"
    loaded: dict[str, Any] = {}

    def of(family: str, scheduler: str) -> tuple[Any, Request]:
        folder = tiny_models.build(family, root)
        if family not in loaded:
            loaded[family] = load_adapter(LoadSpec(card=load_card(str(folder)), roles=COLOCATED))
        loaded[family]._pipelines["denoise"].scheduler = drawing(scheduler, folder)
        return loaded[family], tiny_models.small_request(load_card(str(folder)), num_inference_steps=STEPS)

    return of


@contextmanager
def nobody_draws_from_the_process() -> Iterator[None]:
    """The process's own generator is at another place each time, and nothing takes from it."""
    torch.seed()
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "noise was drawn from the process's generator"


def denoise(adapter: Any, request: Request, state: State) -> torch.Tensor:
    session = adapter.begin([request], state)
    while adapter.step(session):
        pass
    return adapter.finish(session)["latents"].value


@pytest.mark.parametrize(("family", "scheduler"), CASES)
def test_a_seed_decides_what_a_scheduler_draws_also_interleaved_and_after_a_restart(
    family: str, scheduler: str, adapters: Callable[[str, str], Any]
) -> None:
    adapter, request = adapters(family, scheduler)
    with nobody_draws_from_the_process():
        state = adapter.encode([request])
        expected = denoise(adapter, request, state)
    assert expected.isfinite().all()
    with nobody_draws_from_the_process():
        one, other = adapter.begin([request], state), adapter.begin([request], state)
        while adapter.step(one):
            adapter.step(other)
        adapter.step(other)
        assert torch.equal(adapter.finish(one)["latents"].value, expected)
        assert torch.equal(adapter.finish(other)["latents"].value, expected)
    if family == "cogvideox":  # is not checkpointed: it starts over
        return
    with nobody_draws_from_the_process():
        first, second = adapter.begin([request], state), adapter.begin([request], state)
        for _ in range(2):
            adapter.step(first)
        captured = through_the_codec(adapter.capture(first))
        adapter.step(first)  # what goes on must not change what was captured
        adapter.restore(second, captured)
        while adapter.step(second):
            pass
        assert torch.equal(adapter.finish(second)["latents"].value, expected)


def test_a_scheduler_that_draws_goes_on_where_the_first_noise_ended(adapters: Callable[[str, str], Any]) -> None:
    """The generator that made the first latents makes all that follows: nothing is drawn twice."""
    adapter, request = adapters("flux", "FlowMatchLCM")
    session = adapter.begin([request], adapter.encode([request]))
    first = session.driver.scope.latents
    again = torch.Generator("cpu").manual_seed(request.params.seed)
    torch.randn(first.shape, generator=again)
    assert torch.equal(session.scheduler.noise_generator.get_state(), again.get_state())
    adapter.abandon(session)


def test_a_vae_that_adds_noise_draws_it_from_the_seed(tmp_path: Path) -> None:
    def noisy() -> Any:
        pipeline = tiny_models.BUILDERS["ltx"]()
        vae = diffusers.AutoencoderKLLTXVideo.from_config(pipeline.vae.config, decoder_inject_noise=(True,) * 5)
        for block in vae.decoder.modules():
            if isinstance(block, LTXVideoResnetBlock3d):
                torch.nn.init.ones_(block.per_channel_scale1)
        pipeline.register_modules(vae=vae)
        return pipeline

    card = load_card(str(tiny_models.build("ltx-noisy", tmp_path, noisy)))
    adapter = load_adapter(LoadSpec(card=card, roles=COLOCATED))
    pixels, latents = [], State()
    for seed in (5, 5, 6):
        request = tiny_models.small_request(card, num_inference_steps=2, seed=seed)
        latents = latents or adapter.finish(_done(adapter, request))
        with nobody_draws_from_the_process():
            pixels.append(torch.from_numpy(adapter.decode([request], latents)[0]).int())
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])


def _done(adapter: Any, request: Request) -> Any:
    session = adapter.begin([request], adapter.encode([request]))
    while adapter.step(session):
        pass
    return session


def test_only_draws_without_a_generator_are_given_one() -> None:
    own = torch.Generator("cpu").manual_seed(1)
    with DrawnFrom(torch.Generator("cpu").manual_seed(2)):
        drawn = torch.randn((2, 3), device="cpu", dtype=torch.float64), torch.randn(4, generator=own)
    first = torch.randn((2, 3), generator=torch.Generator("cpu").manual_seed(2), dtype=torch.float64)
    second = torch.randn(4, generator=torch.Generator("cpu").manual_seed(1))
    assert torch.equal(drawn[0], first) and torch.equal(drawn[1], second)
