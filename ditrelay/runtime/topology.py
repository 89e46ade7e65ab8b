"""Ranks, the roles they play, the replicas they form and the edges between them. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from ditrelay.runtime.degrees import shrunk_ring
from ditrelay.runtime.server_args import ServerArgs

Role = Literal["encode", "denoise", "decode"]
Roles = frozenset[Role]

COLOCATED: Roles = frozenset({"encode", "denoise", "decode"})
DIT: Roles = frozenset({"denoise"})
NON_DIT: Roles = frozenset({"encode", "decode"})
ENCODE: Roles = frozenset({"encode"})
DECODE: Roles = frozenset({"decode"})

_PLAN_COLUMNS = 100
_ROLE_ORDER: tuple[Role, ...] = ("encode", "denoise", "decode")


def role_name(roles: Roles) -> str:
    """``non_dit``, ``dit``, ``colocated``, ``encode`` or ``decode``; other sets by their roles (``encode+denoise``)."""
    named = {COLOCATED: "colocated", DIT: "dit", NON_DIT: "non_dit"}
    return named.get(roles) or "+".join(role for role in _ROLE_ORDER if role in roles)


class Edge(NamedTuple):
    """A directed path for tensors between the leaders of two units."""

    src: int
    dst: int

    def __str__(self) -> str:
        return f"{self.src}->{self.dst}"


@dataclass(frozen=True)
class Unit:
    """Ranks that work on one request together: what work is dispatched to.

    Attributes:
        leader: the rank that has the unit's edges and talks to the head.
        members: all ranks of the unit, leader first; those after it only denoise.
        roles: the leader's roles.
        sp: sequence parallel degree.
        ring: the part of it that is ring attention; the rest, ``sp / ring``, is Ulysses.
        tp: tensor parallel degree.
        cfg: ranks over which the guidance branches are spread; ``sp * tp * cfg`` is the number of members.
    """

    leader: int
    members: tuple[int, ...]
    roles: Roles
    sp: int = 1
    tp: int = 1
    cfg: int = 1
    ring: int = 1

    def __post_init__(self) -> None:
        assert self.members[0] == self.leader, "the leader is the first member"

    def __str__(self) -> str:
        return f"{role_name(self.roles)} {_ranges(self.members)}"


@dataclass(frozen=True)
class Topology:
    """Who does what, and which edges join them.

    Attributes:
        units: by leader; together they hold every rank once.
        hosts: the machine of each rank.
    """

    units: tuple[Unit, ...]
    hosts: tuple[str, ...]

    @classmethod
    def build(cls, args: ServerArgs) -> Topology:
        """The topology that ``args`` asks for.

        Disaggregated: DiT replicas of ``sp_degree * tp_size * cfg_parallel_degree`` ranks from rank 0 on, the non-DiT
        ranks last (encoders before decoders where they are apart). Otherwise every replica has all three roles.
        """
        dit_roles = DIT if args.enable_disagg else COLOCATED
        degrees = (args.sp_degree, args.tp_size, args.cfg_parallel_degree)
        replicas = _replicas(args.num_dit_ranks, degrees, args.sequence_split[1], dit_roles)
        singles = (Unit(rank, (rank,), roles) for rank, roles in _non_dit(args))
        return cls((*replicas, *singles), ("localhost",) * args.num_gpus)

    @property
    def world_size(self) -> int:
        return len(self.hosts)

    @cached_property
    def encoders(self) -> tuple[int, ...]:
        """Leaders of the units that encode."""
        return self._leaders("encode")

    @cached_property
    def replicas(self) -> tuple[int, ...]:
        """Leaders of the units that denoise."""
        return self._leaders("denoise")

    @cached_property
    def decoders(self) -> tuple[int, ...]:
        """Leaders of the units that decode."""
        return self._leaders("decode")

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Encoder to replica, then replica to decoder. A unit with both roles keeps its requests: no edge."""
        return (*self._joining("encode", "denoise"), *self._joining("denoise", "decode"))

    def unit_of(self, rank: int) -> Unit:
        """The unit that ``rank`` leads or is a member of. Raises ``KeyError`` for a rank that does not exist."""
        return self._unit_by_rank[rank]

    def roles_of(self, rank: int) -> Roles:
        """The roles of ``rank`` itself: its unit's where it leads, else ``denoise``."""
        unit = self.unit_of(rank)
        return unit.roles if rank == unit.leader else DIT

    def plan(self) -> str:
        """A table of the units, at most 100 columns wide, for people."""
        with_cfg = any(unit.cfg > 1 for unit in self.units)
        rows = [("ranks", "role", "replica", "sp x tp x cfg" if with_cfg else "sp x tp", "sends to")]
        rows += [self._plan_row(unit, with_cfg) for unit in self.units]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(_cut(line.rstrip()) for line in lines)

    def _plan_row(self, unit: Unit, with_cfg: bool) -> tuple[str, str, str, str, str]:
        ranks, role = _ranges(unit.members), role_name(unit.roles)
        targets = _ranges(edge.dst for edge in self.edges if edge.src == unit.leader) or "-"
        if "denoise" not in unit.roles:
            return ranks, role, "-", "-", targets
        degrees = (unit.sp, unit.tp, unit.cfg) if with_cfg else (unit.sp, unit.tp)
        return ranks, role, str(self.replicas.index(unit.leader)), " x ".join(map(str, degrees)), targets

    def _leaders(self, role: Role) -> tuple[int, ...]:
        return tuple(unit.leader for unit in self.units if role in unit.roles)

    def _joining(self, giving: Role, taking: Role) -> Iterator[Edge]:
        both = {giving, taking}
        givers = [unit.leader for unit in self.units if both & unit.roles == {giving}]
        takers = [unit.leader for unit in self.units if both & unit.roles == {taking}]
        return (Edge(src, dst) for src in givers for dst in takers)

    @cached_property
    def _unit_by_rank(self) -> dict[int, Unit]:
        return {rank: unit for unit in self.units for rank in unit.members}


def _replicas(ranks: int, degrees: tuple[int, int, int], ring: int, roles: Roles) -> Iterator[Unit]:
    """Units over ranks 0 to ``ranks - 1``; what is left past the last full one makes smaller ones."""
    first = 0
    while first < ranks:
        sp, tp, cfg = _fitting(ranks - first, degrees)
        members = tuple(range(first, first + sp * tp * cfg))
        yield Unit(first, members, roles, sp, tp, cfg, shrunk_ring(ring, sp))
        first = members[-1] + 1


def _fitting(ranks: int, degrees: tuple[int, int, int]) -> tuple[int, int, int]:
    """``degrees`` (sp, tp, cfg) shrunk until ``ranks`` are enough: sp first, as it only costs speed, never memory.

    Only divisors of a degree are tried: attention heads that divide by 4 divide by 2, and need not divide by 3.
    """
    fitting = list(degrees)
    for i, degree in enumerate(degrees):
        fitting[i] = next((d for d in _divisors_down(degree) if d * math.prod(fitting) // fitting[i] <= ranks), 1)
    return fitting[0], fitting[1], fitting[2]


def _divisors_down(number: int) -> list[int]:
    return [d for d in range(number, 0, -1) if number % d == 0]


def _non_dit(args: ServerArgs) -> Iterator[tuple[int, Roles]]:
    """The ranks without a DiT, each with its roles."""
    split = args.encoder_decoder_split
    first_decoder = args.num_gpus - split[1] if split else args.num_gpus
    for rank in range(args.num_dit_ranks, args.num_gpus):
        yield rank, (NON_DIT if split is None else ENCODE if rank < first_decoder else DECODE)


def _ranges(ranks: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"0-2, 5"``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(_run(run) for run in runs)


def _run(run: Sequence[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"


def _cut(line: str) -> str:
    return line if len(line) <= _PLAN_COLUMNS else line[: _PLAN_COLUMNS - 3] + "..."
