"""How many requests a second a placement can make, by the stage times that were measured, and what others could.

With e, d, v the seconds of encode, denoise and decode: fixed roles make min(encoders/e, replicas/d, decoders/v), or
k/(e + v) where k ranks do both; in lock-step k/(e + d + v); pipelines with all roles n/(e + d + v).
``docs/performance.md`` has how near the engine comes to these.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ditrelay.runtime.messages import Heartbeat
from ditrelay.runtime.metrics import COMPUTE_KINDS, Span
from ditrelay.runtime.topology import COLOCATED, Roles, Topology

LEAST_REQUESTS = 3
SAME = 0.02  # of a rate: differences below it are called none
_GIB = 1 << 30


@dataclass(frozen=True)
class StageSeconds:
    """Medians over ``requests`` requests; ``denoise`` is that of one replica of the placement they were made with."""

    encode: float
    denoise: float
    decode: float
    requests: int

    @property
    def whole(self) -> float:
        """Seconds of one request on a pipeline with all roles."""
        return self.encode + self.denoise + self.decode


@dataclass(frozen=True)
class Option:
    """A placement, and the requests a second that it makes at most. ``apart``: the DiT is on ranks of its own."""

    name: str
    rate: float
    apart: bool


@dataclass(frozen=True)
class Advice:
    """``options``: the present placement first, then others on the same ranks; none where nothing can be said.

    ``text`` is all of it in words.
    """

    seconds: StageSeconds
    options: tuple[Option, ...]
    text: str


def measured(spans: Iterable[Span]) -> StageSeconds | None:
    """What the requests took all of whose stages are among ``spans``; None for fewer than ``LEAST_REQUESTS``."""
    of: dict[str, dict[str, float]] = {}
    for span in spans:
        if span.kind in COMPUTE_KINDS:
            of.setdefault(span.request_id, {})[span.kind] = span.seconds
    whole = [stages for stages in of.values() if len(stages) == len(COMPUTE_KINDS)]
    if len(whole) < LEAST_REQUESTS:
        return None
    encode, denoise, decode = (statistics.median(each[k] for each in whole) for k in ("encode", "denoise", "decode"))
    return StageSeconds(encode, denoise, decode, len(whole))


def advise(
    topology: Topology, seconds: StageSeconds, *, lock_step: bool, ranks: Sequence[Heartbeat], cores: int | None
) -> Advice:
    """What the stage times say of the placement.

    Args:
        lock_step: transfers are waited for at once.
        ranks: the last heartbeat of every rank that had one; they tell whether one GPU could hold all roles.
        cores: that ranks on a CPU share; None on GPUs.
    """
    taken = (
        f"{seconds.requests} requests took {seconds.encode:.3g} s to encode, {seconds.denoise:.3g} s to denoise and "
        f"{seconds.decode:.3g} s to decode (medians)"
    )
    if cores is not None and cores < topology.world_size:
        shared = f"{topology.world_size} ranks share {cores} cores, so which placement is best can't be told here"
        return Advice(seconds, (), f"{taken}; {shared}.")
    present = _present(topology, seconds, lock_step=lock_step)
    others = _others(topology, seconds, present)
    options = (present, *others)
    said = [f"{taken}: {present.name} can make {present.rate:.3g} requests/s at most"]
    said += [f"{option.name} {_compared(option, present)}" for option in others]
    return Advice(seconds, options, "; ".join(said) + "." + _verdict(topology, options, ranks))


def _present(topology: Topology, seconds: StageSeconds, *, lock_step: bool) -> Option:
    if not topology.edges:
        return _pipelines(len(topology.units), max(len(unit.members) for unit in topology.units), seconds)
    dit = sum(len(unit.members) for unit in topology.units if "denoise" in unit.roles)
    encoders, decoders, replicas = len(topology.encoders), len(topology.decoders), len(topology.replicas)
    together = topology.encoders == topology.decoders
    name = f"{dit} DiT + {encoders} non-DiT" if together else f"{dit} DiT + {encoders} encode + {decoders} decode"
    if lock_step:
        return Option(f"{name} in lock-step", min(encoders, replicas) / seconds.whole, apart=True)
    rate = min(encoders / seconds.encode, replicas / seconds.denoise, decoders / seconds.decode)
    return Option(name, _split_rate(encoders, replicas, seconds) if together else rate, apart=True)


def _others(topology: Topology, seconds: StageSeconds, present: Option) -> list[Option]:
    """Pipelines with all roles, and the best split where it is not the present one; replicas stay as they are.

    How fast replicas of another size would be is not known; so where they differ in size, nothing is said.
    """
    sizes = {len(unit.members) for unit in topology.units if "denoise" in unit.roles}
    if len(sizes) > 1 or topology.world_size == 1:
        return []
    size, ranks = min(sizes), topology.world_size
    found = []
    if topology.edges:
        found.append(_pipelines(ranks // size, size, seconds))
    splits = [
        Option(f"{(ranks - k) // size * size} DiT + {k} non-DiT", _split_rate(k, (ranks - k) // size, seconds), True)
        for k in range(1, ranks - size + 1)
    ]
    best = max(splits, key=lambda option: option.rate, default=None)
    if best is not None and (not topology.edges or best.rate > (1 + SAME) * present.rate):
        found.append(best)
    return found


def _split_rate(others: int, replicas: int, seconds: StageSeconds) -> float:
    return min(others / (seconds.encode + seconds.decode), replicas / seconds.denoise)


def _pipelines(units: int, size: int, seconds: StageSeconds) -> Option:
    """``units`` times ``size`` ranks with all roles."""
    name = f"{units} with all roles" if size == 1 else f"{units} x {size} with all roles"
    return Option(name, units / seconds.whole, apart=False)


def _compared(option: Option, present: Option) -> str:
    change = option.rate / present.rate - 1
    what = "no more and no fewer" if abs(change) < SAME else f"{abs(change):.0%} {'more' if change > 0 else 'fewer'}"
    return f"{option.rate:.3g} ({what})"


def _verdict(topology: Topology, options: Sequence[Option], ranks: Sequence[Heartbeat]) -> str:
    """Whether to disaggregate; empty where that was not compared."""
    if len(options) < 2:
        return ""
    needed, there = _memory(topology, ranks)
    if needed > there > 0:
        return f" All roles need about {needed / _GIB:.1f} GiB and a rank has {there / _GIB:.1f}: disaggregate."
    whole, apart = (max((o.rate for o in options if o.apart is wanted), default=0.0) for wanted in (False, True))
    if apart > (1 + SAME) * whole:
        return " Disaggregate."
    return " Disaggregate for memory, not for requests a second."


def _memory(topology: Topology, ranks: Sequence[Heartbeat]) -> tuple[int, int]:
    """Bytes that a GPU with all roles would need at most, and the smallest GPU's; zeros where that isn't known."""
    peaks: dict[Roles, int] = {}
    for beat in ranks:
        roles = topology.roles_of(beat.rank)
        peaks[roles] = max(peaks.get(roles, 0), beat.device_peak)
    if COLOCATED in peaks or frozenset().union(*peaks) != COLOCATED:
        return 0, 0
    return sum(peaks.values()), min(beat.device_total for beat in ranks)
