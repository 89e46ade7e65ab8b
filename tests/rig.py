"""What the tests with real ranks share. They need GPUs; ``DITRELAY_TEST_DEVICE=cpu`` runs them over gloo instead.

A run on a CPU shows that the tests themselves are well; it says nothing about streams, NCCL or CUDA IPC.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.runtime.messages import Heartbeat
from ditrelay.runtime.tickets import Progress, Result, Ticket

DEVICE = os.environ.get("DITRELAY_TEST_DEVICE", "cuda")
ON_GPUS = DEVICE == "cuda"
BACKENDS = ("torch", "cuda_ipc") if ON_GPUS else ("torch",)
SECONDS = 100.0  # for anything that these tests wait for

T = TypeVar("T")
Record = Callable[[str, object], None]  # pytest's record_property
Pixels = np.ndarray[Any, Any]


def ranks_there() -> int:
    """As many ranks as there are GPUs; on a CPU, any number."""
    return torch.cuda.device_count() if ON_GPUS else 64


def needs(ranks: int) -> pytest.MarkDecorator:
    """Skip where there are fewer GPUs."""
    return pytest.mark.skipif(ranks_there() < ranks, reason=f"needs {ranks} GPUs, there are {ranks_there()}")


def settings(**changes: Any) -> ServerArgs:
    """One encoder and decoder, one DiT rank, and no warm-up, unless told otherwise."""
    base = dict(device=DEVICE, num_gpus=2, enable_disagg=True, warmup=False, startup_timeout=SECONDS)
    return ServerArgs(**base | changes)


def draw(engine: Engine, requests: Iterable[SamplingParams]) -> list[Result]:
    """All at once; in order."""
    tickets = [engine.submit(each) for each in requests]
    return [ticket.result(SECONDS) for ticket in tickets]


def pixels(result: Result) -> Pixels:
    """float64 [height, width, 3], 0 to 255."""
    return np.asarray(result.image.convert("RGB"), dtype=np.float64)


def distance(some: Sequence[Pixels], others: Sequence[Pixels]) -> float:
    """Root mean square of the difference, over all pictures."""
    assert len(some) == len(others) > 0
    return float(np.sqrt(np.mean([np.mean((a - b) ** 2) for a, b in zip(some, others, strict=True)])))


def heartbeats(engine: Engine, *, since: float) -> list[Heartbeat]:
    """The first heartbeat of every rank after the moment ``since`` (of ``time.monotonic()``)."""
    until = time.monotonic() + 10.0
    while time.monotonic() < until:
        beats = [worker.memory for worker in engine.status().workers]
        if all(beat is not None and beat.at > since for beat in beats):
            return [beat for beat in beats if beat is not None]
        time.sleep(0.05)
    raise AssertionError(f"not every rank had a heartbeat within 10 s: {engine.status()}")


def at_rest(engine: Engine) -> list[Heartbeat]:
    """Heartbeats after the last request's end, with nothing in flight; the fleet must come to rest within 10 s."""
    until = time.monotonic() + 10.0
    while True:
        beats = heartbeats(engine, since=time.monotonic())
        if not any(beat.pending_sends or beat.pending_recvs or beat.kept for beat in beats):
            return beats
        assert time.monotonic() < until, beats


def side_by_side(*runs: Callable[[], T]) -> list[T]:
    """What each returns; all at once, since what takes time is mostly that processes start."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return [future.result() for future in [pool.submit(run) for run in runs]]


def reaches_step(ticket: Ticket, step: int) -> None:
    """Wait until so many steps of a request are done."""
    reached = threading.Event()

    def look(progress: Progress) -> None:
        if progress.step >= step:
            reached.set()

    ticket.subscribe(look)
    assert reached.wait(SECONDS), f"step {step} was not done within {SECONDS:g} s"
