"""Checkpoints with real ranks: on GPUs, or over gloo with ``DITRELAY_TEST_DEVICE=cpu`` (see rig.py)."""

from __future__ import annotations

import os
import signal
import time

import pytest
from rig import ON_GPUS, SECONDS, needs, settings

from ditrelay import Engine, SamplingParams

STEPS = 900 if ON_GPUS else 60
REPLICAS = {"one rank": 2, "a replica of two": 3}


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=needs(n), id=name) for name, n in REPLICAS.items()])
def test_a_denoise_whose_rank_is_killed_goes_on_at_its_last_checkpoint_and_draws_the_same(ranks: int) -> None:
    model = "builtin:emoji" if ranks == 2 else "builtin:timed?encode=0.01&denoise=2&decode=0.01&steps=20"
    params = SamplingParams(prompt="a red apple", seed=1, num_inference_steps=STEPS if ranks == 2 else 20)
    args = settings(model_path=model, num_gpus=ranks, sp_degree=ranks - 1, checkpoint_steps=2)
    with Engine(args) as engine:
        expected = engine.submit(params).result(SECONDS).media
        assert engine._controller is not None
        folder, ticket = engine._controller._spool.folder, engine.submit(params)
        until = time.monotonic() + SECONDS
        while not any(folder.glob("*.safetensors")):
            assert time.monotonic() < until and not ticket.done()
            time.sleep(0.002)
        pid = engine.status().workers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert ticket.result(SECONDS).media == expected
        steps = [progress.step for progress in ticket.events() if progress.step]
        assert engine.status().workers[0].restarts == 1
        assert steps.count(1) == 1, f"it started over: {steps}"
