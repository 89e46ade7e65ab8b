"""Sequence and tensor parallelism of a transformer over two gloo ranks on the CPU."""

from __future__ import annotations

import io
import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.distributed as dist
from PIL import Image

from ditrelay.errors import ConfigError
from ditrelay.models.adapter import StageAdapter
from ditrelay.models.card import ModelCard, check_parallel, load_card
from ditrelay.models.loading import PRELOAD, LoadSpec, load_adapter
from ditrelay.models.quirks import FAMILIES
from ditrelay.runtime.payloads import State
from ditrelay.runtime.request import Request, SamplingParams

WORLD = 2
SECONDS = 120.0
TINY = {family.name: family for family in FAMILIES if family.name in tiny_models.BUILDERS}
WITH_ULYSSES = tuple(name for name, family in TINY.items() if "ulysses" in family.parallel)
WITH_TP = tuple(name for name, family in TINY.items() if "tp" in family.parallel)


def _request(card: ModelCard) -> Request:
    """Small, with an odd number of image tokens where the family allows it: two ranks get unequal parts."""
    side = 3 * card.size_multiple
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 50, 50)).save(file, "PNG")
    params = SamplingParams(
        prompt="a red chair",
        height=side,
        width=side,
        num_frames=1 if card.media == "image" else 2 * card.frame_multiple + 1,
        num_inference_steps=3,
        seed=5,
        image=file.getvalue() if card.needs_image else None,
    )
    return Request(request_id="r", params=card.resolve(params))


def _denoise(adapter: StageAdapter, request: Request, state: State, *, stop_after: int | None = None) -> torch.Tensor:
    """The latents; an empty tensor where the request is abandoned after ``stop_after`` steps."""
    session = adapter.begin([request], state)
    while adapter.step(session):
        if session.steps_done == stop_after:
            adapter.abandon(session)
            return torch.empty(0)
    latents = adapter.finish(session)["latents"].value
    assert isinstance(latents, torch.Tensor)
    return latents


def _difference(folder: str, *, sp: int = 1, tp: int = 1) -> float:
    """How far the latents of this rank's part of a parallel run are from those of a run alone."""
    card = load_card(folder)
    request = _request(card)
    alone = load_adapter(LoadSpec(card=card, roles=frozenset({"encode", "denoise"})))
    split = load_adapter(LoadSpec(card=card, roles=frozenset({"denoise"}), sp=sp, tp=tp))
    state = alone.encode([request])
    for step in (1, 2):
        _denoise(split, request, state, stop_after=step)
    return float((_denoise(split, request, state) - _denoise(alone, request, state)).abs().max())


def _rank(rank: int, port: int, root: str, out: str) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=SECONDS)
    store = dist.TCPStore("127.0.0.1", port, WORLD, rank == 0, patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=patience)
    with torch.no_grad():
        differences = {f"sp {name}": _difference(f"{root}/{name}", sp=WORLD) for name in WITH_ULYSSES}
        differences |= {f"tp {name}": _difference(f"{root}/{name}", tp=WORLD) for name in WITH_TP}
    torch.save(differences, f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Per rank: the largest difference of each family and kind. One start of two processes for all of them."""
    root, out = tmp_path_factory.getbasetemp() / "tiny", tmp_path_factory.mktemp("parallel")
    for name in {*WITH_ULYSSES, *WITH_TP}:
        tiny_models.build(name, root)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    port = dist.TCPStore("127.0.0.1", 0, is_master=True).port  # closed at once: free for the ranks
    ranks = [context.Process(target=_rank, args=(rank, port, str(root), str(out))) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            pytest.fail(f"a rank did not end within {SECONDS} s")
    assert [process.exitcode for process in ranks] == [0] * WORLD
    return [_load(out / f"rank{rank}.pt") for rank in range(WORLD)]


def _load(path: Path) -> dict[str, float]:
    result: dict[str, float] = torch.load(path, weights_only=True)
    return result


@pytest.mark.parametrize("kind", [f"sp {name}" for name in WITH_ULYSSES] + [f"tp {name}" for name in WITH_TP])
def test_two_ranks_give_the_latents_of_one_also_after_cancels(differences: list[dict[str, float]], kind: str) -> None:
    assert all(rank[kind] < 1e-5 for rank in differences)


def test_a_family_without_a_plan_is_refused_naming_those_that_have_one() -> None:
    card = load_card("builtin:emoji")
    check_parallel(card, 1, 1)
    with pytest.raises(ConfigError, match=r"--sp-degree: z-image .* flux, .*wan"):
        check_parallel(card, 2, 1)
    with pytest.raises(ConfigError, match=r"--tp-size: z-image .* flux, .*qwen-image"):
        check_parallel(card, 1, 2)
    with pytest.raises(ConfigError, match="--tp-size.*combined with --sp-degree"):
        check_parallel(card, 2, 2)
