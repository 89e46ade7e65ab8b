"""The folder of one launch's sockets and checkpoints. Nothing of it stays, whoever of the processes dies first."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from ditrelay.errors import StartupError

_PREFIX = "ditrelay-"
_LOCK = "lock"
_SOCKET_BYTES = 107  # of a Unix socket's path, at most
_LONGEST_NAME = f"/{_PREFIX}12345678/commands-99.99"


def check_parent(parent: Path | None = None) -> None:
    """Raises ``StartupError`` where the sockets in a launch's folder would have paths that are too long."""
    parent, longest = parent or Path(tempfile.gettempdir()), _SOCKET_BYTES - len(_LONGEST_NAME)
    if len(os.fsencode(parent)) > longest:
        raise StartupError(f"sockets can't be made in {parent}: set TMPDIR to a path of at most {longest} bytes")


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
        # It gets its name once it is locked: a sweep that finds it must never find it free while this process lives.
        self._lock = os.open(self.path / "new-lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(self.path / "new-lock", self.path / _LOCK)

    def close(self) -> None:
        """May be called again."""
        remove(str(self.path))
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove(path: str) -> None:
    """Remove a launch's folder; several processes may do so at once."""
    shutil.rmtree(path, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what dead launches of this user have left."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):  # another user's, or gone already
            if lock.parent.stat().st_uid == os.getuid() and _is_free(lock):
                remove(str(lock.parent))


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
