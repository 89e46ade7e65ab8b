"""The overlap loop on a device that runs behind: what is reported is what the device did, not what was launched."""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from fake_device import SOON, FakeDevice

from ditrelay.models.card import load_card
from ditrelay.models.timed import TimedAdapter
from ditrelay.models.timed_options import TimedOptions
from ditrelay.runtime.communication.communicator import DisaggCommunicator
from ditrelay.runtime.communication.local_transport import LocalNetwork
from ditrelay.runtime.messages import Decode, Denoise, Drop, Encode, WorkerEvent
from ditrelay.runtime.pipelines_core.executors import overlap
from ditrelay.runtime.pipelines_core.executors.disaggregated_executor import DisaggregatedExecutor
from ditrelay.runtime.pipelines_core.executors.lane import Lane
from ditrelay.runtime.pipelines_core.executors.overlap import OverlapLoop
from ditrelay.runtime.pipelines_core.executors.progress import DeviceProgress
from ditrelay.runtime.pipelines_core.pipeline import Batch
from ditrelay.runtime.pipelines_core.stages import build_pipeline
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import COLOCATED

MODEL = "builtin:timed?encode=0&denoise=0&decode=0&steps=4&conditioning_mb=0.01&latents_mb=0.01"


class Rank:
    """A colocated rank whose device is the test's."""

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.broken: list[str] = []
        self._events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
        self._lane = Lane("test", torch.device("cpu"))
        self._lane.progress = DeviceProgress("test", self.device.record, SOON)
        comm = DisaggCommunicator(0, lambda rank: COLOCATED, LocalNetwork().connect, SOON)
        args = ServerArgs(model_path=MODEL)
        self.pipeline = build_pipeline(TimedAdapter(TimedOptions.parse(MODEL)), COLOCATED)
        self.loop = OverlapLoop(
            DisaggregatedExecutor(args, rank=0, roles=COLOCATED, communicator=comm),
            self.pipeline,
            lanes=dict.fromkeys(COLOCATED, self._lane),
            priority={"decode": 0, "denoise": 1, "encode": 2},
            emit=self._events.put,
            on_broken=self.broken.append,
        )

    def close(self) -> None:
        self._lane.close(SOON)

    def encode(self, request_id: str, prompt: str = "a cat") -> None:
        params = load_card(MODEL).resolve(SamplingParams(prompt=prompt, seed=1))
        self.loop.handle(Encode(0, Request(request_id=request_id, params=params)))

    def next(self, count: int) -> list[str]:
        """The next events' names; nothing else may come soon after."""
        names = [type(self._events.get(timeout=SOON)).__name__ for _ in range(count)]
        self.quiet()
        return names

    def next_of(self, count: int) -> list[tuple[str, str]]:
        """The next events' names and requests."""
        events = [self._events.get(timeout=SOON) for _ in range(count)]
        return [(type(event).__name__, event.request_id) for event in events]  # type: ignore[union-attr]

    def quiet(self) -> None:
        time.sleep(0.02)
        assert self._events.empty()


@pytest.fixture
def rank() -> Iterator[Rank]:
    made = Rank()
    yield made
    made.close()


def encoded(rank: Rank, request_id: str = "r") -> None:
    rank.encode(request_id)
    rank.device.finish(2)
    assert rank.next(2) == ["Started", "Encoded"]


def test_a_stage_begins_and_ends_when_the_device_does(rank: Rank) -> None:
    rank.encode("r")
    rank.quiet()
    rank.device.finish()
    assert rank.next(1) == ["Started"]
    rank.device.finish()
    assert rank.next(1) == ["Encoded"]


def test_the_next_stage_is_launched_while_the_device_computes_the_last(rank: Rank) -> None:
    rank.encode("r1")
    rank.encode("r2")
    rank.device.await_recorded(4)  # the device did nothing until now
    rank.device.finish(4)
    assert rank.next(4) == ["Started", "Encoded", "Started", "Encoded"]


def test_steps_are_reported_as_the_device_does_them_and_two_are_launched_ahead(rank: Rank) -> None:
    encoded(rank)
    rank.loop.handle(Denoise(0, "r"))
    rank.device.finish(3)
    assert rank.next(3) == ["Started", "StepDone", "StepDone"]
    rank.device.finish(3)
    assert rank.next(3) == ["StepDone", "StepDone", "Denoised"]


def both_denoise(rank: Rank) -> None:
    """r1 and r2 are encoded, both may denoise, and the device has done r1's."""
    encoded(rank, "r1")
    encoded(rank, "r2")
    rank.loop.handle(Denoise(0, "r1"))
    rank.loop.handle(Denoise(0, "r2"))
    rank.device.finish(6)
    assert rank.next_of(6)[-1] == ("Denoised", "r1")


def test_a_picture_is_decoded_before_the_next_one_is_denoised(rank: Rank) -> None:
    both_denoise(rank)
    rank.loop.handle(Decode(0, "r1"))
    rank.device.finish(2 + 6)
    began = [request for name, request in rank.next_of(2 + 6) if name == "Started"]
    assert began == ["r1", "r2"]


def test_a_decode_that_is_not_sent_holds_the_next_denoise_up_for_a_moment_only(rank: Rank) -> None:
    both_denoise(rank)
    rank.device.finish(6)
    assert rank.next_of(6)[-1] == ("Denoised", "r2")


def test_a_request_that_is_cancelled_before_its_decode_holds_nothing_up(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "DECODE_SECONDS", 2 * SOON)
    both_denoise(rank)
    rank.loop.handle(Drop(0, "r1"))
    rank.device.finish(6)
    assert sorted(set(rank.next_of(7))) == [
        ("Denoised", "r2"),
        ("Dropped", "r1"),
        ("Started", "r2"),
        ("StepDone", "r2"),
    ]


def test_a_dropped_request_is_freed_only_when_the_device_is_done_with_it(rank: Rank) -> None:
    encoded(rank)
    rank.loop.handle(Denoise(0, "r"))
    rank.device.finish(1)
    assert rank.next(1) == ["Started"]
    rank.loop.handle(Drop(0, "r"))
    rank.device.finish(1)  # step 1: makes room for the third, which is not launched any more
    assert rank.next(1) == ["StepDone"]
    assert rank.loop.kept_bytes() > 0
    rank.device.finish(2)
    assert rank.next(2) == ["StepDone", "Dropped"]
    assert rank.loop.kept_bytes() == 0


def test_a_stage_that_was_cancelled_keeps_no_tensor_until_the_garbage_collector_comes(rank: Rank) -> None:
    encoded(rank)
    payload = rank.loop._residents["r"].batch.payload
    assert payload is not None
    tensor = weakref.ref(payload.tensors[0])
    del payload
    gc.disable()
    try:
        rank.loop.handle(Denoise(0, "r"))
        rank.device.finish(1)
        assert rank.next(1) == ["Started"]
        rank.loop.handle(Drop(0, "r"))
        rank.device.finish(3)
        assert rank.next(3) == ["StepDone", "StepDone", "Dropped"]
        assert tensor() is None
    finally:
        gc.enable()


def test_a_file_is_made_beside_the_next_stage(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded(rank)
    rank.loop.handle(Denoise(0, "r"))
    rank.device.finish(6)
    assert rank.next(6)[-1] == "Denoised"
    stage, gate = rank.pipeline.stage("decode"), threading.Event()
    finish = stage.finish

    def slow(batch: Batch) -> None:
        assert gate.wait(SOON)
        finish(batch)

    monkeypatch.setattr(stage, "finish", slow)
    rank.loop.handle(Decode(0, "r"))
    rank.device.finish(2)
    assert rank.next(1) == ["Started"]
    encoded(rank, "r2")
    gate.set()
    assert rank.next(1) == ["Decoded"]


def test_a_failure_of_the_host_fails_the_request_and_one_of_the_device_ends_the_rank(rank: Rank) -> None:
    rank.encode("r1", "[fail encode]")
    rank.device.finish(2)
    assert rank.next(2) == ["Started", "StageFailed"] and not rank.broken
    rank.encode("r2")
    rank.device.finish(2, error="CUDA error: an illegal memory access")
    rank.quiet()
    assert "illegal memory access" in rank.broken[0]
