"""Checkpoints of a denoise: what is on disk when, what another process makes of it, and what a damaged one costs."""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.errors import CodecError, RequestCancelled
from ditrelay.runtime.payloads import State, StateValue
from ditrelay.runtime.pipelines_core.executors.checkpoints import Checkpoints
from ditrelay.runtime.pipelines_core.executors.progress import HostProgress, Reached
from ditrelay.runtime.pipelines_core.executors.state_files import save
from ditrelay.runtime.spool import Spool
from ditrelay.runtime.tickets import Ticket

TIMED = "builtin:timed?encode=0.01&denoise=0.8&decode=0.01&steps=8&conditioning_mb=0.1&latents_mb=0.1"
STATE: State = {"latents": StateValue([torch.arange(6.0).view(2, 3)]), "values": StateValue({"step": 4, "last": None})}


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(str(tmp_path)).make()


def wait_until(met: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until, f"it did not happen within {seconds:g} s"
        time.sleep(0.01)


def write(spool: Spool, request_id: str = "r") -> Path:
    Checkpoints(spool, 1).keep(request_id, 1, lambda: STATE, HostProgress())
    wait_until(spool.file(request_id).exists)
    return spool.file(request_id)


# ---------------------------------------------------------------- files


def test_another_process_reads_what_was_written(spool: Spool) -> None:
    write(spool)
    state = Checkpoints(spool, 1).read("r")
    assert state is not None and state["values"].value == {"step": 4, "last": None}
    (latents,) = state["latents"].value
    assert torch.equal(latents, torch.arange(6.0).view(2, 3))
    assert not spool.unfinished("r").exists()


def test_one_is_written_every_so_many_steps(spool: Spool) -> None:
    captured: list[int] = []

    def capture() -> State:
        captured.append(step)
        return STATE

    checkpoints = Checkpoints(spool, 3)
    for step in range(1, 8):
        checkpoints.keep("r", step, capture, HostProgress())
        wait_until(lambda: not checkpoints._writing.is_set())
    assert captured == [3, 6]


def test_without_a_file_it_starts_over_and_says_nothing(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    assert Checkpoints(spool, 1).read("r") is None
    assert not caplog.records


@pytest.mark.parametrize("damage", ["empty", "cut", "a byte", "no header", "another request"])
def test_a_damaged_file_is_removed_and_costs_only_the_steps(
    spool: Spool, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(spool, "other" if damage == "another request" else "r")
    content = bytearray(file.read_bytes())
    match damage:
        case "empty":
            content = bytearray()
        case "cut":
            del content[-3:]
        case "a byte":
            content[-1] ^= 1
        case "no header":
            content = bytearray((2).to_bytes(8, "little") + b"{}")
    spool.file("r").write_bytes(content)
    assert Checkpoints(spool, 1).read("r") is None
    assert "starts over" in caplog.text
    assert not spool.file("r").exists()


def test_what_the_next_step_does_to_the_tensors_is_not_in_the_file(spool: Spool) -> None:
    latents = torch.zeros(3)
    calls: list[Callable[[Reached], None]] = []

    class Later(HostProgress):
        def then(self, call: Callable[[Reached], None], *, step: bool = False) -> None:
            calls.append(call)

    checkpoints = Checkpoints(spool, 1)
    checkpoints.keep("r", 1, lambda: {"latents": StateValue(latents)}, Later())
    latents += 1.0
    assert not spool.file("r").exists(), "the device has not come that far"
    calls[0](Reached(0.0))
    wait_until(spool.file("r").exists)
    state = checkpoints.read("r")
    assert state is not None and torch.equal(state["latents"].value, torch.zeros(3))


def test_a_slow_disk_costs_checkpoints_and_neither_time_nor_memory(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, written = threading.Event(), []

    def slow(*args: object) -> None:
        written.append(args)
        finish.wait(10)

    monkeypatch.setattr("ditrelay.runtime.pipelines_core.executors.checkpoints.save", slow)
    checkpoints = Checkpoints(spool, 1)
    for step in range(1, 9):
        checkpoints.keep("r", step, lambda: STATE, HostProgress())
    finish.set()
    wait_until(lambda: not checkpoints._writing.is_set())
    assert len(written) == 1


def test_a_disk_that_is_full_costs_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(Spool(str(tmp_path)), 1)  # without its folder nothing can be written
    for step in (1, 2):
        checkpoints.keep("r", step, lambda: STATE, HostProgress())
        wait_until(lambda: not checkpoints._writing.is_set())
    assert caplog.text.count("could not be written") == 2


@pytest.mark.parametrize("number", [None, errno.EIO])
def test_one_whose_request_ends_while_it_is_written_is_no_failure_and_a_disk_that_fails_is(
    spool: Spool, number: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write_and_end(*what: object) -> None:
        save(*what)
        spool.discard("r")

    def fail(*paths: Path) -> None:
        raise OSError(number, os.strerror(number or 0))

    if number is None:
        monkeypatch.setattr("ditrelay.runtime.pipelines_core.executors.checkpoints.save", write_and_end)
    else:
        monkeypatch.setattr(os, "replace", fail)
    checkpoints = Checkpoints(spool, 1)
    checkpoints.keep("r", 1, lambda: STATE, HostProgress())
    wait_until(lambda: not checkpoints._writing.is_set())
    assert [record.levelno for record in caplog.records] == ([] if number is None else [logging.WARNING])
    assert not list(spool.folder.iterdir())


def test_a_model_that_can_not_be_continued_says_so_once(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    def capture() -> State:
        raise CodecError("a denoise of cogvideox can't be continued by another process")

    checkpoints = Checkpoints(spool, 1)
    for step in range(1, 4):
        checkpoints.keep("r", step, capture, HostProgress())
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "starts over" in caplog.text


def test_no_memory_for_a_copy_costs_that_checkpoint_and_not_the_denoise(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    def capture() -> State:
        raise torch.OutOfMemoryError("CUDA out of memory")

    checkpoints = Checkpoints(spool, 1)
    checkpoints.keep("r", 1, capture, HostProgress())
    assert "no checkpoint of request r after step 1: OutOfMemoryError" in caplog.text
    checkpoints.keep("r", 2, lambda: STATE, HostProgress())
    wait_until(spool.file("r").exists)


def test_the_end_of_a_request_removes_its_files(spool: Spool) -> None:
    write(spool)
    spool.unfinished("r").write_bytes(b"half")
    spool.discard("r")
    spool.discard("r")
    assert not list(spool.folder.iterdir())


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO])
def test_a_disk_on_which_nothing_can_be_removed_costs_the_head_nothing(
    spool: Spool, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only one says so of files that are not there, too, and the head looks for them at every request's end."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    spool.discard("r")
    spool.discard_preview("r")


# ---------------------------------------------------------------- a whole fleet


def settings(**changes: object) -> ServerArgs:
    base = {"model_path": TIMED, "device": "cpu", "enable_disagg": True, "num_gpus": 2, "warmup": False}
    return ServerArgs(**{**base, "checkpoint_steps": 2, **changes})


def submit(engine: Engine, **params: object) -> Ticket:
    return engine.submit(SamplingParams(prompt="a red apple", **{"seed": 1, **params}))


def steps_of(ticket: Ticket) -> list[int]:
    return [progress.step for progress in ticket.events() if progress.step]


def spool_of(engine: Engine) -> Spool:
    assert engine._controller is not None
    return engine._controller._spool


def kill(engine: Engine, rank: int) -> None:
    pid = engine.status().workers[rank].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_gpus": 3, "sp_degree": 2}, {"model_path": "builtin:emoji"}],
    ids=["one rank", "a replica of two", "the built-in model"],
)
def test_a_killed_worker_costs_only_the_steps_since_the_last_checkpoint(changes: dict[str, object]) -> None:
    steps = 24 if changes.get("model_path") else 8
    with Engine(settings(**changes)) as engine:
        expected = submit(engine, num_inference_steps=steps).result(60).media
        ticket = submit(engine, num_inference_steps=steps)
        wait_until(lambda: any(spool_of(engine).folder.glob("*.safetensors")))
        kill(engine, 0)
        assert ticket.result(60).media == expected
        done = steps_of(ticket)
        assert engine.status().workers[0].restarts == 1
        # A step that the killed worker had not told of yet is never told of.
        assert done.count(1) <= 1 and done.count(2) <= 1, f"it started over: {done}"
        assert done[-1] == steps
        wait_until(lambda: not list(spool_of(engine).folder.iterdir()))


def test_a_request_that_is_cancelled_leaves_no_checkpoint() -> None:
    with Engine(settings()) as engine:
        ticket = submit(engine)
        wait_until(lambda: any(spool_of(engine).folder.glob("*.safetensors")))
        ticket.cancel()
        with pytest.raises(RequestCancelled):
            ticket.result(10)
        time.sleep(0.5)
        assert not list(spool_of(engine).folder.iterdir())


def test_without_the_flag_nothing_is_written() -> None:
    with Engine(settings(checkpoint_steps=0)) as engine:
        ticket = submit(engine)
        for progress in ticket.events():
            if progress.step:
                assert not list(spool_of(engine).folder.iterdir())
