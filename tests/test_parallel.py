"""A denoise over several gloo ranks on the CPU: sequence (Ulysses, ring), tensor and guidance parallelism."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import AttentionBackendName
from noisy_schedulers import drawing

from ditrelay.errors import ConfigError, InvalidRequest
from ditrelay.models import parallel
from ditrelay.models.adapter import StageAdapter
from ditrelay.models.card import check_parallel, load_card
from ditrelay.models.components import set_attention
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import PRELOAD, load_adapter
from ditrelay.models.parallel import check_heads, check_tokens, group_timeout, supports_context_parallel
from ditrelay.models.quirks import ATTENTION_BACKENDS, FAMILIES, RING_BACKENDS
from ditrelay.runtime.payloads import State
from ditrelay.runtime.request import Request

SECONDS = 180.0
TINY = {family.name: family for family in FAMILIES if family.name in tiny_models.BUILDERS}


@dataclass(frozen=True)
class Case:
    """One way to spread one family's denoise.

    Attributes:
        sides: the picture's height and width in multiples of the family's own.
        heads: with so many attention heads, and random weights; None: as the tiny model is.
        scheduler: one that draws noise (``noisy_schedulers``); None: the tiny model's.
    """

    family: str
    sp: int = 1
    ring: int = 1
    tp: int = 1
    cfg: int = 1
    sides: int = 3
    unguided: bool = False
    offload: frozenset[str] = frozenset()
    heads: int | None = None
    scheduler: str | None = None

    def __str__(self) -> str:
        degrees = {"ulysses": self.sp // self.ring, "ring": self.ring, "tp": self.tp, "cfg": self.cfg}
        words = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
        marks = " unguided" * self.unguided + " offloaded" * bool(self.offload)
        marks += f" {self.scheduler}" if self.scheduler else ""
        return f"{self.family}: {' x '.join(words)}{marks}"

    @property
    def folder(self) -> str:
        return f"{self.family}-{self.heads}-heads" if self.heads else self.family

    @property
    def ranks(self) -> int:
        return self.sp * self.tp * self.cfg


def _with(plan: str) -> list[str]:
    return [name for name, family in TINY.items() if plan in family.plans]


# A sequence over Ulysses x ring must divide by the product; everything else takes any length.
CASES = {
    str(case): case
    for case in (
        *(Case(name, sp=2) for name in _with("sp")),
        *(Case(name, sp=2, ring=2) for name in _with("ring")),
        *(Case(name, tp=2) for name in _with("tp")),
        *(Case(name, cfg=2) for name in _with("cfg")),
        *(Case(name, cfg=2, unguided=True) for name in _with("cfg")),
        *(Case(name, cfg=2, sp=2) for name in _with("cfg") if name in _with("sp")),
        *(Case(name, cfg=2, tp=2) for name in _with("cfg") if name in _with("tp")),
        *(Case(name, sp=4, ring=2, sides=4) for name in ("flux", "wan")),
        *(Case(name, sp=2, tp=2, heads=4) for name in _with("tp") if name in _with("sp")),
        *(Case(name, sp=2, ring=2, tp=2) for name in _with("tp") if name in _with("ring")),
        *(Case(name, sp=2, offload=frozenset({"dit"})) for name in ("flux", "wan")),
        *(Case("flux", sp=2, scheduler=scheduler) for scheduler in ("FlowMatchLCM", "FlowMatchEuler")),
        *(Case("wan", sp=2, scheduler=scheduler) for scheduler in ("DPMSolverMultistep", "SASolver")),
        Case("sd3", cfg=2, scheduler="DPMSolverSinglestep"),
    )
}


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


def _difference(case: Case, root: str) -> float:
    """How far the latents of this rank's part of a parallel run are from those of a run alone."""
    load_format = "dummy" if case.heads else "auto"
    card = load_card(f"{root}/{case.folder}", load_format)
    side = case.sides * card.size_multiple
    guidance = {"guidance_scale": card.guidance_above} if case.unguided else {}
    request = tiny_models.small_request(card, height=side, width=side, **guidance)
    one = LoadSpec(card=card, roles=frozenset({"encode", "denoise"}), load_format=load_format)
    alone: Any = load_adapter(one)
    degrees = {"sp": case.sp, "ring": case.ring, "tp": case.tp, "cfg": case.cfg}
    split: Any = load_adapter(replace(one, roles=frozenset({"denoise"}), offload=case.offload, **degrees))
    if case.sp > case.ring > 1:
        odd = tiny_models.small_request(card)
        with pytest.raises(InvalidRequest, match="tokens does not divide by 4 ranks"):
            _denoise(split, odd, alone.encode([odd]))
    if case.scheduler:
        for adapter in (alone, split):
            adapter._pipelines["denoise"].scheduler = drawing(case.scheduler, Path(root, case.folder))
    state = alone.encode([request])
    for step in (1, 2):
        _denoise(split, request, state, stop_after=step)
    return float((_denoise(split, request, state) - _denoise(alone, request, state)).abs().max())


def _refuse(own: int, group: object) -> list[int]:
    raise AssertionError(f"the ranks had to be asked how long their parts are (here {own}): a wait in every attention")


class _OnlyMasked:
    """diffusers' own Ulysses attention, which is left what ours does not do: attention with a mask (Qwen-Image)."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def apply(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any) -> Any:
        assert options[0] is not None, f"plain attention of {tuple(query.shape)} was not ours"
        return self._theirs.apply(query, key, value, *options)


def _rank(rank: int, world: int, port: int, root: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # what is drawn without a generator differs from rank to rank
    patience = timedelta(seconds=SECONDS)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
    parallel._ask_all_ranks = _refuse
    parallel._ulysses_of_any_length = _OnlyMasked(parallel._ulysses_of_any_length)
    with torch.no_grad():
        differences = {name: _difference(case, root) for name, case in CASES.items() if case.ranks == world}
    waits = [group_timeout(group, torch.device("cpu")).total_seconds() for group in dist.distributed_c10d._world.pg_map]
    torch.save(differences | {"groups": len(waits), "longest wait": max(waits)}, f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, float]]]:
    """By number of ranks: per rank, the largest difference of each case. One start of the processes for all of them."""
    root = tmp_path_factory.getbasetemp() / "tiny"
    for case in CASES.values():
        made = tiny_models.build(case.family, root)
        if case.heads:
            config = shutil.copytree(made, root / case.folder, dirs_exist_ok=True) / "transformer" / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": case.heads}))
    results: dict[int, list[dict[str, float]]] = {}

    def of(world: int) -> list[dict[str, float]]:
        if world not in results:
            results[world] = []  # what stays where the run fails: it is not repeated for each case
            results[world] = _run(world, root, tmp_path_factory.mktemp(f"parallel{world}"))
        return results[world]

    return of


def _run(world: int, root: Path, out: Path) -> list[dict[str, float]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    port = dist.TCPStore("127.0.0.1", 0, is_master=True).port  # closed at once: free for the ranks
    ranks = [context.Process(target=_rank, args=(rank, world, port, str(root), str(out))) for rank in range(world)]
    for process in ranks:
        process.start()
    until = time.monotonic() + SECONDS
    for process in ranks:
        process.join(max(0.0, until - time.monotonic()))
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in late:
        ranks[rank].kill()
    assert not late, f"ranks {late} did not end within {SECONDS} s"
    assert [process.exitcode for process in ranks] == [0] * world
    return [_load(out / f"rank{rank}.pt") for rank in range(world)]


def _load(path: Path) -> dict[str, float]:
    result: dict[str, float] = torch.load(path, weights_only=True)
    return result


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_give_the_latents_of_one_also_after_cancels(
    differences: Callable[[int], list[dict[str, float]]], name: str
) -> None:
    case = CASES[name]
    found = differences(case.ranks)
    assert found, "the run of all cases failed: see the first of them"
    assert len(found) == case.ranks and all(rank[name] < 1e-5 for rank in found)


def test_no_collective_of_a_replica_waits_longer_than_the_default_group(
    differences: Callable[[int], list[dict[str, float]]],
) -> None:
    for rank in differences(4):
        assert rank["groups"] > 4 and rank["longest wait"] == SECONDS


@pytest.mark.parametrize(
    ("tokens", "ulysses", "ring", "fits"),
    [(512, 2, 2, True), (9, 2, 2, False), (9, 2, 1, True), (9, 1, 3, True), (2, 3, 1, False), (2, 1, 3, False)],
)
def test_a_sequence_that_cannot_be_shared_out_names_the_flags(tokens: int, ulysses: int, ring: int, fits: bool) -> None:
    if fits:
        return check_tokens(tokens, ulysses=ulysses, ring=ring)
    with pytest.raises(InvalidRequest, match=f"--ulysses-degree {ulysses} x --ring-degree {ring}.*; allowed: a size"):
        check_tokens(tokens, ulysses=ulysses, ring=ring)


def test_a_family_without_a_plan_is_refused_naming_those_that_have_one(tmp_path: Path) -> None:
    card = load_card("builtin:emoji")
    check_parallel(card, cfg=2)
    with pytest.raises(ConfigError, match=r"--sp-degree: z-image .* flux, .*wan"):
        check_parallel(card, sp=2)
    with pytest.raises(ConfigError, match=r"--tp-size: z-image .* flux, .*qwen-image"):
        check_parallel(card, tp=2)
    masked = load_card(str(tiny_models.build("qwen-image", tmp_path)))
    with pytest.raises(ConfigError, match=r"--ring-degree: qwen-image .* flux, .*wan"):
        check_parallel(masked, sp=2, ring=2)
    embedded = load_card(str(tiny_models.build("flux", tmp_path)))
    with pytest.raises(ConfigError, match=r"--cfg-parallel-degree: flux .* z-image, .*ltx"):
        check_parallel(embedded, cfg=2)


class _Transformer:
    """Takes the attention backends given and remembers the one that was set."""

    def __init__(self, *usable: str) -> None:
        self.usable = usable
        self.backend: str | None = None

    def set_attention_backend(self, name: str) -> None:
        if name not in self.usable:
            raise RuntimeError(f"{name} is not installed")
        self.backend = name


@pytest.mark.parametrize(
    ("backend", "degrees", "usable", "chosen"),
    [
        ("auto", {}, ("native",), None),
        ("fa", {}, ("_flash_3", "flash", "native"), "_flash_3"),
        ("fa", {"sp": 2}, ("_flash_3", "flash", "native"), "flash"),
        ("auto", {"sp": 2, "ring": 2}, ("native", "_native_cudnn"), "_native_cudnn"),
        ("fa", {"sp": 2, "ring": 2}, ("flash", "_native_cudnn"), "flash"),
        ("fa", {"sp": 2, "ring": 2}, ("_native_cudnn",), "_native_cudnn"),
    ],
)
def test_attention_kernels_on_a_gpu_can_do_what_the_degrees_need(
    backend: str, degrees: dict[str, int], usable: tuple[str, ...], chosen: str | None
) -> None:
    transformer = _Transformer(*usable)
    set_attention(transformer, backend, torch.device("cuda"), **degrees)
    assert transformer.backend == chosen


@pytest.mark.parametrize(
    ("heads", "ulysses", "ring", "fits"),
    [(24, 3, 1, True), (24, 5, 1, True), (24, 7, 1, False), (12, 8, 1, False), (1, 2, 1, False), (24, 5, 2, False)],
)
def test_attention_heads_that_ulysses_cannot_share_out_are_refused(
    heads: int, ulysses: int, ring: int, fits: bool
) -> None:
    if fits:
        return check_heads(heads, ulysses=ulysses, ring=ring)
    with pytest.raises(ConfigError, match=f"--ulysses-degree: {ulysses} .* {heads} attention heads; allowed: .*1"):
        check_heads(heads, ulysses=ulysses, ring=ring)


def test_every_name_of_attention_kernels_is_one_of_diffusers() -> None:
    for names in (*ATTENTION_BACKENDS.values(), *RING_BACKENDS.values()):
        assert set(names) <= {kernels.value for kernels in AttentionBackendName}
    assert all(supports_context_parallel(name) for names in RING_BACKENDS.values() for name in names)


def test_ring_attention_is_refused_where_no_kernel_can_do_it() -> None:
    with pytest.raises(ConfigError, match="--ring-degree.*--attention-backend xformers.*allowed.*auto, fa"):
        set_attention(_Transformer("xformers", "native"), "xformers", torch.device("cuda"), sp=2, ring=2)
    assert "xformers" not in RING_BACKENDS
