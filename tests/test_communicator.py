"""Transfers by direction, over the in-memory transport."""

from __future__ import annotations

import threading

import pytest
import torch

from ditrelay.errors import TransferCorrupt, TransferError
from ditrelay.runtime.communication.codec import encode_state
from ditrelay.runtime.communication.communicator import DisaggCommunicator
from ditrelay.runtime.communication.local_transport import LocalNetwork
from ditrelay.runtime.communication.transport import Transport
from ditrelay.runtime.payloads import StateValue
from ditrelay.runtime.topology import DECODE, DIT, ENCODE, NON_DIT, Edge, Roles

SOON = 5.0

ONE_NON_DIT: dict[int, Roles] = {0: DIT, 1: DIT, 3: NON_DIT}


def world(roles: dict[int, Roles], edges: list[Edge] | None = None) -> dict[int, DisaggCommunicator]:
    """A communicator per rank; all edges between DiT and other ranks are open."""
    network = LocalNetwork()

    def make(rank: int) -> DisaggCommunicator:
        def connect(edge: Edge, generation: int) -> Transport:
            return network.connect(edge, generation, rank, timeout=SOON)

        return DisaggCommunicator(rank, roles.__getitem__, connect, SOON)

    comms = {rank: make(rank) for rank in roles}
    default = [Edge(a, b) for a in roles for b in roles if (roles[a] == DIT) != (roles[b] == DIT)]
    for edge in default if edges is None else edges:
        for rank in edge:
            comms[rank].open_edge(edge, 0)
    return comms


def values(*numbers: float) -> list[torch.Tensor]:
    return [torch.full((3,), number) for number in numbers]


def test_conditioning_goes_out_and_latents_come_back() -> None:
    comms = world(ONE_NON_DIT)
    out, back = values(0, 0), torch.zeros(3)
    sends = [comms[3].isend_to_dit(values(1, 2), dst=1), comms[1].isend_to_non_dit(torch.full((3,), 5.0))]
    receives = [comms[1].irecv_from_non_dit(out), comms[3].irecv_from_dit(back, src=1)]
    comms[3].wait_work(sends[0])
    comms[1].wait_all_works([sends[1], *receives], timeout=SOON)
    assert [tensor[0].item() for tensor in [*out, back]] == [1, 2, 5]


def test_the_blocking_methods_move_the_same() -> None:
    comms = world(ONE_NON_DIT)
    back = torch.zeros(3)

    def dit() -> None:
        tensor = torch.zeros(3)
        comms[0].recv_from_non_dit(tensor)
        comms[0].send_to_non_dit(tensor * 2)

    thread = threading.Thread(target=dit)
    thread.start()
    comms[3].send_to_dit(torch.full((3,), 4.0), dst=0)
    comms[3].recv_from_dit(back, src=0)
    thread.join(SOON)
    assert back[0] == 8


def test_leaving_the_peer_out_needs_exactly_one_edge_of_that_direction() -> None:
    comms = world(ONE_NON_DIT)
    with pytest.raises(TransferError, match=r"3->any: rank 3 needs exactly one .*encode -> denoise.*: 3->0, 3->1"):
        comms[3].isend_to_dit(torch.zeros(1))
    with pytest.raises(TransferError, match=r"0->any: .* it has: none"):
        comms[0].isend_to_dit(torch.zeros(1))


def test_separate_encoders_and_decoders_are_told_apart() -> None:
    comms = world({0: DIT, 1: ENCODE, 2: DECODE}, [Edge(1, 0), Edge(0, 2)])
    received = torch.zeros(3)
    comms[1].isend_to_dit(torch.ones(3))
    comms[0].recv_from_non_dit(received)
    comms[0].isend_to_non_dit(received)
    comms[2].recv_from_dit(received)
    with pytest.raises(TransferError, match="decode"):
        comms[1].irecv_from_dit(received)


def test_transfers_are_counted_per_edge_unless_they_are_numbered() -> None:
    comms = world(ONE_NON_DIT)
    works = [comms[3].isend_to_dit(torch.zeros(1), dst=dst) for dst in (0, 1, 0)]
    works.append(comms[3].isend_to_dit(torch.zeros(1), dst=0, seq=7, request_id="r"))
    works.append(comms[3].isend_to_dit(torch.zeros(1), dst=0))
    assert [(work.edge.dst, work.seq) for work in works] == [(0, 0), (1, 0), (0, 1), (0, 7), (0, 8)]
    assert works[3].request_id == "r"


def test_closing_an_edge_fails_its_transfers_and_no_others() -> None:
    comms = world(ONE_NON_DIT)
    lost = comms[3].isend_to_dit(torch.zeros(3), dst=0)
    kept = comms[3].isend_to_dit(torch.ones(3), dst=1)
    comms[3].close_edge(Edge(3, 0), 0, "worker 0 died")
    with pytest.raises(TransferError, match="worker 0 died"):
        comms[3].wait_work(lost)
    comms[1].recv_from_non_dit(torch.zeros(3))
    comms[3].wait_work(kept)
    with pytest.raises(TransferError, match="any such|needs exactly one"):
        comms[3].isend_to_dit(torch.zeros(3), dst=0)


def test_a_late_close_of_an_older_generation_changes_nothing() -> None:
    comms = world(ONE_NON_DIT)
    for rank in (3, 0):
        comms[rank].open_edge(Edge(3, 0), 2)
    comms[3].close_edge(Edge(3, 0), 1, "late")
    assert comms[3].generation(Edge(3, 0)) == 2
    received = torch.zeros(3)
    comms[3].isend_to_dit(torch.ones(3), dst=0)
    comms[0].recv_from_non_dit(received)
    assert received[0] == 1


def test_a_newer_generation_replaces_the_older_and_fails_what_was_under_way() -> None:
    comms = world(ONE_NON_DIT)
    work = comms[3].isend_to_dit(torch.zeros(3), dst=0)
    comms[3].open_edge(Edge(3, 0), 1)
    with pytest.raises(TransferError, match="replaced by generation 1"):
        comms[3].wait_work(work)


def test_a_generation_closed_while_it_is_opened_stays_closed() -> None:
    edge = Edge(3, 0)
    network = LocalNetwork()

    def connect(edge: Edge, generation: int) -> Transport:
        comm.close_edge(edge, generation, "worker 3 died meanwhile")
        return network.connect(edge, generation, 0)

    comm = DisaggCommunicator(0, ONE_NON_DIT.__getitem__, connect, SOON)
    with pytest.raises(TransferError, match="generation 4 was closed while it was opened"):
        comm.open_edge(edge, 4)
    assert comm.generation(edge) is None


def test_closing_the_communicator_closes_every_edge() -> None:
    comms = world(ONE_NON_DIT)
    works = [comms[3].isend_to_dit(torch.zeros(1), dst=dst) for dst in (0, 1)]
    comms[3].close("shutdown")
    assert all(work.error is not None and "shutdown" in str(work.error) for work in works)
    assert comms[3].generation(Edge(3, 0)) is None


def test_a_header_travels_over_the_edge_itself() -> None:
    comms = world(ONE_NON_DIT)
    header = encode_state({"x": StateValue(torch.ones(2), "g")}, batch_id="b", request_ids=["b"]).header
    works = comms[3].isend_header(header, dst=0)
    assert comms[0].recv_header(src=3) == header
    comms[3].wait_all_works(works, SOON)


@pytest.mark.parametrize("length", [0, -1, 1 << 40])
def test_a_header_of_impossible_length_is_refused(length: int) -> None:
    comms = world(ONE_NON_DIT)
    comms[3].isend_to_dit(torch.tensor([length]), dst=0)
    with pytest.raises(TransferCorrupt, match="3->0: a header of"):
        comms[0].recv_header()


@pytest.mark.parametrize(
    "rubbish",
    [b"\7" * 5, b"\x81\xa8batch_id\xa1\xff", b"\x81\xa1x" + b"\x91" * 100_000],
    ids=["another type", "bad UTF-8", "endless nesting"],
)
def test_bytes_that_are_no_header_are_refused(rubbish: bytes) -> None:
    comms = world(ONE_NON_DIT)
    comms[3].isend_to_dit(torch.tensor([len(rubbish)]), dst=0)
    comms[3].isend_to_dit(torch.tensor(list(rubbish), dtype=torch.uint8), dst=0)
    with pytest.raises(TransferCorrupt, match="3->0: no payload header"):
        comms[0].recv_header(src=3)
