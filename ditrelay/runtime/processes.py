"""What this host says of processes, and whether it has room for one more."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from pathlib import Path

START_DESCRIPTORS = 10  # that the start of one process needs, most of them for a moment


def is_dead(child: int) -> bool:
    """Whether a child of this process has ended, waited for (by another launcher of this process) or not."""
    try:
        return stat(child)[0] == "Z"
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ESRCH)  # else it can't be told, for want of a file descriptor


def is_stopped(child: int) -> bool:
    try:
        return stat(child)[0] == "T"
    except OSError:
        return False


def check_room() -> None:
    """Raises ``OSError`` where the machine gives no further thread, and so no process, or no descriptors.

    A forkserver that can't fork ends, and the next one imports for seconds: so nothing is asked of it then. Nor does
    multiprocessing give back what it has opened where it can't open all.
    """
    probe = threading.Thread(target=_nothing, name="room")
    try:
        probe.start()
    except (RuntimeError, MemoryError) as error:
        raise OSError(errno.EAGAIN, f"the machine gives no further process ({error})") from error
    probe.join()
    opened: list[int] = []
    try:
        opened.extend(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(START_DESCRIPTORS))
    finally:
        for fd in opened:
            os.close(fd)


def _nothing() -> None:
    pass


def kill_child(pid: int) -> None:
    """Does nothing where it is gone, even if its number is another's by now."""
    with contextlib.suppress(OSError):
        if int(stat(pid)[1]) == os.getpid():
            os.kill(pid, signal.SIGKILL)


def stat(pid: int) -> list[str]:
    """State, parent's pid, ... of a process. Raises ``OSError`` for one that is gone."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()  # its name, in brackets before, may hold anything
