"""A worker process that ends says how, whoever its parent is."""

from __future__ import annotations

import errno
import multiprocessing
import os
import select
import signal
from unittest.mock import MagicMock

import pytest

from ditrelay.runtime import launcher
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

    monkeypatch.setattr(launcher, "_stat", fail)
    assert launcher._is_dead(1) is dead


def test_a_process_that_can_not_be_watched_is_not_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    process, made = MagicMock(), launcher.LocalLauncher("cuda", ())
    monkeypatch.setattr(made, "_context", MagicMock(Process=MagicMock(return_value=process)))
    monkeypatch.setattr(launcher, "LocalProcess", MagicMock(side_effect=OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(OSError, match="Too many open files"):
        made.start(MagicMock(rank=0))
    process.kill.assert_called_once()
