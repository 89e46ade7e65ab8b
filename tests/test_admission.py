"""Requests that are too large for the ranks' memory are refused before they start; those that may fit never are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.errors import InvalidRequest
from ditrelay.runtime.admission import FIXED_BYTES, Admission
from ditrelay.runtime.messages import Decoded, Stage, StageMemory, WorkerUp
from ditrelay.runtime.request import Request
from ditrelay.runtime.request_log import RequestLog
from ditrelay.runtime.tickets import Ticket
from ditrelay.runtime.topology import Topology

GIB = 1 << 30
DIT, NON_DIT = 0, 2
DISAGGREGATED = Topology.build(ServerArgs(enable_disagg=True, num_gpus=3))
WIDE, HIGH = 832, 480


def params(width: int, height: int, frames: int = 1) -> SamplingParams:
    return SamplingParams(prompt="a cat", width=width, height=height, num_frames=frames)


def ranks_of(gib: float, topology: Topology = DISAGGREGATED, frame_multiple: int = 4) -> Admission:
    """Every rank has so much memory; nothing is learned yet."""
    admission = Admission(topology, 16, frame_multiple)
    for rank in range(topology.world_size):
        admission.set_capacity(rank, round(gib * GIB))
    return admission


def learn(admission: Admission, rank: int, stage: Stage, size: SamplingParams, took: float, idle: float = 10) -> None:
    """A stage that took so many GiB that grow with the size, and what every stage takes."""
    before = round(idle * GIB)
    admission.learn(rank, stage, size, StageMemory(before, before + round(took * GIB) + FIXED_BYTES))


def refusal(admission: Admission, size: SamplingParams) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        admission.check(size)
    return error.value


def test_with_nothing_learned_nothing_is_refused() -> None:
    ranks_of(1).check(params(8192, 8192, 1001))


def test_without_known_memory_nothing_is_refused() -> None:
    admission = Admission(DISAGGREGATED)
    learn(admission, DIT, "denoise", params(WIDE, HIGH), took=1000)
    admission.check(params(8192, 8192))


def test_a_larger_size_is_refused_with_what_it_needs_what_there_is_and_what_fits() -> None:
    admission = ranks_of(80)
    learn(admission, DIT, "denoise", params(WIDE, HIGH, 81), took=20)
    error = refusal(admission, params(2 * WIDE, 2 * HIGH, 81))
    assert error.param == "height"
    assert "1664x960x81 needs about 90.2 GiB on a dit rank, which has 80 GiB" in error.reason
    fitting = error.reason.partition("up to about ")[2].removesuffix(" fits")
    width, height, frames = (int(side) for side in fitting.split("x"))
    assert (width % 16, height % 16, frames) == (0, 0, 81)
    assert width > WIDE and width / height == pytest.approx(WIDE / HIGH, rel=0.03)
    admission.check(params(width, height, frames))


def test_too_many_frames_are_refused_by_the_name_of_the_frames() -> None:
    admission = ranks_of(80)
    learn(admission, DIT, "denoise", params(WIDE, HIGH, 81), took=20)
    error = refusal(admission, params(WIDE, HIGH, 401))
    assert error.param == "num_frames"
    frames = int(error.reason.rpartition("x")[2].removesuffix(" fits"))
    assert 81 < frames < 401 and frames % 4 == 1
    admission.check(params(WIDE, HIGH, frames))
    assert refusal(admission, params(WIDE, HIGH, frames + 4)).param == "num_frames"


def test_what_is_no_larger_than_what_was_computed_is_never_refused() -> None:
    admission = ranks_of(80)
    learn(admission, DIT, "denoise", params(1024, 1024), took=75)  # more than may be used
    admission.check(params(1024, 1024))
    admission.check(params(2048, 512))
    assert refusal(admission, params(1024, 1040)).param == "height"


def test_a_larger_size_that_is_computed_after_all_moves_the_limit() -> None:
    admission = ranks_of(80)
    learn(admission, DIT, "denoise", params(512, 512), took=10)
    refusal(admission, params(2048, 2048))
    learn(admission, DIT, "denoise", params(1024, 1024), took=12)  # most of it did not depend on the size
    admission.check(params(2048, 2048))


def test_costs_that_do_not_grow_with_the_size_are_told_apart_by_two_sizes() -> None:
    admission = ranks_of(80)
    learn(admission, DIT, "denoise", params(512, 512), took=20)
    learn(admission, DIT, "denoise", params(1024, 1024), took=20)
    admission.check(params(8192, 8192))


def test_small_needs_by_chance_are_not_scaled_up() -> None:
    admission = ranks_of(16)
    learn(admission, DIT, "denoise", params(32, 32), took=0)
    admission.check(params(4096, 4096))


def test_of_repeated_sizes_the_least_need_counts() -> None:
    admission = ranks_of(80)
    for took in (40, 5, 40):
        learn(admission, DIT, "denoise", params(512, 512), took=took)
    admission.check(params(1024, 1024))


def test_a_decode_is_judged_by_its_pixels_and_not_by_its_frames() -> None:
    admission = ranks_of(80)
    learn(admission, NON_DIT, "decode", params(WIDE, HIGH, 5), took=20)
    admission.check(params(WIDE, HIGH, 401))
    assert "on a non_dit rank" in refusal(admission, params(2 * WIDE, 2 * HIGH, 5)).reason


def test_an_encode_of_one_size_says_nothing_of_another() -> None:
    admission = ranks_of(80)
    learn(admission, NON_DIT, "encode", params(512, 512), took=20)
    admission.check(params(4096, 4096))


def test_an_encode_that_grows_with_the_size_is_refused() -> None:
    admission = ranks_of(80)
    learn(admission, NON_DIT, "encode", params(512, 512), took=5)
    learn(admission, NON_DIT, "encode", params(1024, 1024), took=20)
    assert refusal(admission, params(4096, 4096)).param == "height"


def test_one_rank_with_room_is_enough() -> None:
    admission = ranks_of(80)
    learn(admission, DIT, "denoise", params(512, 512), took=20)
    admission.set_capacity(DIT + 1, 1000 * GIB)
    admission.check(params(1024, 1024))


def test_a_replica_of_another_kind_that_has_not_computed_may_have_room() -> None:
    admission = ranks_of(80, Topology.build(ServerArgs(enable_disagg=True, num_gpus=4, sp_degree=2)))
    learn(admission, 0, "denoise", params(512, 512), took=20)
    admission.check(params(1024, 1024))
    learn(admission, 2, "denoise", params(512, 512), took=20)
    refusal(admission, params(1024, 1024))


def test_the_log_learns_from_what_workers_report_and_keeps_no_refused_request() -> None:
    topology = Topology.build(ServerArgs())
    log = RequestLog(topology, Admission(topology, 16))
    log.observe(WorkerUp(0, 1, 0.0, capacity=80 * GIB))
    submit(log, "small", params(512, 512))
    memory = StageMemory(10 * GIB, 40 * GIB)
    log.observe(Decoded(0, "small", b"", "image/png", 512, 512, 1, 0.0, 0.0, memory))
    log.finish("small", "done", None, None)
    with pytest.raises(InvalidRequest, match="1024x1024 needs about 129 GiB on a colocated rank, which has 80 GiB"):
        submit(log, "large", params(1024, 1024))
    assert log.counts()["queued"] == 0
    submit(log, "small again", params(512, 512))


def submit(log: RequestLog, name: str, sampling: SamplingParams) -> None:
    request = Request(request_id=name, params=sampling)
    log.open(request, Ticket(request, lambda request_id: None), limit=8)


# ---------------------------------------------------------------- with real ranks


@pytest.fixture
def engine() -> Iterator[Engine]:
    model = "builtin:timed?encode=0.01&denoise=0.04&decode=0.01&steps=2&conditioning_mb=0.1&latents_mb=0.1"
    args = ServerArgs(model_path=model, device="cpu", enable_disagg=True, num_gpus=3, warmup=False)
    with Engine(args) as started:
        yield started


def test_an_engine_refuses_at_once_what_its_ranks_have_no_memory_for(engine: Engine) -> None:
    small = engine.generate("a cat", seed=1, width=256, height=256)
    engine.generate("a cat", seed=1, width=512, height=512)  # the machine has room
    for rank in range(3):
        engine._admission.set_capacity(rank, 1 << 20)
    with pytest.raises(InvalidRequest, match=r"1024x512 needs about .* GiB on a dit rank") as error:
        engine.submit(SamplingParams(prompt="a cat", width=1024, height=512))
    assert error.value.param == "height"
    assert engine.generate("a cat", seed=1, width=256, height=256).media == small.media
    assert engine.status().failed == 0
