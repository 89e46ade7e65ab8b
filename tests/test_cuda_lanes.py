"""A lane on a GPU that runs behind: what is copied off it, what a stage takes, and what it leaves when it fails."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from preview_rig import wait_until

from ditrelay.runtime.communication.communicator import DisaggCommunicator
from ditrelay.runtime.communication.local_transport import LocalNetwork
from ditrelay.runtime.messages import Encode, Encoded, StageFailed, Started, WorkerEvent
from ditrelay.runtime.payloads import State, StateValue
from ditrelay.runtime.pipelines_core.executors.checkpoints import Checkpoints
from ditrelay.runtime.pipelines_core.executors.disaggregated_executor import DisaggregatedExecutor
from ditrelay.runtime.pipelines_core.executors.lane import Lane
from ditrelay.runtime.pipelines_core.executors.memory_gauge import DeviceGauge
from ditrelay.runtime.pipelines_core.executors.overlap import OverlapLoop
from ditrelay.runtime.pipelines_core.executors.previews import PreviewTaker, Shot
from ditrelay.runtime.pipelines_core.pipeline import Batch, Pipeline, StageControl
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.spool import Spool
from ditrelay.runtime.topology import ENCODE, Role

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda", 0)
SECONDS = 60.0
BUSY = int(0.5 * 1.7e9)  # cycles: half a second at about the clock of an H100
MIB = 1 << 20
REQUEST = Request(request_id="r", params=SamplingParams(prompt="a cat", seed=1, previews=1))


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane("test", DEVICE)
    yield made
    made.close(SECONDS)


def on(lane: Lane, job: Callable[[], None]) -> None:
    """Run it on the lane; returns when it is launched."""
    launched, errors = threading.Event(), list[Exception]()

    def run() -> None:
        try:
            job()
        except Exception as error:  # noqa: BLE001 - raised again, where the test sees it
            errors.append(error)
        launched.set()

    lane.put(0, run)
    assert launched.wait(SECONDS)
    if errors:
        raise errors[0]


# ---------------------------------------------------------------- copies


class Outlet:
    """Keeps the shots that are put."""

    def __init__(self) -> None:
        self.shots: queue.SimpleQueue[Shot] = queue.SimpleQueue()

    def put(self, shot: Shot) -> None:
        self.shots.put(shot)

    def forget(self, request_id: str) -> None: ...


@dataclass(frozen=True)
class Launch:
    """Seconds that launching took, and whether the device was still asleep at the end."""

    seconds: dict[str, float]
    asleep: bool


class Keeper:
    """Latents that the device makes once it has slept, that are kept twice, and that the next step then changes."""

    def __init__(self, lane: Lane, folder: Path) -> None:
        self._lane = lane
        self._spool = Spool(str(folder)).make()
        self._outlet = Outlet()
        self._checkpoints = Checkpoints(self._spool, 1)
        self._taker = PreviewTaker(self._outlet)

    def steps(self, cycles: int) -> Launch:
        """On the lane."""
        latents = torch.zeros(2, 512, 512, device=DEVICE)
        slept, moments = torch.cuda.Event(), [time.monotonic()]  # type: ignore[no-untyped-call]
        torch.cuda._sleep(cycles)
        slept.record()
        latents += 7.0
        moments.append(time.monotonic())
        self._keep(latents)
        moments.append(time.monotonic())
        latents += 1.0
        moments.append(time.monotonic())
        took = [after - before for before, after in pairwise(moments)]
        return Launch(dict(zip(("step", "keep", "next step"), took, strict=True)), asleep=not slept.query())

    def _keep(self, latents: torch.Tensor) -> None:
        state: State = {"latents": StateValue(latents.permute(0, 2, 1)), "all": StateValue([latents, latents[:, 1:]])}
        self._checkpoints.keep("r", 1, lambda: state, self._lane.progress)
        self._taker.take(REQUEST, 1, 2, lambda: state, self._lane.progress)

    def kept(self) -> tuple[State, State]:
        """The preview and the checkpoint, once both are there; the next ones find no older ones."""
        shot = self._outlet.shots.get(timeout=SECONDS)
        wait_until(lambda: not self._checkpoints._writing.is_set() and not self._taker._busy.is_set())
        checkpoint = self._checkpoints.read("r")
        assert checkpoint is not None
        self._spool.discard("r")
        return shot.state, checkpoint


def test_checkpoints_and_previews_are_copied_in_the_devices_order_and_wait_for_nothing(
    lane: Lane, tmp_path: Path
) -> None:
    """The first run, without a sleep, loads every kernel: to load one while the device is busy waits for it."""
    keeper, launches = Keeper(lane, tmp_path), list[Launch]()
    on(lane, lambda: launches.append(keeper.steps(0)))
    keeper.kept()
    # To make pinned memory may wait, too. Six are needed; those of the first run may be on their way back.
    spare = [torch.empty(2, 512, 512, pin_memory=True) for _ in range(12)]
    del spare
    on(lane, lambda: launches.append(keeper.steps(BUSY)))
    for state in keeper.kept():
        latents, both = state["latents"].value, state["all"].value
        assert isinstance(latents, torch.Tensor) and isinstance(both, list)
        assert all(bool((each == 7.0).all()) for each in (latents, *both) if isinstance(each, torch.Tensor))
    assert launches[1].asleep, f"something waited for the device: {launches}"


# ---------------------------------------------------------------- memory


class Hungry:
    """An encode that takes ``nbytes`` for a moment, and then ``more``."""

    role: Role = "encode"

    def __init__(self, nbytes: int, more: int = 0) -> None:
        self._nbytes = nbytes
        self._more = more

    def run(self, batch: Batch, control: StageControl) -> None:
        held = torch.ones(self._nbytes, dtype=torch.uint8, device=DEVICE)
        more = torch.empty(self._more, dtype=torch.uint8, device=DEVICE)
        batch.state = {"conditioning": StateValue(held[: 1 + more.numel()].clone())}

    def finish(self, batch: Batch) -> None: ...


def encoded(lane: Lane, stage: Hungry) -> WorkerEvent:
    """What is said of the stage's end."""
    events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
    comm = DisaggCommunicator(0, lambda rank: ENCODE, LocalNetwork().connect, SECONDS)
    executor = DisaggregatedExecutor(ServerArgs(), rank=0, roles=ENCODE, communicator=comm, device=DEVICE)
    loop = OverlapLoop(
        executor,
        Pipeline([stage]),
        lanes={"encode": lane},
        priority={"encode": 0},
        emit=events.put,
        gauge=DeviceGauge(DEVICE),
    )
    loop.handle(Encode(0, REQUEST))
    assert isinstance(events.get(timeout=SECONDS), Started)
    return events.get(timeout=SECONDS)


def test_a_stage_that_runs_out_of_a_gpus_memory_gives_all_of_it_back_and_the_next_one_runs(lane: Lane) -> None:
    encoded(lane, Hungry(MIB))  # what is made once is made now
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(DEVICE), torch.cuda.memory_reserved(DEVICE)
    failed = encoded(lane, Hungry(1 << 30, more=1 << 46))
    assert isinstance(failed, StageFailed) and failed.out_of_memory, failed
    assert torch.cuda.memory_allocated(DEVICE) <= allocated
    assert torch.cuda.memory_reserved(DEVICE) <= reserved
    assert isinstance(encoded(lane, Hungry(1 << 30)), Encoded)


def test_what_a_stage_takes_is_told_with_its_end(lane: Lane) -> None:
    made = encoded(lane, Hungry(256 * MIB))
    assert isinstance(made, Encoded) and made.memory is not None
    assert 256 * MIB <= made.memory.peak - made.memory.idle < 257 * MIB


# ---------------------------------------------------------------- one GPU only

ELSEWHERE = """
import threading
import torch
from ditrelay.models.pixels import start_to_frames
from ditrelay.runtime.pipelines_core.executors.lane import Lane

device, done, parts = torch.device("cuda", 1), threading.Event(), []
lane = Lane("test", device)

def decode():
    parts.append(start_to_frames(torch.rand(3, 64, 64, device=device)))
    lane.progress.then(lambda reached: done.set())

lane.put(0, decode)
assert done.wait(60)
reader = threading.Thread(target=parts[0])
reader.start()
reader.join(60)
print(torch._C._cuda_hasPrimaryContext(0), torch._C._cuda_hasPrimaryContext(1))
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_no_thread_of_a_rank_makes_a_context_on_a_gpu_that_is_anothers() -> None:
    """Each would take half a GiB of the first GPU."""
    run = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, timeout=SECONDS)
    assert run.stdout.split() == ["False", "True"], run.stderr
