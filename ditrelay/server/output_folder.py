"""The folder of finished videos: one server's alone, and each file in it whole or not there."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from ditrelay.errors import ConfigError
from ditrelay.server.job_database import lock_file
from ditrelay.server.job_store import JobStore

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_PART = ".part"  # an output that is still written


def output_path(folder: Path, job_id: str) -> Path:
    """Where the job's video is, or will be."""
    return folder / f"{job_id}.mp4"


def write(folder: Path, job_id: str, content: bytes) -> Path:
    """Write the job's video. Under its own name there is the whole file or none, also after a power cut.

    Raises:
        OSError: it cannot be written.
    """
    part, path = folder / f"{job_id}{_PART}", output_path(folder, job_id)
    try:
        with open(part, "wb", opener=_private) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)  # on a full disk it would keep the space that the next one needs
        raise
    return path


def _private(path: str, flags: int) -> int:
    """What people asked for is nobody else's."""
    return os.open(path, flags, 0o600)


def recover(store: JobStore, folder: Path) -> None:
    """Take up what the last server has left."""
    for video in folder.glob("*.mp4"):
        with contextlib.suppress(OSError):
            video.chmod(0o600)  # older versions left them to the umask
    for part in folder.glob(f"*{_PART}"):
        part.unlink(missing_ok=True)
    for job in store.interrupted():
        path = output_path(folder, job.id)
        if path.exists():  # written whole; only the row was not
            store.complete(job.id, path.name, path.stat().st_size)
        else:
            store.requeue(job.id)
            logger.info("%s was interrupted and is queued again", job.id)


def lock_folder(folder: Path) -> int:
    """A lock that lasts as long as its descriptor is open. Raises ``ConfigError`` where another process has it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return lock_file(folder / _LOCK)
    except BlockingIOError:
        raise ConfigError("--output-dir", f"{folder} is in use by another server; give each its own") from None
    except OSError as error:
        raise ConfigError("--output-dir", f"{folder} cannot be written to: {error.strerror}") from error


def last_seen(folder: Path) -> float:
    """Unix time at which a server was last at work here, as ``note_seen`` has noted it."""
    return (folder / _LOCK).stat().st_mtime


def note_seen(folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(folder / _LOCK)


def sqlite_url(folder: Path) -> str:
    """The database of jobs where no other is named."""
    return f"sqlite:///{folder / 'jobs.sqlite'}"
