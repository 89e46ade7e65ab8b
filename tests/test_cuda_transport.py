"""Edges between two GPUs, over both backends: what arrives, and what happens when a process dies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_peer import connect, move, payload

from ditrelay.errors import TransferError
from ditrelay.runtime.communication.backends import choose_backend
from ditrelay.runtime.communication.endpoint import Endpoint
from ditrelay.runtime.communication.store import StoreServer
from ditrelay.runtime.topology import Edge

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SIZES = [1, 3, 511, 100_000, 4 << 20, (64 << 20) + 5, 1000]
SOURCE, TARGET = 1, 0


class Spares:
    """Peer processes that have imported torch and wait to be told what to do."""

    def __init__(self) -> None:
        self._waiting = deque(self._start() for _ in range(3))

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("cuda_peer.py"))]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, *words: object) -> subprocess.Popen[str]:
        """One process, told this; another one takes its place."""
        peer = self._waiting.popleft()
        self._waiting.append(self._start())
        assert peer.stdin is not None
        peer.stdin.write(" ".join(map(str, words)) + "\n")
        peer.stdin.flush()
        return peer

    def close(self) -> None:
        for peer in self._waiting:
            peer.kill()
            peer.communicate()


class World:
    """A store, and a peer process for each generation of the edge."""

    def __init__(self, backend: str, spares: Spares) -> None:
        self.backend = backend
        self._spares = spares
        self._server = StoreServer()
        self._generation = -1
        self._peers: list[subprocess.Popen[str]] = []
        self._ends: list[Endpoint] = []

    def open(self, rank: int, mode: str, *sizes: int) -> tuple[Endpoint, subprocess.Popen[str]]:
        """This process's end as ``rank``, and the process that has the other one."""
        self._generation += 1
        peer = self._spares.send(self._server.port, self.backend, self._generation, 1 - rank, mode, *sizes)
        self._peers.append(peer)
        self._ends.append(connect(self._server.port, self.backend, self._generation, rank))
        return self._ends[-1], peer

    def close(self) -> None:
        for peer in self._peers:
            peer.kill()
            peer.communicate()
        for end in self._ends:
            end.close("the test is over")


@pytest.fixture(scope="module")
def spares() -> Iterator[Spares]:
    made = Spares()
    yield made
    made.close()


@pytest.fixture(params=["torch", "cuda_ipc"])
def world(request: pytest.FixtureRequest, spares: Spares) -> Iterator[World]:
    made = World(request.param, spares)
    yield made
    made.close()


def works_again(world: World, rank: int) -> None:
    """A new edge to a new process, and this process's GPU is well."""
    end, _ = world.open(rank, "move", *SIZES[:5])
    assert all(move(end, rank, seq, size) for seq, size in enumerate(SIZES[:5]))
    square = torch.ones(64, 64, device=f"cuda:{rank}")
    assert (square @ square).sum().item() == 64**3


@pytest.mark.parametrize("rank", [SOURCE, TARGET])
def test_payloads_of_any_size_arrive_as_they_were_sent(world: World, rank: int) -> None:
    end, peer = world.open(rank, "move", *SIZES)
    assert all(move(end, rank, seq, size) for seq, size in enumerate(SIZES))
    assert peer.stdout is not None and peer.stdout.readline() == "moved\n"


@pytest.mark.parametrize("rank", [SOURCE, TARGET])
def test_a_peer_that_dies_fails_the_transfer_by_name_and_the_edge_is_made_anew(world: World, rank: int) -> None:
    end, peer = world.open(rank, "move")
    assert peer.stdout is not None and peer.stdout.readline() == "moved\n"
    end._timeout = 3.0  # so that an NCCL send is given up soon
    tensors = payload(64 << 20, rank)  # NCCL takes a small one without the receiver
    work = end.isend(tensors, seq=0) if rank == SOURCE else end.irecv(tensors, seq=0)
    assert not work.wait_done(0.2)
    peer.kill()
    began = time.monotonic()
    with pytest.raises(TransferError, match="transfer 1->0 #0"):
        work.wait(20.0)
    if world.backend == "cuda_ipc" or rank == TARGET:  # an NCCL send that is posted does not notice
        assert time.monotonic() - began < 1.0
    end.close("its peer died")
    works_again(world, rank)


@pytest.mark.parametrize("world", ["cuda_ipc"], indirect=True)
def test_a_sender_that_dies_while_the_receiver_pulls_is_an_error_and_no_more(world: World) -> None:
    size = 8 << 30  # some 25 ms of copying
    tensors = [torch.empty(part, dtype=torch.uint8, device="cuda:0") for part in (size // 3, size - size // 3)]
    end, peer = world.open(TARGET, "die", size)
    work = end.irecv(tensors, seq=0)
    with pytest.raises(TransferError, match="transfer 1->0 #0: the other end closed"):
        work.wait(60.0)
    assert peer.wait(10.0) < 0
    end.close("its peer died")
    del tensors
    works_again(world, TARGET)


def test_auto_takes_cuda_ipc_where_the_gpus_reach_each_other() -> None:
    reach = torch.cuda.can_device_access_peer(0, 1)
    assert choose_backend("auto", Edge(1, 0), torch.device("cuda", 0)) == ("cuda_ipc" if reach else "torch")
