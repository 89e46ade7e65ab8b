"""A worker process that ends says how, whoever its parent is."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal

import pytest

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
