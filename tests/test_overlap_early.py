"""An encode is announced when it is launched, and its transfer waits for the device, which is the test's here."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from fake_device import SOON, FakeDevice

from ditrelay.models.card import load_card
from ditrelay.models.timed import TimedAdapter
from ditrelay.models.timed_options import TimedOptions
from ditrelay.runtime.communication.communicator import DisaggCommunicator
from ditrelay.runtime.communication.local_transport import LocalNetwork
from ditrelay.runtime.messages import (
    CloseEdge,
    Command,
    Drop,
    Dropped,
    Encode,
    Encoded,
    Expect,
    Launched,
    Received,
    Send,
    Sent,
    WorkerEvent,
)
from ditrelay.runtime.pipelines_core.executors.disaggregated_executor import DisaggregatedExecutor
from ditrelay.runtime.pipelines_core.executors.lane import Lane
from ditrelay.runtime.pipelines_core.executors.overlap import OverlapLoop
from ditrelay.runtime.pipelines_core.executors.progress import DeviceProgress
from ditrelay.runtime.pipelines_core.stages import build_pipeline
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import DIT, NON_DIT, Edge

MODEL = "builtin:timed?encode=0&denoise=0&decode=0&steps=1&conditioning_mb=0.01&latents_mb=0.01"
ARGS = ServerArgs(model_path=MODEL, enable_disagg=True, num_gpus=2, dist_timeout=0.3, stage_timeout=SOON)
EDGE = Edge(1, 0)
BEGAN, READY, ENDED = 1, 1, 1  # what is recorded of an announced encode, in this order


class Rank:
    """A rank and what it says. With a ``device``, its lane's thread is ahead of that."""

    def __init__(self, rank: int, network: LocalNetwork, device: FakeDevice | None, *, announce: bool = True) -> None:
        self.roles = NON_DIT if rank == EDGE.src else DIT
        self.events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
        self.lane = Lane(f"rank-{rank}", torch.device("cpu"))
        if device is not None:
            self.lane.progress = DeviceProgress(f"rank-{rank}", device.record, SOON)

        def connect(edge: Edge, generation: int) -> object:
            return network.connect(edge, generation, rank, timeout=ARGS.dist_timeout)

        comm = DisaggCommunicator(rank, lambda r: NON_DIT if r == EDGE.src else DIT, connect, SOON)
        comm.open_edge(EDGE, 1)
        self.loop = OverlapLoop(
            DisaggregatedExecutor(ARGS, rank=rank, roles=self.roles, communicator=comm),
            build_pipeline(TimedAdapter(TimedOptions.parse(MODEL)), self.roles),
            lanes=dict.fromkeys(self.roles, self.lane),
            priority=dict.fromkeys(self.roles, 0),
            emit=self.events.put,
            announce=announce,
        )

    def next(self, *kinds: type) -> list[WorkerEvent]:
        """The next events, which must be of these kinds; nothing else may come soon after."""
        said = [self.events.get(timeout=SOON) for _ in kinds]
        assert [type(event) for event in said] == list(kinds)
        self.quiet()
        return said

    def quiet(self) -> None:
        time.sleep(0.02)
        assert self.events.empty()


class Pair:
    """An encoder on the test's device, and the rank that it sends to."""

    def __init__(self) -> None:
        network = LocalNetwork()
        self.device = FakeDevice()
        self.source, self.target = Rank(EDGE.src, network, self.device), Rank(EDGE.dst, network, None)

    def tell(self, rank: Rank, *commands: Command) -> None:
        for command in commands:
            rank.loop.handle(command)

    def announced(self) -> Launched:
        """Has the encode launched and announced, and the transfer asked for at both ends; the device stands still."""
        made = request()
        self.tell(self.source, Encode(EDGE.src, made))
        (event,) = self.source.next(Launched)
        assert isinstance(event, Launched)
        self.tell(self.source, Send(EDGE.src, "r", EDGE.dst, 1, 0, early=True))
        self.tell(self.target, Expect(EDGE.dst, made, EDGE.src, 1, 0, event.header, early=True))
        return event

    def close(self) -> None:
        for rank in (self.source, self.target):
            rank.lane.close(SOON)
            self.tell(rank, CloseEdge(0, *EDGE, 1, "the test is over"))


def request(prompt: str = "a cat") -> Request:
    params = load_card(MODEL).resolve(SamplingParams(prompt=prompt, seed=1))
    return Request(request_id="r", params=params)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def assert_set(event: threading.Event) -> None:
    assert event.wait(SOON)


def kinds(rank: Rank, count: int) -> set[str]:
    return {type(rank.events.get(timeout=SOON)).__name__ for _ in range(count)}


def test_an_encode_is_announced_with_its_header_before_the_device_has_begun_it(pair: Pair) -> None:
    announced = pair.announced()
    pair.device.finish(BEGAN + READY + ENDED)
    said = [pair.source.events.get(timeout=SOON) for _ in range(3)]
    (encoded,) = [event for event in said if isinstance(event, Encoded)]
    assert announced.header == encoded.header and announced.header.nbytes > 10_000


def test_nothing_moves_until_the_device_is_done_and_then_it_is_all_there(pair: Pair) -> None:
    pair.announced()
    pair.device.finish(BEGAN)
    time.sleep(2 * ARGS.dist_timeout)  # a transfer's own time does not run yet
    pair.target.quiet()
    pair.device.finish(READY)
    pair.target.next(Received)
    pair.device.finish(ENDED)
    assert kinds(pair.source, 3) == {"Started", "Sent", "Encoded"}
    states = [rank.loop._residents["r"].batch.state for rank in (pair.source, pair.target)]
    assert torch.equal(*(state["conditioning"].value for state in states))


def test_a_request_dropped_meanwhile_is_sent_all_the_same_and_then_free_at_both_ends(pair: Pair) -> None:
    pair.announced()
    for rank in (pair.source, pair.target):
        pair.tell(rank, Drop(0, "r"))
        rank.quiet()
    pair.device.finish(BEGAN + READY)
    pair.target.next(Dropped)
    pair.device.finish(ENDED)
    assert kinds(pair.source, 2) == {"Started", "Dropped"}
    assert pair.source.loop.kept_bytes() == pair.target.loop.kept_bytes() == 0


def test_an_edge_that_is_closed_meanwhile_costs_the_transfer_and_not_the_encode(pair: Pair) -> None:
    pair.announced()
    for rank in (pair.source, pair.target):
        pair.tell(rank, CloseEdge(0, *EDGE, 1, "worker 0 died"))
    assert kinds(pair.source, 1) == kinds(pair.target, 1) == {"EdgeFailed"}
    assert pair.target.loop.kept_bytes() == 0
    pair.device.finish(BEGAN + READY + ENDED)
    assert kinds(pair.source, 2) == {"Started", "Encoded"}
    assert pair.source.loop.kept_bytes() > 0


def test_the_same_payload_can_be_sent_again_when_it_is_long_made(pair: Pair) -> None:
    header = pair.announced().header
    pair.device.finish(BEGAN + READY + ENDED)
    pair.target.next(Received)
    assert kinds(pair.source, 3) == {"Started", "Sent", "Encoded"}
    pair.tell(pair.source, Send(EDGE.src, "r", EDGE.dst, 1, 1))
    pair.tell(pair.target, Expect(EDGE.dst, request(), EDGE.src, 1, 1, header))
    pair.target.next(Received)
    pair.source.next(Sent)


@pytest.mark.parametrize("case", ["its stage fails", "its device is never behind", "it may not", "it is dropped"])
def test_no_encode_is_announced_whose_transfer_could_not_wait_for_it(case: str) -> None:
    device = None if case == "its device is never behind" else FakeDevice()
    rank = Rank(EDGE.src, LocalNetwork(), device, announce=case != "it may not")
    free = threading.Event()
    rank.lane.put(0, lambda: assert_set(free))
    rank.loop.handle(Encode(EDGE.src, request("[fail encode]" if case == "its stage fails" else "a cat")))
    if case == "it is dropped":
        rank.loop.handle(Drop(EDGE.src, "r"))
    free.set()
    if device is not None and case != "it is dropped":
        device.finish(2)
    expected = {"its stage fails": {"Started", "StageFailed"}, "it is dropped": {"Dropped"}}
    wanted = expected.get(case, {"Started", "Encoded"})
    assert kinds(rank, len(wanted)) == wanted
    rank.quiet()
    rank.lane.close(SOON)
