"""The exchange over shared memory, with memory that one process shares with itself in place of a GPU's."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from ditrelay.errors import TransferError, TransferTimeout
from ditrelay.runtime.communication import cuda_ipc_transport
from ditrelay.runtime.communication.backends import connect_edge
from ditrelay.runtime.communication.edge_channel import Channel, Ready, SlotHandle, dial, listen
from ditrelay.runtime.communication.endpoint import Endpoint, Job, LinkDown
from ditrelay.runtime.communication.ipc_link import ReceivingLink, SendingLink
from ditrelay.runtime.communication.store import StoreServer, connect_store
from ditrelay.runtime.communication.transport import Early, Work
from ditrelay.runtime.run_dir import RunDir
from ditrelay.runtime.topology import Edge

EDGE = Edge(3, 0)
SOON = 10.0
LISTENER = """
import sys
from ditrelay.runtime.communication.edge_channel import listen
from ditrelay.runtime.communication.store import connect_store
listen(connect_store("127.0.0.1", int(sys.argv[1]), 60), 60, sys.argv[2])
"""


class Moment:
    """An event that is complete once ``gate`` is open."""

    def __init__(self, gate: threading.Event) -> None:
        self._gate = gate

    def query(self) -> bool:
        return self._gate.is_set()


class Copy(Moment):
    """A copy that is queued behind ``ready`` and complete once ``gate`` is open."""

    def __init__(self, job: Job, targets: Sequence[torch.Tensor], gate: threading.Event) -> None:
        super().__init__(gate)
        self._job = job
        self._targets = targets

    def query(self) -> bool:
        if self._job.ready is not None and not self._job.ready.query():
            return False
        for target, view in zip(self._targets, self._job.views, strict=True):
            target.copy_(view)
        return super().query()


class HostMemory:
    """``ipc_link.Memory`` within one process. ``gate``: while it is closed, no copy is complete."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.slots: list[int] = []
        self.opened: list[int] = []
        self._address = 0

    def mark(self) -> None:
        return None

    def new_slot(self, nbytes: int) -> tuple[torch.Tensor, SlotHandle]:
        slot = torch.zeros(nbytes, dtype=torch.uint8)
        self.slots.append(nbytes)
        return slot, SlotHandle(slot.data_ptr().to_bytes(8, "little"), 0, nbytes)

    def fill(self, job: Job, targets: Sequence[torch.Tensor]) -> Moment:
        return Copy(job, targets, self.gate)

    def open(self, slot: SlotHandle) -> None:
        self.close()
        self._address = int.from_bytes(slot.handle, "little") + slot.offset
        self.opened.append(slot.nbytes)

    def pull(self, job: Job, offsets: Sequence[int]) -> Moment:
        for view, offset in zip(job.views, offsets, strict=True):
            ctypes.memmove(view.data_ptr(), self._address + offset, view.numel())
        return Moment(self.gate)

    def close(self) -> None:
        self._address = 0


class Pair:
    """Both ends of an edge."""

    def __init__(self, timeout: float = SOON) -> None:
        channels = [Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
        self.memories = HostMemory(), HostMemory()
        self.source = Endpoint(EDGE, 3, SendingLink(channels[0], self.memories[0]), timeout)
        self.target = Endpoint(EDGE, 0, ReceivingLink(channels[1], self.memories[1]), timeout)

    def transfer(self, tensors: Sequence[torch.Tensor], seq: int) -> list[torch.Tensor]:
        received = [torch.empty_like(tensor) for tensor in tensors]
        works = [self.source.isend(tensors, seq=seq), self.target.irecv(received, seq=seq)]
        for work in works:
            work.wait(SOON)
        return received


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.source.close("the test is over")
    made.target.close("the test is over")


def test_tensors_of_any_dtype_and_size_arrive_as_they_were_sent(pair: Pair) -> None:
    sent = [torch.randn(1000, 33), torch.randn(7).to(torch.bfloat16), torch.empty(0, 3), torch.tensor(True)]
    received = pair.transfer(sent, 0)
    assert all(torch.equal(a, b) for a, b in zip(sent, received, strict=True))


def test_one_slot_serves_every_payload_that_fits_and_grows_for_one_that_does_not(pair: Pair) -> None:
    for seq, size in enumerate([10, 1000, 2 << 20, 10, (2 << 20) + 1, 3 << 20, 10]):
        sent = torch.randint(0, 256, (size,), dtype=torch.uint8)
        assert torch.equal(pair.transfer([sent], seq)[0], sent)
    assert pair.memories[0].slots == pair.memories[1].opened == [2 << 20, 4 << 20]


def test_a_slot_is_not_written_again_before_the_receiver_has_its_copy(pair: Pair) -> None:
    sent = [torch.full((100,), i) for i in range(20)]
    received = [torch.empty_like(tensor) for tensor in sent]
    works = [pair.source.isend([tensor], seq=i) for i, tensor in enumerate(sent)]
    time.sleep(0.05)
    assert not works[0].done(), "the first waits for its receiver, the others behind it"
    works += [pair.target.irecv([tensor], seq=i) for i, tensor in enumerate(received)]
    for work in works:
        work.wait(SOON)
    assert all(torch.equal(a, b) for a, b in zip(sent, received, strict=True))


def test_nothing_is_said_about_a_payload_without_bytes(pair: Pair) -> None:
    pair.source.isend([torch.empty(0)], seq=0).wait(SOON)
    pair.target.irecv([], seq=0).wait(SOON)


@pytest.mark.parametrize("seq, size", [(1, 100), (0, 99)])
def test_transfers_that_do_not_belong_together_are_never_mixed_up(pair: Pair, seq: int, size: int) -> None:
    works = [
        pair.source.isend([torch.ones(100)], seq=0),
        pair.target.irecv([torch.zeros(size)], seq=seq, request_id="r"),
    ]
    with pytest.raises(TransferError, match="3->0 #0: the other end closed"):
        works[0].wait(SOON)
    with pytest.raises(TransferError, match=f"of request r: .*the receiver expects #{seq}"):
        works[1].wait(SOON)


def test_a_receive_whose_send_never_comes_fails_at_the_deadline() -> None:
    pair = Pair(timeout=0.2)
    with pytest.raises(TransferTimeout, match=r"3->0 #4 of request r1: not complete within 0.2 s"):
        pair.target.irecv([torch.zeros(4)], seq=4, request_id="r1").wait(SOON)
    with pytest.raises(TransferError, match="3->0 #4: the other end closed"):
        pair.source.isend([torch.zeros(4)], seq=4).wait(SOON)


def test_a_copy_that_never_ends_fails_both_ends_at_the_deadline() -> None:
    pair = Pair(timeout=0.3)
    pair.memories[1].gate.clear()
    works = [pair.source.isend([torch.ones(4)], seq=0), pair.target.irecv([torch.zeros(4)], seq=0)]
    for work in works:
        with pytest.raises(TransferError):
            work.wait(SOON)
    assert isinstance(works[1].error, TransferTimeout)


@pytest.mark.parametrize("end", ["source", "target"])
def test_closing_one_end_fails_both_at_once(pair: Pair, end: str) -> None:
    work = pair.source.isend([torch.ones(4)], seq=0)
    time.sleep(0.02)
    getattr(pair, end).close("worker 3 died")
    with pytest.raises(TransferError, match="worker 3 died|the other end closed"):
        work.wait(2.0)
    with pytest.raises(TransferError):
        pair.target.irecv([torch.zeros(4)], seq=0).wait(2.0)


def test_a_receiver_whose_word_does_not_reach_the_sender_reports_no_success() -> None:
    """The sender may have given the slot to something else while the copy ran."""
    pair = Pair()
    pair.memories[1].gate.clear()
    pair.source.isend([torch.ones(4)], seq=0)
    work = pair.target.irecv([torch.zeros(4)], seq=0)
    time.sleep(0.05)
    pair.source.close("given up")
    pair.memories[1].gate.set()
    with pytest.raises(TransferError, match="the other end closed"):
        work.wait(2.0)


# ---------------------------------------------------------------- asked for before the tensors are made


def start_early(pair: Pair, made: threading.Event, seconds: float) -> tuple[torch.Tensor, torch.Tensor, list[Work]]:
    """The tensor that is still being made until ``made``, where it goes, and both ends' works."""
    sent, received = torch.zeros(100), torch.full((100,), -1.0)
    works = [
        pair.source.isend([sent], seq=0, early=Early(seconds, Moment(made))),
        pair.target.irecv([received], seq=0, early=Early(seconds)),
    ]
    return sent, received, works


def test_an_early_transfer_moves_what_is_there_when_it_is_made_however_long_that_takes() -> None:
    pair, made = Pair(timeout=0.2), threading.Event()
    sent, received, works = start_early(pair, made, seconds=SOON)
    time.sleep(0.5)
    assert not any(work.done() for work in works)
    sent.fill_(7.0)
    made.set()
    for work in works:
        work.wait(SOON)
    assert received.eq(7.0).all()


def test_what_is_never_made_fails_both_ends_at_the_end_of_both_limits() -> None:
    pair = Pair(timeout=0.1)
    began = time.monotonic()
    *_, works = start_early(pair, threading.Event(), seconds=0.3)
    for work in works:
        with pytest.raises(TransferError):
            work.wait(SOON)
    assert 0.3 < time.monotonic() - began < 2.0
    timed_out = next(work.error for work in works if isinstance(work.error, TransferTimeout))
    assert r"0.3 s (--stage-timeout) for its stage and 0.1 s (--dist-timeout)" in timed_out.reason


@pytest.mark.parametrize("end", ["source", "target"])
def test_closing_an_end_that_waits_for_a_stage_fails_both_at_once(pair: Pair, end: str) -> None:
    *_, works = start_early(pair, threading.Event(), seconds=60.0)
    time.sleep(0.02)
    getattr(pair, end).close("worker 3 died")
    with pytest.raises(TransferError, match="worker 3 died"):
        works[end == "target"].wait(2.0)
    if end == "source":  # a sender that waits for its stage does not listen
        with pytest.raises(TransferError, match="the other end closed"):
            works[1].wait(2.0)


def test_transfers_behind_an_early_one_keep_their_order(pair: Pair) -> None:
    made = threading.Event()
    _, _, works = start_early(pair, made, seconds=SOON)
    sent, received = torch.ones(5), torch.zeros(5)
    works += [pair.source.isend([sent], seq=1), pair.target.irecv([received], seq=1)]
    time.sleep(0.02)
    assert not any(work.done() for work in works)
    made.set()
    for work in works:
        work.wait(SOON)
    assert torch.equal(sent, received)


def test_two_ends_find_each_other_through_the_store() -> None:
    server = StoreServer()
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda meet: meet(connect_store(server.host, server.port, SOON), SOON), (listen, dial)))
    links = SendingLink(ends[0], HostMemory()), ReceivingLink(ends[1], HostMemory())
    source, target = (Endpoint(EDGE, rank, link, SOON) for rank, link in zip(EDGE, links, strict=True))
    received = torch.zeros(5)
    works = [source.isend([torch.arange(5.0)], seq=0), target.irecv([received], seq=0)]
    for work in works:
        work.wait(SOON)
    assert torch.equal(received, torch.arange(5.0))
    for end in (source, target):
        end.close("the test is over")


@pytest.mark.parametrize("meet", [listen, dial])
def test_an_absent_peer_is_given_up_in_time(meet: object) -> None:
    server = StoreServer()
    began = time.monotonic()
    with pytest.raises((OSError, RuntimeError)):
        meet(connect_store(server.host, server.port, SOON), 0.3)
    assert time.monotonic() - began < 3.0


def test_an_edge_is_made_in_the_launchs_folder_and_leaves_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ipc_transport, "CudaMemory", lambda device: HostMemory())
    server, cpu = StoreServer(), torch.device("cpu")

    def make(rank: int) -> Endpoint:
        store = connect_store(server.host, server.port, SOON)
        return connect_edge("cuda_ipc", store, EDGE, 0, rank, device=cpu, timeout=SOON, run_dir=str(tmp_path))

    with ThreadPoolExecutor(2) as pool:
        source = pool.submit(make, EDGE.src)
        until = time.monotonic() + SOON
        while not list(tmp_path.glob("edge-*/*")):
            assert time.monotonic() < until and not source.done(), "it does not listen in the launch's folder"
            time.sleep(0.01)
        target = pool.submit(make, EDGE.dst)
        ends = [source.result(SOON), target.result(SOON)]
    assert list(tmp_path.iterdir()) == []
    for end in ends:
        end.close("the test is over")


def test_what_a_process_leaves_that_is_killed_while_it_waits_for_its_peer_goes_with_the_launch(tmp_path: Path) -> None:
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    server, launch = StoreServer(), RunDir(tmp_path)
    command = [sys.executable, "-c", LISTENER, str(server.port), str(launch.path)]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(elsewhere)}) as process:
        connect_store(server.host, server.port, 60).wait(["channel"], timedelta(seconds=60))
        process.kill()
    assert len(list(launch.path.glob("edge-*"))) == 1, "nobody was left to remove it"
    launch.close()
    assert list(tmp_path.iterdir()) == [elsewhere] and list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    "rubbish",
    [b"\7", b"\x94\xa5Ready\0\x90\x93\xa1\xff", b"\x92\xa5Ready" + b"\x91" * 100_000],
    ids=["another type", "bad UTF-8", "endless nesting"],
)
def test_bytes_that_are_no_message_end_the_edge(rubbish: bytes) -> None:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ends[1])
    ends[0].send(rubbish)
    with pytest.raises(LinkDown, match="what does not belong here"):
        channel.receive(Ready, time.monotonic() + SOON)
    channel.close()
    ends[0].close()
