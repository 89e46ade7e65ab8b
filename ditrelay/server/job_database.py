"""Opens the database of jobs: for one server, up to date, private, and set aside where it is damaged."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from ditrelay.errors import ConfigError
from ditrelay.server.job_rows import document
from ditrelay.server.job_tables import bring_up_to_date

logger = logging.getLogger(__name__)

_CLAIM = 0x64697472  # the number of our advisory lock in a database; "ditr"
_IN_USE = "the database is in use by another server; give each its own"
_BESIDE = ("", "-wal", "-shm")  # the files of one SQLite database


@dataclass(frozen=True)
class Database:
    """A database of jobs that is this server's own until ``close``."""

    engine: sa.Engine
    _held: ExitStack

    def close(self) -> None:
        self._held.close()


def open_database(url: str, claim_seconds: float) -> Database:
    """The database of an SQLAlchemy URL, its tables as this version has them.

    Args:
        claim_seconds: how long another server may take to leave it.

    Raises:
        ConfigError: it cannot be opened, is a newer version's, or (SQLite, PostgreSQL) another server uses it.
    """
    try:
        # A connection that the database has closed in the meantime is made anew.
        engine = sa.create_engine(_with_driver(url), pool_pre_ping=True, json_deserializer=document)
        with ExitStack() as held:
            held.callback(engine.dispose)
            if engine.dialect.name == "sqlite":
                _prepare_file(engine, held)
            elif engine.dialect.name == "postgresql":
                held.callback(_claimed(engine, claim_seconds).close)
            bring_up_to_date(engine)
            return Database(engine, held.pop_all())
    except ModuleNotFoundError as error:
        hint = "; pip install 'ditrelay[postgres]'" if error.name in ("psycopg", "psycopg2") else ""
        raise ConfigError("--job-store", f"its driver, {error.name}, is not installed{hint}") from error
    except BlockingIOError:
        raise ConfigError("--job-store", _IN_USE) from None
    except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
        # Without the URL, which may hold a password.
        reason = str(error).splitlines()[0]
        raise ConfigError("--job-store", f"{reason}; allowed: an SQLAlchemy URL that can be opened") from error


def _with_driver(url: str) -> str:
    """PostgreSQL's own spelling, for the driver that ditrelay installs."""
    scheme, separator, rest = url.partition("://")
    return f"postgresql+psycopg{separator}{rest}" if scheme in ("postgres", "postgresql") else url


def _claimed(engine: sa.Engine, seconds: float) -> sa.Connection:
    """A connection that holds the database for one server: a second one would take its jobs in progress for lost.

    PostgreSQL takes the lock back when the connection ends, also by ``kill -9``.
    """
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    until = time.monotonic() + seconds
    while not connection.execute(sa.select(sa.func.pg_try_advisory_lock(_CLAIM))).scalar_one():
        if time.monotonic() >= until:
            connection.close()
            raise ConfigError("--job-store", _IN_USE)
        time.sleep(0.1)
    return connection


# ---------------------------------------------------------------- SQLite's file


def _prepare_file(engine: sa.Engine, held: ExitStack) -> None:
    """Lock the file, set a damaged one aside, and see to it that connections are as they should be."""
    with engine.connect() as connection:  # a URL has many ways to name one file
        name = connection.exec_driver_sql("PRAGMA database_list").one().file
    if not name:
        raise ConfigError("--job-store", "a database in memory forgets its jobs; allowed: sqlite:///FILE")
    path = Path(name)
    # Another process must not take its jobs in progress for lost, for as long as the descriptor is open.
    held.callback(os.close, lock_file(Path(f"{path}.lock")))
    if damage := _damage(engine):
        engine.dispose()
        _set_aside(path, damage)
    _make_private(path)
    engine.dispose()
    sa.event.listen(engine, "connect", _on_connect)
    watch = _Watch(path)
    sa.event.listen(engine, "do_connect", watch)  # which would make an empty file
    sa.event.listen(engine, "checkout", watch)


def _damage(engine: sa.Engine) -> str:
    """Why the file is no database any more; empty where it is one."""
    try:
        with engine.connect() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
    except sa.exc.OperationalError:  # it cannot be opened or is busy: that is no damage
        raise
    except sa.exc.DatabaseError as error:
        return str(error.orig)
    return "" if found == "ok" else " ".join(str(found).split())


def _set_aside(path: Path, damage: str) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    for suffix in _BESIDE:
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    logger.error("--job-store: %s is damaged (%s); it is kept as %s, and a new one is begun", path, damage, aside.name)


def _make_private(path: Path) -> None:
    """Prompts and pictures are their owners'. What SQLite makes beside the file has the file's mode."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    for suffix in _BESIDE:
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another user's file is as they want it
            os.chmod(f"{path}{suffix}", 0o600)


def lock_file(path: Path) -> int:
    """A descriptor that holds ``path`` against other processes until it is closed, also by the end of this one.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file cannot be made.
    """
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _on_connect(connection: Any, record: object) -> None:
    """WAL: whoever lists jobs does not wait for whoever writes one. FULL: what was answered outlives a power cut."""
    for setting in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {setting}")


class _Watch:
    """Lets no connection be used whose file is gone: what is written to it would be answered, and lost."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = self._look()

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def __call__(self, *connection: object) -> None:
        if self._look() != self._identity:
            lost = FileNotFoundError(f"the file {self._path.name} was removed or replaced; restart the server")
            raise sa.exc.OperationalError(None, None, lost)
