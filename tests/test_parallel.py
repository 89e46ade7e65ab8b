"""Sequence and tensor parallelism of a transformer over two gloo ranks on the CPU."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.distributed as dist

from ditrelay.errors import ConfigError
from ditrelay.models.card import check_parallel, load_card
from ditrelay.models.loading import PRELOAD, LoadSpec, load_adapter
from ditrelay.runtime.request import Request, SamplingParams

_SECONDS = 90.0
_WORLD = 2


def _latents(folder: str, *, sp: int = 1, tp: int = 1, steps_before_abandon: int | None = None) -> torch.Tensor | None:
    """Latents of a request whose 31 text-and-image tokens per side do not divide by the degree."""
    torch.set_num_threads(1)
    card = load_card(folder)
    encoder = load_adapter(LoadSpec(card=card, roles=frozenset({"encode"})))
    adapter = load_adapter(LoadSpec(card=card, roles=frozenset({"denoise"}), sp=sp, tp=tp))
    params = SamplingParams(prompt="a red chair", height=20, width=36, num_inference_steps=3, seed=5)
    requests = [Request(request_id="r", params=card.resolve(params))]
    session = adapter.begin(requests, encoder.encode(requests))
    while adapter.step(session):
        if session.steps_done == steps_before_abandon:
            adapter.abandon(session)
            return None
    value = adapter.finish(session)["latents"].value
    assert isinstance(value, torch.Tensor)
    return value


def _rank(rank: int, port: int, folder: str, out: str) -> None:
    store = dist.TCPStore("127.0.0.1", port, _WORLD, rank == 0, timedelta(seconds=_SECONDS))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=_WORLD, timeout=timedelta(seconds=_SECONDS))
    result = {"sp": _latents(folder, sp=_WORLD), "tp": _latents(folder, tp=_WORLD)}
    torch.save(result, os.path.join(out, f"rank{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.build("flux", tmp_path_factory.getbasetemp() / "tiny"))


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_ranks_give_the_latents_of_one(tiny_flux: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    port = _free_port()
    ranks = [context.Process(target=_rank, args=(rank, port, tiny_flux, str(tmp_path))) for rank in range(_WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(_SECONDS)
        if process.is_alive():
            process.kill()
            pytest.fail(f"a rank did not end within {_SECONDS} s")
    assert [process.exitcode for process in ranks] == [0] * _WORLD
    alone = _latents(tiny_flux)
    assert alone is not None
    for rank in range(_WORLD):
        result = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert (result["sp"] - alone).abs().max() < 1e-5
        assert (result["tp"] - alone).abs().max() < 1e-5
