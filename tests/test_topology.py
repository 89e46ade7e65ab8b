from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import COLOCATED, DECODE, DIT, ENCODE, NON_DIT, Edge, Topology, Unit, role_name


def disagg(num_gpus: int, **values: Any) -> Topology:
    return Topology.build(ServerArgs(enable_disagg=True, num_gpus=num_gpus, **values))


def members(topology: Topology) -> list[tuple[int, ...]]:
    return [unit.members for unit in topology.units]


def test_guide_example_has_three_dit_ranks_and_the_non_dit_rank_last() -> None:
    topology = disagg(4)
    assert [role_name(topology.roles_of(rank)) for rank in range(4)] == ["dit", "dit", "dit", "non_dit"]
    assert (topology.encoders, topology.replicas, topology.decoders) == ((3,), (0, 1, 2), (3,))
    assert topology.world_size == 4 and topology.hosts == ("localhost",) * 4


def test_edges_lead_from_encoder_to_replica_and_from_replica_to_decoder() -> None:
    assert [str(edge) for edge in disagg(4).edges] == ["3->0", "3->1", "3->2", "0->3", "1->3", "2->3"]


def test_what_does_not_fill_a_replica_makes_a_smaller_one() -> None:
    topology = disagg(4, sp_degree=2)
    assert topology.units[:2] == (Unit(0, (0, 1), DIT, sp=2), Unit(2, (2,), DIT))
    assert set(topology.edges) == {Edge(3, 0), Edge(3, 2), Edge(0, 3), Edge(2, 3)}


def test_members_of_a_replica_share_its_unit_and_only_denoise() -> None:
    topology = Topology.build(ServerArgs(num_gpus=2, sp_degree=2))
    assert topology.unit_of(1) is topology.unit_of(0)
    assert (topology.roles_of(0), topology.roles_of(1)) == (COLOCATED, DIT)


def test_rank_that_does_not_exist_has_no_unit() -> None:
    with pytest.raises(KeyError):
        disagg(4).unit_of(4)


def test_encoders_come_before_decoders_on_the_last_ranks() -> None:
    topology = disagg(6, num_non_dit_ranks=3, num_encoder_ranks=1)
    assert [topology.roles_of(rank) for rank in (3, 4, 5)] == [ENCODE, DECODE, DECODE]
    assert topology.edges[:4] == (Edge(3, 0), Edge(3, 1), Edge(3, 2), Edge(0, 4))
    assert len(topology.edges) == 3 + 3 * 2


def test_colocated_ranks_need_no_edges() -> None:
    topology = Topology.build(ServerArgs(num_gpus=3))
    assert topology.encoders == topology.replicas == topology.decoders == (0, 1, 2)
    assert topology.edges == ()


def test_sequence_parallel_shrinks_before_tensor_and_guidance_parallel() -> None:
    topology = disagg(8, sp_degree=2, tp_size=2)
    assert [(unit.sp, unit.tp) for unit in topology.units[:-1]] == [(2, 2), (1, 2), (1, 1)]
    guided = disagg(8, sp_degree=2, cfg_parallel_degree=2)
    assert [(unit.sp, unit.cfg) for unit in guided.units[:-1]] == [(2, 2), (1, 2), (1, 1)]


def test_a_smaller_replica_keeps_the_ring_as_far_as_it_fits() -> None:
    topology = disagg(12, ulysses_degree=2, ring_degree=4)
    assert [(unit.sp, unit.ring) for unit in topology.units[:-1]] == [(8, 4), (2, 2), (1, 1)]


def test_smaller_replica_takes_only_degrees_that_divide_the_full_one() -> None:
    assert members(disagg(8, sp_degree=4))[:-1] == [(0, 1, 2, 3), (4, 5), (6,)]


@given(
    ranks=st.integers(1, 40),
    sp=st.integers(1, 8),
    tp=st.integers(1, 4),
    cfg=st.integers(1, 2),
    non_dit=st.integers(0, 6),
)
def test_every_rank_is_in_exactly_one_unit(ranks: int, sp: int, tp: int, cfg: int, non_dit: int) -> None:
    if sp * tp * cfg > ranks:
        return
    args = ServerArgs(
        num_gpus=ranks + non_dit,
        sp_degree=sp,
        tp_size=tp,
        cfg_parallel_degree=cfg,
        enable_disagg=non_dit > 0,
        num_non_dit_ranks=max(non_dit, 1),
    )
    topology = Topology.build(args)
    assert [rank for unit in topology.units for rank in unit.members] == list(range(ranks + non_dit))
    for unit in topology.units:
        assert unit.sp * unit.tp * unit.cfg == len(unit.members)
        assert sp % unit.sp == tp % unit.tp == cfg % unit.cfg == 0
        assert all(topology.unit_of(rank) is unit for rank in unit.members)
    assert len(topology.edges) == 2 * non_dit * len(topology.replicas)


@pytest.mark.parametrize(
    "roles, name",
    [(COLOCATED, "colocated"), (DIT, "dit"), (NON_DIT, "non_dit"), (ENCODE, "encode"), (DECODE, "decode")],
)
def test_role_names_are_the_guides(roles: frozenset[Any], name: str) -> None:
    assert role_name(roles) == name


def test_unusual_role_sets_are_named_by_their_roles() -> None:
    assert role_name(ENCODE | DIT) == "encode+denoise"


def test_plan_shows_replicas_degrees_and_edges() -> None:
    assert disagg(4, sp_degree=2).plan().splitlines() == [
        "ranks  role     replica  sp x tp  sends to",
        "0-1    dit      0        2 x 1    3",
        "2      dit      1        1 x 1    3",
        "3      non_dit  -        -        0, 2",
    ]


def test_plan_fits_a_hundred_columns_however_many_edges() -> None:
    plan = disagg(122, sp_degree=2, num_non_dit_ranks=2, num_encoder_ranks=1).plan()
    assert max(map(len, plan.splitlines())) == 100
    assert "sp x tp x cfg" in disagg(5, cfg_parallel_degree=2).plan()
