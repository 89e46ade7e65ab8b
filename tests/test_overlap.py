"""The overlap loop of a rank, and a whole fleet in one process: faults, cancels, and 500 requests in a row."""

from __future__ import annotations

import resource
import weakref

import pytest
import torch
from inprocess import Fleet

from ditrelay.runtime.communication.local_transport import FaultPlan
from ditrelay.runtime.pipelines_core.executors.stage_run import free_after
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import Edge

QUICK = "builtin:timed?encode=0.001&denoise=0.004&decode=0.001&steps=2&conditioning_mb=0.1&latents_mb=0.02"


def args(**changes: object) -> ServerArgs:
    settings = {"model_path": QUICK, "device": "cpu", "enable_disagg": True, "num_gpus": 4, "max_queue": 1000}
    return ServerArgs(**{**settings, **changes})


def one(prompt: str, **changes: object) -> bytes:
    with Fleet(args(**changes)) as fleet:
        request_id = fleet.submit(prompt, seed=7)
        fleet.wait()
        return fleet.media[request_id]


def test_many_requests_end_once_each_and_leave_nothing_behind() -> None:
    with Fleet(args()) as fleet:
        for i in range(40):
            fleet.submit(f"picture {i}")
        fleet.wait()
        fleet.settle()
    assert {finish.outcome for finish in fleet.outcomes.values()} == {"done"}
    assert set(fleet.finishes.values()) == {1}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_gpus": 2},
        {"num_non_dit_ranks": 2},
        {"num_non_dit_ranks": 2, "num_encoder_ranks": 1, "num_decoder_ranks": 1},
        {"enable_disagg": False, "num_gpus": 2},
        {"use_async_comm": False},
        {"max_pending_transfers": 1},
        {"verify_transfers": True},
    ],
    ids=str,
)
def test_every_mode_makes_the_same_picture(changes: dict[str, object]) -> None:
    assert one("a red apple", **changes) == one("a red apple", enable_disagg=False, num_gpus=1)


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
@pytest.mark.parametrize("changes", [{}, {"enable_disagg": False, "num_gpus": 1}, {"use_async_comm": False}], ids=str)
def test_a_request_that_runs_out_of_memory_once_is_tried_again_alone(stage: str, changes: dict[str, object]) -> None:
    with Fleet(args(**changes)) as fleet:
        request_id = ""
        for i in range(9):
            prompt = f"[oom {stage}]" if i == 4 else f"picture {i}"
            made = fleet.submit(prompt, seed=7)
            request_id = made if i == 4 else request_id
        fleet.wait()
        fleet.settle()
    assert {finish.outcome for finish in fleet.outcomes.values()} == {"done"}
    assert fleet.media[request_id] == one(f"[oom {stage}]")


def test_nothing_of_a_stage_that_ran_out_of_memory_outlives_it() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def stage() -> None:
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        try:
            raise RuntimeError("inside")
        except RuntimeError as error:
            raise torch.OutOfMemoryError("at last") from error

    with pytest.raises(torch.OutOfMemoryError) as caught:
        stage()
    error = caught.value
    del caught
    assert held[0]() is not None, "the traceback holds it"
    free_after(error)
    assert held[0]() is None


@pytest.mark.parametrize(
    "changes", [{"num_gpus": 2}, {"num_non_dit_ranks": 2}, {"max_pending_transfers": 1}, {"max_pending_bytes": 150_000}]
)
def test_transfers_arranged_while_the_device_still_encodes_change_no_picture(changes: dict[str, object]) -> None:
    clean = one("picture 3", num_gpus=2)
    with Fleet(args(verify_transfers=True, **changes), behind=0.005) as fleet:
        ids = [fleet.submit(f"picture {i}", seed=7) for i in range(20)]
        fleet.wait()
        fleet.settle()
    assert {finish.outcome for finish in fleet.outcomes.values()} == {"done"}
    assert fleet.media[ids[3]] == clean
    assert fleet.early > 5


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_failing_stage_fails_its_request_and_no_other(stage: str) -> None:
    with Fleet(args()) as fleet:
        ids = [fleet.submit(f"before [fail {stage}]" if i == 5 else f"picture {i}") for i in range(12)]
        fleet.wait()
        fleet.settle()
    bad = fleet.outcomes[ids[5]]
    assert bad.outcome == "failed" and bad.reason is not None and stage in bad.reason
    assert [fleet.outcomes[i].outcome for i in ids if i != ids[5]] == ["done"] * 11


def test_a_file_that_cannot_be_made_fails_its_request_whatever_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("no encoder here")

    monkeypatch.setattr("ditrelay.runtime.pipelines_core.stages.decode.encode_media", refuse)
    with Fleet(args()) as fleet:
        request_id = fleet.submit("a cat")
        fleet.wait(10)
        fleet.settle()
    reason = fleet.outcomes[request_id].reason
    assert reason is not None and "no encoder here" in reason


def test_what_only_the_encoder_can_refuse_names_the_parameter() -> None:
    with Fleet(args()) as fleet:
        request_id = fleet.submit("[invalid encode]")
        fleet.wait()
    assert fleet.outcomes[request_id].invalid_param == "prompt"


@pytest.mark.parametrize("kind", ["drop", "corrupt", "delay", "hang", "reorder"])
@pytest.mark.parametrize(
    "edge, behind",
    [(Edge(1, 0), 0.0), (Edge(0, 1), 0.0), (Edge(1, 0), 0.005)],
    ids=["to the DiT rank", "back", "to the DiT rank, early"],
)
def test_a_transfer_fault_costs_no_request(kind: str, edge: Edge, behind: float) -> None:
    clean = one("picture 3", num_gpus=2)
    faults = FaultPlan()
    faults.add(edge, 3, kind, seconds=0.3)
    settings = args(num_gpus=2, verify_transfers=True, dist_timeout=1.0, stage_timeout=2.0)
    with Fleet(settings, faults, behind=behind) as fleet:
        ids = [fleet.submit(f"picture {i}", seed=7) for i in range(8)]
        fleet.wait()
        fleet.settle()
    assert {finish.outcome for finish in fleet.outcomes.values()} == {"done"}
    assert fleet.media[ids[3]] == clean


@pytest.mark.parametrize("behind", [0.0, 0.02])
def test_a_cancel_ends_its_request_and_returns_everything(behind: float) -> None:
    with Fleet(args(model_path=QUICK.replace("denoise=0.004", "denoise=0.2")), behind=behind) as fleet:
        ids = [fleet.submit(f"picture {i}") for i in range(12)]
        for request_id in ids[::2]:
            fleet.cancel(request_id)
        fleet.wait()
        fleet.settle()
    assert [fleet.outcomes[i].outcome for i in ids[1::2]] == ["done"] * 6
    assert "cancelled" in {fleet.outcomes[i].outcome for i in ids[::2]}


def test_500_requests_hold_no_more_memory_than_the_window_allows() -> None:
    with Fleet(args(num_gpus=3)) as fleet:
        for i in range(100):
            fleet.submit(f"warm-up {i}")
        fleet.wait()
        fleet.settle()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(500):
            fleet.submit(f"picture {i}")
        fleet.wait(120)
        fleet.settle()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    edges, window = len(fleet.topology.edges), fleet.args.max_pending_transfers
    window_bytes = edges * window * 110_000
    assert fleet.most_pending_bytes <= window_bytes
    # The media of all requests are kept by the test itself; the allocator may hold some pages more.
    assert grown <= window_bytes + sum(map(len, fleet.media.values())) + 8_000_000
