"""The folder of one launch's sockets and checkpoints. Nothing of it stays, whoever of the processes dies first."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

from ditrelay.errors import StartupError

logger = logging.getLogger(__name__)

_PREFIX = "ditrelay-"
_LOCK = "lock"
FORKSERVER_LOCK = "ditrelay-lock"  # in multiprocessing's folder for the socket of a forkserver
LOOPBACK_SECONDS = 5.0
_SOCKET_BYTES = 107  # of a Unix socket's path, at most
_LONGEST_NAME = f"/{_PREFIX}12345678/commands-99.99"


def check_parent(parent: Path | None = None) -> None:
    """Raises ``StartupError`` where the sockets in a launch's folder would have paths that are too long."""
    parent, longest = parent or Path(tempfile.gettempdir()), _SOCKET_BYTES - len(_LONGEST_NAME)
    if len(os.fsencode(parent)) > longest:
        raise StartupError(f"sockets can't be made in {parent}: set TMPDIR to a path of at most {longest} bytes")


def check_loopback() -> None:
    """Raises ``StartupError`` where processes can't reach each other at 127.0.0.1, as in a new network namespace."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=LOOPBACK_SECONDS).close()
    except OSError as error:
        reason = f"the loopback interface (127.0.0.1), over which ranks meet, can't be used: {error.strerror or error}"
        raise StartupError(f"{reason}; in a network namespace of its own: ip link set lo up") from error


class RunDir:
    """A fresh folder that only this user may enter, locked while its head lives.

    Removed by ``close``; where the head was killed, by its workers when they notice (``remove``); where all were killed
    at once, by the next launch of this user.

    Attributes:
        path: the folder.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        _sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))  # with mode 0700
        self._lock = lock(self.path, _LOCK)

    def restore(self) -> None:
        """Make the folder anew where somebody has removed it, as cleaners of temporary folders do.

        What is connected stays so; processes that start from now on listen in the new one.

        Raises:
            OSError: that is not possible, or another user has made a folder of that name.
        """
        try:
            found = self.path.lstat()  # a link leads to where somebody else wants it
        except FileNotFoundError:
            logger.warning("the folder %s was removed; it is made anew", self.path)
            self.path.mkdir(mode=0o700)
            os.close(self._lock)
            self._lock = lock(self.path, _LOCK)
            return
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise OSError(f"{self.path} was removed, and what has its name now is not only this user's")

    def close(self) -> None:
        """May be called again."""
        remove(str(self.path))
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def lock(folder: Path, name: str) -> int:
    """A file that is locked until this process ends, so that a sweep can tell.

    It gets its name once it is locked: a sweep that finds it must never find it free while this process lives.
    """
    fd = os.open(folder / f"new-{name}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.rename(folder / f"new-{name}", folder / name)
    return fd


def remove(path: str) -> None:
    """Remove a launch's folder; several processes may do so at once."""
    shutil.rmtree(path, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what dead launches of this user have left: their folders, and those of their forkservers' sockets."""
    for mark in (*parent.glob(f"{_PREFIX}*/{_LOCK}"), *parent.glob(f"pymp-*/{FORKSERVER_LOCK}")):
        with contextlib.suppress(OSError):  # another user's, or gone already
            if mark.parent.lstat().st_uid == os.getuid() and _is_free(mark):
                remove(str(mark.parent))


def _is_free(lock: Path) -> bool:
    """Whether nobody holds it. Raises ``OSError`` where it can not be opened."""
    fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
