"""``--cfg-parallel-degree 2``: the two branches of guidance on two ranks, through the whole engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ditrelay.engine import Engine
from ditrelay.errors import ConfigError, RequestCancelled
from ditrelay.runtime.request import RequestState, SamplingParams
from ditrelay.runtime.server_args import ServerArgs

STEPS = 4
UNGUIDED = 0.0  # of the built-in model


def settings(**changes: object) -> ServerArgs:
    return ServerArgs(**{"device": "cpu", "warmup": False, **changes})


@pytest.fixture(scope="module")
def branches() -> Iterator[Engine]:
    """Guidance on ranks 0 and 1, encode and decode on rank 2."""
    with Engine(settings(enable_disagg=True, num_gpus=3, cfg_parallel_degree=2)) as engine:
        assert [unit.members for unit in engine.topology.units] == [(0, 1), (2,)]
        yield engine


def draw(engine: Engine, guidance_scale: float) -> bytes:
    return engine.generate(
        "a red apple", guidance_scale=guidance_scale, num_inference_steps=STEPS, seed=3, timeout=60
    ).media


def test_two_ranks_draw_what_one_draws_with_guidance_and_without(branches: Engine) -> None:
    with Engine(settings()) as alone:
        expected = [draw(alone, scale) for scale in (2.0, UNGUIDED)]
    assert expected[0] != expected[1]
    assert [draw(branches, scale) for scale in (2.0, UNGUIDED)] == expected


def test_a_cancel_at_any_step_leaves_both_ranks_ready_for_the_next_request(branches: Engine) -> None:
    before = draw(branches, 2.0)
    for step in range(STEPS):
        ticket = branches.submit(SamplingParams(prompt="two dogs", num_inference_steps=STEPS, seed=1))
        for progress in ticket.events():
            if progress.step == step and progress.state is RequestState.DENOISING:
                break
        ticket.cancel()
        with pytest.raises(RequestCancelled):
            ticket.result(30)
    assert draw(branches, 2.0) == before


def test_a_degree_that_the_ranks_do_not_fill_is_refused() -> None:
    with pytest.raises(ConfigError, match="cfg_parallel_degree.*needs 2 DiT ranks and there are 1"):
        settings(cfg_parallel_degree=2)
