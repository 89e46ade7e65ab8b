"""The in-memory transport, and with it everything that transports share: order, deadlines, failure, closing."""

from __future__ import annotations

import threading
import time
import weakref

import pytest
import torch

from ditrelay.errors import TransferError, TransferTimeout
from ditrelay.runtime.communication.endpoint import Endpoint
from ditrelay.runtime.communication.local_transport import FaultPlan, LocalNetwork
from ditrelay.runtime.communication.transport import Work
from ditrelay.runtime.topology import Edge

EDGE = Edge(3, 0)
SOON = 5.0


def pair(faults: FaultPlan | None = None, timeout: float = SOON) -> tuple[Endpoint, Endpoint]:
    network = LocalNetwork(faults)
    return network.connect(EDGE, 0, 3, timeout=timeout), network.connect(EDGE, 0, 0, timeout=timeout)


def zeros(count: int) -> list[torch.Tensor]:
    return [torch.zeros(4) for _ in range(count)]


def test_a_payload_of_many_dtypes_arrives_as_it_was_sent() -> None:
    source, target = pair()
    sent = [torch.randn(3, 2), torch.tensor([True, False]), torch.empty(0), torch.tensor(2.5, dtype=torch.bfloat16)]
    received = [torch.empty_like(tensor) for tensor in sent]
    works = [target.irecv(received, seq=0), source.isend(sent, seq=0)]
    for work in works:
        work.wait(SOON)
    assert all(torch.equal(a, b) for a, b in zip(sent, received, strict=True))
    assert all(work.done() and work.error is None and work.ended >= work.began for work in works)


def test_a_payload_of_only_empty_tensors_is_complete() -> None:
    source, target = pair()
    works = [source.isend([torch.empty(0, 7)], seq=0), target.irecv([torch.empty(0, 7)], seq=0)]
    for work in works:
        work.wait(SOON)


def test_transfers_of_an_edge_end_in_the_order_they_were_asked_for() -> None:
    source, target = pair()
    ended: list[int] = []
    received = zeros(20)
    works = [target.irecv([tensor], seq=i) for i, tensor in enumerate(received)]
    for work in works:
        work.add_done_callback(lambda work: ended.append(work.seq))
    for i in range(20):
        source.isend([torch.full((4,), float(i))], seq=i)
    works[-1].wait(SOON)
    assert ended == list(range(20)) and [tensor[0].item() for tensor in received] == list(range(20))


def test_a_send_is_complete_only_once_it_was_received() -> None:
    source, target = pair()
    work = source.isend(zeros(1), seq=0)
    assert not work.wait_done(0.05)
    target.irecv(zeros(1), seq=0).wait(SOON)
    work.wait(SOON)


def test_waiting_too_short_names_the_transfer_and_leaves_it_going() -> None:
    source, target = pair()
    work = source.isend(zeros(1), seq=4, request_id="r7")
    with pytest.raises(TransferTimeout, match=r"transfer 3->0 #4 of request r7: still under way after 0.01 s"):
        work.wait(0.01)
    target.irecv(zeros(1), seq=4).wait(SOON)
    work.wait(SOON)


def test_a_peer_that_never_comes_fails_this_and_all_later_transfers() -> None:
    source, _ = pair(timeout=0.1)
    works = [source.isend(zeros(1), seq=i, request_id="r") for i in range(3)]
    with pytest.raises(TransferTimeout, match=r"3->0 #0 of request r: not complete within 0.1 s \(--dist-timeout\)"):
        works[0].wait(SOON)
    for i in (1, 2):
        with pytest.raises(TransferError, match=f"3->0 #{i} of request r: the edge is down: not complete within"):
            works[i].wait(SOON)
    with pytest.raises(TransferError, match="#9: the edge is down"):
        source.isend(zeros(1), seq=9).wait(SOON)


def test_closing_fails_everything_with_the_reason_and_wakes_the_peer() -> None:
    source, target = pair()
    works = [target.irecv(zeros(1), seq=i) for i in range(2)]
    target.close("worker 3 died")
    target.close("another reason")
    for work in works:
        with pytest.raises(TransferError, match="the edge is down: worker 3 died"):
            work.wait(SOON)
    with pytest.raises(TransferError, match="worker 3 died"):
        target.irecv(zeros(1), seq=5).wait(SOON)
    with pytest.raises(TransferError, match="the other end closed the edge"):
        source.isend(zeros(1), seq=0).wait(SOON)


def test_closing_while_a_transfer_stands_returns_at_once() -> None:
    source, _ = pair(timeout=60.0)
    work = source.isend(zeros(1), seq=0)
    assert not work.wait_done(0.05)
    began = time.monotonic()
    source.close("test")
    assert work.done() and time.monotonic() - began < 2.0


def test_closing_from_a_callback_is_allowed() -> None:
    source, target = pair()
    done = threading.Event()

    def close(work: Work) -> None:
        target.close("from a callback")
        done.set()

    target.irecv(zeros(1), seq=0).add_done_callback(close)
    source.isend(zeros(1), seq=0)
    assert done.wait(SOON)


def test_on_a_cpu_edge_waiting_for_the_stream_is_waiting() -> None:
    source, target = pair()
    work = source.isend(zeros(1), seq=0)
    with pytest.raises(TransferTimeout, match="still under way"):
        work.wait_stream(0.01)
    target.irecv(zeros(1), seq=0).wait_stream(SOON)
    target.close("test")
    with pytest.raises(TransferError, match="is down: test"):
        target.irecv(zeros(1), seq=1).wait_stream(SOON)


def test_a_callback_added_late_is_called_at_once() -> None:
    source, target = pair()
    work = target.irecv(zeros(1), seq=0)
    source.isend(zeros(1), seq=0)
    work.wait(SOON)
    called: list[Work] = []
    work.add_done_callback(called.append)
    assert called == [work]


class Memory(bytearray):
    """Memory under a tensor; unlike a tensor's own it tells when it is let go of."""


def test_tensors_live_until_the_transfer_is_complete_and_no_longer() -> None:
    source, target = pair()
    memory = Memory(8)
    alive = weakref.ref(memory)
    work = source.isend([torch.frombuffer(memory, dtype=torch.uint8)], seq=0)
    del memory
    assert not work.wait_done(0.05) and alive() is not None
    target.irecv([torch.zeros(8, dtype=torch.uint8)], seq=0).wait(SOON)
    work.wait(SOON)
    deadline = time.monotonic() + SOON
    while alive() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert alive() is None


def test_sizes_that_differ_fail_the_receiver_and_write_nothing() -> None:
    source, target = pair()
    source.isend([torch.ones(4)], seq=0)
    received = torch.zeros(2)
    with pytest.raises(TransferError, match=r"\[16\] bytes were sent, the receiver expects \[8\]"):
        target.irecv([received], seq=0).wait(SOON)
    assert received.sum() == 0


def test_edges_and_generations_are_apart() -> None:
    network = LocalNetwork()
    ends = [network.connect(EDGE, generation, rank) for generation in (0, 1) for rank in (3, 0)]
    ends[0].isend([torch.full((4,), 1.0)], seq=0)
    ends[2].isend([torch.full((4,), 2.0)], seq=0)
    received = zeros(1)
    ends[3].irecv(received, seq=0).wait(SOON)
    assert received[0][0] == 2


@pytest.mark.parametrize("rank", [3, 0])
def test_the_wrong_direction_is_refused(rank: int) -> None:
    end = LocalNetwork().connect(EDGE, 0, rank)
    with pytest.raises(AssertionError, match="end of edge 3->0"):
        (end.irecv if rank == 3 else end.isend)(zeros(1), seq=0)


# ---------------------------------------------------------------- faults on demand


def planned(kind: str, seq: int = 0, seconds: float = 0.0) -> FaultPlan:
    faults = FaultPlan()
    faults.add(EDGE, seq, kind, seconds=seconds)  # type: ignore[arg-type]
    return faults


def test_a_delayed_transfer_arrives_late() -> None:
    source, target = pair(planned("delay", seconds=0.1))
    began = time.monotonic()
    source.isend(zeros(1), seq=0)
    target.irecv(zeros(1), seq=0).wait(SOON)
    assert time.monotonic() - began >= 0.1


def test_a_dropped_transfer_looks_sent_and_never_arrives() -> None:
    source, target = pair(planned("drop"), timeout=0.1)
    source.isend(zeros(1), seq=0).wait(SOON)
    with pytest.raises(TransferTimeout, match="3->0 #0"):
        target.irecv(zeros(1), seq=0).wait(SOON)


def test_reordered_transfers_still_reach_their_own_receivers() -> None:
    source, target = pair(planned("reorder"))
    for i in range(2):
        source.isend([torch.full((4,), float(i))], seq=i)
    received = zeros(2)
    works = [target.irecv([tensor], seq=i) for i, tensor in enumerate(received)]
    for work in works:
        work.wait(SOON)
    assert [tensor[0].item() for tensor in received] == [0.0, 1.0]


def test_a_corrupted_transfer_differs_in_one_byte_and_leaves_the_source_alone() -> None:
    source, target = pair(planned("corrupt"))
    sent, received = [torch.zeros(4)], [torch.zeros(4)]
    source.isend(sent, seq=0)
    target.irecv(received, seq=0).wait(SOON)
    assert (received[0].view(torch.uint8) != 0).sum() == 1 and sent[0].sum() == 0


def test_a_hanging_sender_fails_both_ends_at_the_deadline() -> None:
    source, target = pair(planned("hang", seq=1), timeout=0.2)
    works = [end(zeros(1), seq=i) for i in range(2) for end in (source.isend, target.irecv)]
    for work in works[:2]:
        work.wait(SOON)
    for work in works[2:]:
        with pytest.raises(TransferError, match="3->0 #1"):
            work.wait(SOON)


def test_a_fault_happens_once() -> None:
    faults = planned("corrupt")
    assert faults.take(EDGE, 0) is not None and faults.take(EDGE, 0) is None
