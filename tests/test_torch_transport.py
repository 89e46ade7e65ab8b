"""gloo edges: both ends in this process (raw groups belong to no world), and peers that die in another."""

from __future__ import annotations

import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from ditrelay.errors import TransferError, TransferTimeout
from ditrelay.runtime.communication.store import StoreServer, connect_store
from ditrelay.runtime.communication.torch_transport import TorchTransport
from ditrelay.runtime.topology import Edge

EDGE = Edge(3, 0)
CPU = torch.device("cpu")
SOON = 10.0

PEER = """
import sys, time, torch
from ditrelay.runtime.communication.store import connect_store
from ditrelay.runtime.communication.torch_transport import TorchTransport
from ditrelay.runtime.topology import Edge
store = connect_store("127.0.0.1", int(sys.argv[1]), 30)
end = TorchTransport.connect(store, Edge(3, 0), 0, 3, device=torch.device("cpu"), timeout=30)
end.isend([torch.ones(4)], seq=0).wait(30)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def server() -> StoreServer:
    return StoreServer()


@pytest.fixture
def generation(request: pytest.FixtureRequest, server: StoreServer) -> int:
    """Another one for each test: they share the store."""
    return server.store.add("generation", 1)


def connect(server: StoreServer, generation: int, rank: int, timeout: float = SOON) -> TorchTransport:
    store = connect_store(server.host, server.port, timeout)
    return TorchTransport.connect(store, EDGE, generation, rank, device=CPU, timeout=timeout)


def make_pair(server: StoreServer, generation: int, timeout: float = SOON) -> list[TorchTransport]:
    """The sending and the receiving end."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: connect(server, generation, rank, timeout), EDGE))


@pytest.fixture
def pair(server: StoreServer, generation: int) -> Iterator[list[TorchTransport]]:
    ends = make_pair(server, generation)
    yield ends
    for end in ends:
        end.close("the test is over")


def test_a_payload_of_many_dtypes_arrives_as_it_was_sent(pair: list[TorchTransport]) -> None:
    source, target = pair
    sent = [
        torch.randn(1000, 100),
        torch.randn(8).to(torch.bfloat16),
        torch.randn(8).to(torch.float8_e4m3fn),
        torch.tensor([True, False]),
        torch.empty(0, 3),
        torch.tensor(7),
        torch.randn(3, dtype=torch.complex64),
    ]
    received = [torch.empty_like(tensor) for tensor in sent]
    works = [source.isend(sent, seq=0), target.irecv(received, seq=0)]
    for work in works:
        work.wait(SOON)
    for a, b in zip(sent, received, strict=True):
        assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def test_only_empty_tensors_put_nothing_on_the_wire(pair: list[TorchTransport]) -> None:
    source, _ = pair
    source.isend([torch.empty(0)], seq=0).wait(SOON)  # a posted send would wait for the receiver


def test_several_payloads_are_in_flight_and_keep_their_order(pair: list[TorchTransport]) -> None:
    source, target = pair
    sent = [[torch.full((1000 + i,), float(i)), torch.tensor([i])] for i in range(30)]
    received = [[torch.empty_like(tensor) for tensor in tensors] for tensors in sent]
    works = [source.isend(tensors, seq=i) for i, tensors in enumerate(sent)]
    works += [target.irecv(tensors, seq=i) for i, tensors in enumerate(received)]
    for work in works:
        work.wait(SOON)
    assert all(torch.equal(a, b) for s, r in zip(sent, received, strict=True) for a, b in zip(s, r, strict=True))


def test_sending_copies_nothing_and_returns_before_the_receiver_is_there(pair: list[TorchTransport]) -> None:
    source, target = pair
    big = torch.zeros(1 << 20)
    work = source.isend([big], seq=0)
    assert not work.wait_done(0.05)
    big.fill_(1.0)  # forbidden to users; here it shows that the wire reads the tensor itself
    received = torch.zeros(1 << 20)
    target.irecv([received], seq=0).wait(SOON)
    work.wait(SOON)
    assert received.min() == 1.0


def test_a_receive_whose_send_never_comes_fails_at_the_deadline(server: StoreServer, generation: int) -> None:
    source, target = make_pair(server, generation, timeout=0.5)
    works = [target.irecv([torch.zeros(4)], seq=i, request_id="r1") for i in (4, 5)]
    began = time.monotonic()
    with pytest.raises(TransferTimeout, match=r"transfer 3->0 #4 of request r1: not complete within 0.5 s"):
        works[0].wait(SOON)
    with pytest.raises(TransferError, match=r"transfer 3->0 #5 of request r1: the edge is down"):
        works[1].wait(SOON)
    assert time.monotonic() - began < 3.0
    with pytest.raises(TransferError, match="transfer 3->0 #0: "):  # and the sender hears of it
        source.isend([torch.zeros(4)], seq=0).wait(SOON)


def test_transfers_that_do_not_belong_together_are_never_mixed_up(server: StoreServer, generation: int) -> None:
    """gloo aborts the process when a receive is smaller than its send; a different seq must not get that far."""
    source, target = make_pair(server, generation, timeout=0.5)
    works = [source.isend([torch.ones(100)], seq=1), target.irecv([torch.zeros(1)], seq=2)]
    for work in works:
        with pytest.raises(TransferError):
            work.wait(SOON)


def test_closing_one_end_fails_the_other_at_once(pair: list[TorchTransport]) -> None:
    source, target = pair
    work = source.isend([torch.zeros(4)], seq=0, request_id="r")
    work_after = source.isend([torch.zeros(4)], seq=1, request_id="r")
    assert not work.wait_done(0.05)
    target.close("test")
    with pytest.raises(TransferError, match="3->0 #0 of request r: .*closed"):
        work.wait(2.0)
    with pytest.raises(TransferError, match="3->0 #1 of request r: the edge is down"):
        work_after.wait(2.0)


class Memory(bytearray):
    """Memory under a tensor; unlike a tensor's own it tells when it is let go of."""


def test_closing_while_gloo_waits_returns_at_once_and_keeps_the_tensors(server: StoreServer, generation: int) -> None:
    _, target = make_pair(server, generation, timeout=1.0)
    memory = Memory(16)
    alive = weakref.ref(memory)
    work = target.irecv([torch.frombuffer(memory, dtype=torch.uint8)], seq=0)
    del memory
    assert not work.wait_done(0.1)
    began = time.monotonic()
    target.close("worker 3 died")
    assert time.monotonic() - began < 0.5
    with pytest.raises(TransferError, match="the edge is down: worker 3 died"):
        work.wait(0.0)
    assert alive() is not None, "gloo may still write there"
    target._thread.join(SOON)
    assert alive() is None, "gloo's own deadline passed"


def test_an_absent_peer_fails_the_set_up_in_time(server: StoreServer, generation: int) -> None:
    began = time.monotonic()
    with pytest.raises(TransferTimeout, match=rf"3->0: the edge \(generation {generation}\) could not be set up"):
        connect(server, generation, 0, timeout=0.5)
    assert time.monotonic() - began < 3.0


def test_an_absent_store_fails_in_time() -> None:
    with pytest.raises(TransferError, match=r"store 127.0.0.1:1: it does not answer within 0.2 s"):
        connect_store("127.0.0.1", 1, 0.2)


def test_an_edge_can_be_made_anew_while_another_goes_on(server: StoreServer, generation: int) -> None:
    other = make_pair(server, server.store.add("generation", 1))
    source, target = make_pair(server, generation, timeout=0.3)
    with pytest.raises(TransferTimeout):
        target.irecv([torch.zeros(4)], seq=0).wait(SOON)
    source.close("test")
    for pair in (make_pair(server, server.store.add("generation", 1)), other):
        received = torch.zeros(4)
        works = [pair[0].isend([torch.ones(4)], seq=0), pair[1].irecv([received], seq=0)]
        for work in works:
            work.wait(SOON)
        assert received.sum() == 4
        for end in pair:
            end.close("the test is over")


def test_a_killed_peer_fails_the_transfer_at_once(server: StoreServer) -> None:
    peer = subprocess.Popen([sys.executable, "-c", PEER, str(server.port)])
    try:
        target = connect(server, 0, 0, timeout=30.0)
        target.irecv([torch.zeros(4)], seq=0).wait(30.0)
        work = target.irecv([torch.zeros(4)], seq=1, request_id="r")
        assert not work.wait_done(0.05)
        peer.kill()
        with pytest.raises(TransferError, match="3->0 #1 of request r: .*closed"):
            work.wait(3.0)
    finally:
        peer.kill()
        peer.wait()


def test_store_and_edges_listen_on_the_loopback_only(server: StoreServer, pair: list[TorchTransport]) -> None:
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert server.port in [address.port for address in listening] and len(listening) >= 3
    assert {address.ip for address in listening} == {"127.0.0.1"}
