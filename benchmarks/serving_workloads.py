"""What is measured: workloads (a model and a request) and systems (who serves it, on how many ranks). Data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Device = Literal["cpu", "cuda"]
Kind = Literal["async", "lock-step", "colocated", "stock-replicas", "stock-cp"]

LETTERS: dict[Kind, str] = {"async": "a", "lock-step": "b", "stock-replicas": "c", "stock-cp": "d", "colocated": "e"}
SPREAD = "f"  # our engine as one replica over all ranks, whose leader encodes and decodes: beside stock-cp
ENGINE_KINDS: frozenset[Kind] = frozenset({"async", "lock-step", "colocated"})


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model at one size.

    Attributes:
        model: ``builtin:...``; ``config:NAME``, a config-only folder of model_configs.py with random weights; or
            ``tiny:NAME``, a folder of tests/tiny_models.py with ``heads`` attention heads and random weights.
        num_frames: None for pictures.
        guidance: None: the model's default.
        plan: diffusers has a context parallel plan for the transformer.
        stock: diffusers has a pipeline for the model.
        cp_sequences: the lengths that context parallelism splits. Plain Ulysses where the degree divides all of them,
            else the kind that takes any length (it is slower).
        requests: counted requests of the saturated phase and of each open-loop phase; fewer where time runs out.
        low: requests of the low-load phase, one at a time.
        rates: open-loop arrival rates as shares of the system's own measured capacity, the most wanted first.
        common_rate: the pair is also compared at one arrival rate, a share of lock-step's capacity.
        concurrency: requests kept waiting or running in the saturated phase, per rank.
        short_lead: one burst before the steady window is enough (where encode and decode are next to nothing).
        systems: those that run unless others are asked for (see ``select``).
    """

    name: str
    model: str
    device: Device = "cuda"
    steps: int
    height: int
    width: int
    num_frames: int | None = None
    guidance: float | None = None
    plan: bool = True
    stock: bool = True
    cp_sequences: tuple[int, ...] = ()
    heads: int = 0
    requests: int = 30
    low: int = 4
    rates: tuple[float, ...] = (0.8, 0.5)
    common_rate: bool = True
    concurrency: int = 2
    short_lead: bool = False
    systems: str = "a,b,c,d,e"

    @property
    def load_format(self) -> str:
        return "auto" if self.model.startswith("builtin:") else "dummy"

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def is_video(self) -> bool:
        return self.num_frames is not None


def _flux(name: str, steps: int, **more: Any) -> Workload:
    # 512 text tokens beside 4096 of the picture: both are split
    return Workload(
        name=name, model=f"config:{name}", steps=steps, height=1024, width=1024, cp_sequences=(512, 4096), **more
    )


def _wan(frames: int, steps: int, **more: Any) -> Workload:
    tokens = ((frames - 1) // 4 + 1) * (480 // 16) * (832 // 16)
    return Workload(
        name=f"wan2.1-1.3b-{frames}f-{steps}",
        model="config:wan2.1-1.3b",
        steps=steps,
        height=480,
        width=832,
        num_frames=frames,
        guidance=5.0,
        cp_sequences=(tokens,),
        **({"low": 2, "rates": (0.8,)} | more),
    )


# 50 steps: few requests, and nothing but low load and saturation.
_LONG: dict[str, Any] = dict(requests=6, low=1, rates=(), common_rate=False, concurrency=1, short_lead=True)

WORKLOADS: dict[str, Workload] = {
    each.name: each
    for each in (
        Workload(
            name="emoji",
            model="builtin:emoji",
            device="cpu",
            steps=8,
            height=128,
            width=128,
            guidance=2.0,
            plan=False,
        ),
        Workload(
            name="tiny-flux",
            model="tiny:flux-schnell",
            device="cpu",
            steps=4,
            height=64,
            width=64,
            cp_sequences=(512, 256),
            heads=12,
        ),
        Workload(
            name="tiny-wan",
            model="tiny:wan",
            device="cpu",
            steps=4,
            height=96,
            width=96,
            num_frames=9,
            guidance=5.0,
            cp_sequences=(108,),
            heads=12,
        ),
        Workload(
            name="timed",
            model="builtin:timed?encode=0.06&denoise=0.36&decode=0.06&steps=4&conditioning_mb=4&latents_mb=1",
            device="cpu",
            steps=4,
            height=32,
            width=32,
            plan=False,
            stock=False,
        ),
        _flux("flux-schnell", 4),
        _flux("flux-dev", 28, guidance=3.5),
        Workload(
            name="z-image-turbo",
            model="config:z-image-turbo",
            steps=9,
            height=1024,
            width=1024,
            guidance=0.0,
            plan=False,
        ),
        *(_wan(frames, steps) for frames in (33, 81) for steps in (4, 8)),
        _wan(33, 50, **_LONG),
        # a minute a request: two systems fill nine minutes
        _wan(81, 50, systems="async 1+3,stock x4", **_LONG),
    )
}


@dataclass(frozen=True, kw_only=True)
class System:
    """One way to serve.

    Attributes:
        ranks: GPUs, or processes on a CPU.
        non_dit: ranks that encode and decode, where they are apart.
        sp: sequence parallel degree of a replica.
        pair: this system and the other pair are compared at one common arrival rate (async against lock-step).
    """

    kind: Kind
    ranks: int
    non_dit: int = 0
    sp: int = 1
    pair: bool = False

    @property
    def name(self) -> str:
        match self.kind:
            case "colocated":
                return f"colocated sp{self.sp}" if self.sp > 1 else f"colocated x{self.ranks}"
            case "stock-replicas":
                return f"stock x{self.ranks}"
            case "stock-cp":
                return f"stock cp{self.ranks}"
        suffix = f" sp{self.sp}" if self.sp > 1 else ""
        return f"{self.kind} {self.non_dit}+{self.dit}{suffix}"

    @property
    def letter(self) -> str:
        return SPREAD if self.kind == "colocated" and self.sp > 1 else LETTERS[self.kind]

    @property
    def dit(self) -> int:
        """Ranks that denoise."""
        return self.ranks - self.non_dit

    @property
    def units(self) -> int:
        """Requests that denoise at once."""
        return 1 if self.kind == "stock-cp" else self.dit // self.sp


def systems_for(workload: Workload, ranks: int) -> list[System]:
    """Every system, the order being that of their runs: lock-step's capacity sets the pair's common arrival rate.

    Async and lock-step are compared at one sequence parallel degree, all DiT ranks being one replica, so that lock-step
    leaves none idle. A family without a plan has no such replica: there the pair has one DiT rank.
    """
    sp = ranks - 1 if workload.plan else 1
    pair_ranks = ranks if workload.plan else 2
    found = [
        System(kind="lock-step", ranks=pair_ranks, non_dit=1, sp=sp, pair=True),
        System(kind="async", ranks=pair_ranks, non_dit=1, sp=sp, pair=True),
        System(kind="async", ranks=ranks, non_dit=1),
        System(kind="colocated", ranks=ranks),
        System(kind="stock-replicas", ranks=ranks),
        System(kind="stock-cp", ranks=ranks),
        System(kind="colocated", ranks=ranks, sp=ranks),
    ]
    if ranks >= 4:
        found.append(System(kind="async", ranks=ranks, non_dit=2))
    return list({system.name: system for system in reversed(found)}.values())[::-1]


def select(systems: Sequence[System], wanted: str) -> list[System]:
    """Those that ``wanted`` names: letters or names, comma-separated (``a,b,stock x4``).

    Raises:
        ValueError: a part of ``wanted`` names none.
    """
    parts = [part.strip() for part in wanted.split(",") if part.strip()]
    for part in parts:
        if not any(part in (system.letter, system.name) for system in systems):
            known = ", ".join(f"{system.letter} ({system.name})" for system in systems)
            raise ValueError(f"there is no system {part!r}; there are {known}")
    return [system for system in systems if {system.letter, system.name} & set(parts)]


def not_possible(workload: Workload, system: System) -> str:
    """Why ``system`` can't serve ``workload``; empty where it can."""
    if system.kind in ("stock-replicas", "stock-cp") and not workload.stock:
        return "no stock pipeline"
    if system.kind == "stock-cp" and not workload.plan:
        return "no plan: diffusers has no context parallel plan for this transformer"
    if system.sp > 1 and not workload.plan:
        return "no plan: this transformer can't be spread over ranks"
    return ""
