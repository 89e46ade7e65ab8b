"""A worker process that ends says how, whoever its parent is."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from unittest.mock import MagicMock

import pytest
import torch

from ditrelay.runtime import launcher, processes, worker
from ditrelay.runtime.launcher import LocalProcess


def _end(by: int) -> None:
    os._exit(7) if by == 0 else os.kill(os.getpid(), by)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize(
    ("by", "words"), [(0, "exit code 7"), (signal.SIGKILL, "no memory left"), (signal.SIGABRT, "Aborted; its stack")]
)
def test_a_process_that_ended_says_how(method: str, by: int, words: str) -> None:
    process = multiprocessing.get_context(method).Process(target=_end, args=(by,))
    process.start()
    handle = LocalProcess(process)
    assert select.select([handle.fileno()], [], [], 30.0)[0]
    assert words in handle.ending()
    handle.close()


@pytest.mark.parametrize(("number", "dead"), [(errno.ENOENT, True), (errno.ESRCH, True), (errno.EMFILE, False)])
def test_a_process_that_can_not_be_looked_at_is_not_taken_for_a_dead_one(
    number: int, dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pid: int) -> list[str]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(processes, "stat", fail)
    assert processes.is_dead(1) is dead


def test_workers_are_spawned_where_cuda_does_not_work_after_a_fork(caplog: pytest.LogCaptureFixture) -> None:
    made = launcher.LocalLauncher("cuda", ())
    with caplog.at_level("WARNING", "ditrelay"):
        made._try_fork()
    if torch.cuda.is_available():
        assert made._context.get_start_method() == "forkserver" and not caplog.records
    else:
        assert made._context.get_start_method() == "spawn" and not made._uses_forkserver
        (record,) = caplog.records
        assert re.search("CUDA does not work after a fork \\(.+\\)", record.getMessage())


def _answer_nothing(answer: object) -> None:
    os._exit(0)


def _never_answer(answer: object) -> None:
    signal.pause()


@pytest.mark.parametrize(
    ("look", "seconds", "words"),
    [(_answer_nothing, 30.0, "the process ended"), (_never_answer, 0.5, "no answer within")],
)
def test_a_fork_that_ends_or_hangs_over_cuda_is_trouble_and_holds_nobody_up(
    look: object, seconds: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_look_for_gpus", look)
    monkeypatch.setattr(launcher, "CUDA_SECONDS", seconds)
    assert words in launcher.LocalLauncher("cuda", ())._trouble_of_a_fork()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """What a worker process does before it works, in this one, with these variables already there."""
    monkeypatch.setattr(worker, "run_worker", lambda spec: None)
    monkeypatch.setattr(launcher, "use_private_caches", lambda run_dir: None)  # it is this process's folder, too
    threads = torch.get_num_threads()

    def made(device_type: str, **there: str) -> None:
        monkeypatch.setattr(os, "environ", there)
        launcher._run(MagicMock(device_type=device_type), launcher._ENVIRONMENT[device_type])

    yield made
    torch.set_num_threads(threads)


def test_a_worker_gets_its_devices_environment_whatever_the_forkserver_was_started_for(
    run: Callable[..., None],
) -> None:
    run("cuda", NCCL_SOCKET_IFNAME="eth7")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth7", "what the user has set stays"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"


@pytest.mark.parametrize(
    ("there", "threads"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2), ({"OMP_NUM_THREADS": "3,2"}, 5)]
)
def test_a_worker_on_a_cpu_has_the_threads_that_were_asked_for(
    run: Callable[..., None], there: dict[str, str], threads: int
) -> None:
    torch.set_num_threads(5)
    run("cpu", **there)
    assert torch.get_num_threads() == threads


def test_a_forkserver_that_hangs_over_a_start_is_killed_and_one_that_still_imports_is_not() -> None:
    made = launcher.LocalLauncher("cpu", ())
    with subprocess.Popen(["sleep", "60"]) as hung:
        made._forkserver, made._busy_since = hung.pid, time.monotonic() - launcher.START_SECONDS - 1.0
        assert not made.look_after() and hung.poll() is None
        made._has_imported = True
        assert not made.look_after()
        assert hung.wait(10) == -signal.SIGKILL
    assert made.look_after(), "it is to be renewed"


def test_no_forkserver_is_asked_for_a_process_that_the_machine_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can't fork ends, and the next one imports for seconds."""
    made = launcher.LocalLauncher("cpu", ())
    monkeypatch.setattr(made, "_context", MagicMock())
    monkeypatch.setattr(threading.Thread, "start", MagicMock(side_effect=RuntimeError("can't start new thread")))
    with pytest.raises(OSError, match="no further process"):
        made.start(MagicMock(rank=0))
    made._context.Process.return_value.start.assert_not_called()


def test_a_process_that_can_not_be_watched_is_not_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    process, made = MagicMock(), launcher.LocalLauncher("cpu", ())
    monkeypatch.setattr(made, "_context", MagicMock(Process=MagicMock(return_value=process)))
    monkeypatch.setattr(launcher, "LocalProcess", MagicMock(side_effect=OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(OSError, match="Too many open files"):
        made.start(MagicMock(rank=0))
    process.kill.assert_called_once()


def test_ctrl_c_and_the_end_of_the_terminal_reach_no_process_that_is_started_inside() -> None:
    read = ["grep", "SigBlk", "/proc/self/status"]
    with launcher.no_interrupts():
        inside = subprocess.run(read, capture_output=True, text=True, timeout=30, check=True).stdout
    after = subprocess.run(read, capture_output=True, text=True, timeout=30, check=True).stdout
    both = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGHUP - 1)
    assert int(inside.split()[1], 16) & both == both
    assert int(after.split()[1], 16) & both == 0
