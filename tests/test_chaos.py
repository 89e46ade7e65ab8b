"""Workers are killed under load, clients cancel, requests fail: only those fail that must, and nothing stays behind."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import time

from chaos import Options, run
from chaos_report import section, verdict
from common import provenance
from rich.console import Console

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.errors import InvalidRequest, QueueFull, RequestCancelled, RequestFailed

MODEL = "builtin:timed?encode=0.01&denoise=0.06&decode=0.01&steps=3&conditioning_mb=2&latents_mb=0.2"
SECONDS = 8.0
PROMPTS = ("a [fail denoise]", "a [invalid decode]", *(f"picture {i}" for i in range(8)))


def kill_one(engine: Engine, choose: random.Random) -> None:
    pids = [worker.pid for worker in engine.status().workers if worker.pid]
    if pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(choose.choice(pids), choose.choice([signal.SIGKILL, signal.SIGTERM]))


def test_kills_cancels_and_failures_under_load_lose_no_request() -> None:
    choose = random.Random(7)
    # Every kill may hit the same request, so the number of attempts is not what is tested here.
    args = ServerArgs(
        model_path=MODEL,
        device="cpu",
        enable_disagg=True,
        num_gpus=5,
        num_non_dit_ranks=2,
        sp_degree=2,
        verify_transfers=True,
        max_attempts=20,
        dist_timeout=10.0,
        log_level="error",
    )
    with Engine(args) as engine:
        tickets, cancelled = [], set()
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            with contextlib.suppress(QueueFull):
                tickets += [engine.submit(SamplingParams(prompt=choose.choice(PROMPTS))) for _ in range(3)]
            if choose.random() < 0.2:
                ticket = choose.choice(tickets)
                ticket.cancel()
                cancelled.add(ticket.request_id)
            if choose.random() < 0.06:
                kill_one(engine, choose)
            time.sleep(choose.random() * 0.2)
        kill_one(engine, choose)
        for ticket in tickets:
            try:
                ticket.result(60)
            except RequestCancelled:
                assert ticket.request_id in cancelled
            except InvalidRequest:
                assert "invalid" in ticket.params.prompt
            except RequestFailed as error:
                assert "fails because the prompt asks for it" in str(error)
        while not engine.ready:
            assert time.monotonic() < until + 120, engine.status()
            time.sleep(0.1)
        time.sleep(1.5)  # a heartbeat comes every second
        status = engine.status()
    assert (status.queued, status.running) == (0, 0)
    assert sum(worker.restarts for worker in status.workers) > 0
    left = [(w.memory.kept, w.memory.pending_sends, w.memory.pending_recvs) for w in status.workers if w.memory]
    assert left == [(0, 0, 0)] * 5


def test_a_server_under_chaos_loses_nothing_hangs_nowhere_and_draws_no_wrong_picture() -> None:
    result = run(Options(minutes=0.5, seed=5, every=1.2), Console(file=io.StringIO()))
    assert verdict(result) == []
    assert result["load"]["completed"] > 10
    kinds = {kind.partition(",")[0] for kind in result["faults"]}
    assert {"kill", "long stop", "short stop", "cancel storm", "malformed"} <= kinds
    assert not result["log_errors"]
    assert "Nothing that must not happen happened" in section(result, provenance())
