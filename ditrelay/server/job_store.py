"""Jobs that outlive the process: one row each in a database, SQLite or whatever SQLAlchemy reaches. No torch here."""

from __future__ import annotations

import enum
import fcntl
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.mysql import LONGBLOB

from ditrelay.errors import ConfigError


class JobState(enum.StrEnum):
    """Where a job is; the last three are ends."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self not in _OPEN


_OPEN = (JobState.QUEUED, JobState.IN_PROGRESS)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row.

    Attributes:
        id: public name, of our own making.
        model: the name of the model that it is for.
        params: the parameters as they were resolved, and the model's frames per second (``fps``), JSON; the picture to
            start from is kept beside the row.
        fingerprint: tells two requests with one ``idempotency_key`` apart.
        created, started, completed: Unix time in seconds; ``completed`` is when it ended, however it ended.
        error: why it failed.
        file_name: the output, in the output folder; empty before there is one.
        nbytes: size of the output.
        seq: order of submission; the database counts it.
    """

    id: str
    model: str
    params: dict[str, Any]
    state: JobState = JobState.QUEUED
    created: float
    started: float | None = None
    completed: float | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""
    error: str | None = None
    file_name: str = ""
    nbytes: int = 0
    seq: int = 0


_TABLES = sa.MetaData()
_JOBS = sa.Table(
    "ditrelay_jobs",
    _TABLES,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(64), unique=True, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("params", sa.JSON, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("created", sa.Float(53), nullable=False),
    sa.Column("started", sa.Float(53)),
    sa.Column("completed", sa.Float(53)),
    sa.Column("idempotency_key", sa.String(255), unique=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("file_name", sa.String(128), nullable=False),
    sa.Column("nbytes", sa.BigInteger, nullable=False),
    sa.Index("ditrelay_jobs_queue", "state", "model", "seq"),
    sqlite_autoincrement=True,  # a number is not given again after a deletion: pages stay in order
)
# Apart from the rows, which are read at every poll: only whoever starts a job reads its picture.
_PICTURES = sa.Table(
    "ditrelay_pictures",
    _TABLES,
    sa.Column("job", sa.String(64), primary_key=True),
    sa.Column("content", sa.LargeBinary().with_variant(LONGBLOB(), "mysql", "mariadb"), nullable=False),
)
_CLAIM = 0x64697472  # the number of our advisory lock in a database; "ditr"
_IN_USE = "the database is in use by another server; give each its own"
_NAMES = tuple(field.name for field in fields(Job))
_ROWS = sa.select(*(_JOBS.c[name] for name in _NAMES))


class JobStore:
    """The jobs of one server. Every method blocks on the database: call none on an event loop's thread.

    A change of state is one conditional UPDATE, so a job ends once, whoever races for its end.

    Args:
        url: an SQLAlchemy URL.
        clock: Unix time in seconds.
        claim_seconds: how long another server may take to leave the database.

    Raises:
        ConfigError: the database cannot be opened, or (SQLite, PostgreSQL) another server uses it.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time, claim_seconds: float = 10.0) -> None:
        self._clock = clock
        try:
            # A connection that the database has closed in the meantime is made anew.
            self._engine = sa.create_engine(
                _with_driver(url), pool_pre_ping=True, json_deserializer=msgspec.json.decode
            )
            with ExitStack() as held:
                held.callback(self._engine.dispose)
                if self._engine.dialect.name == "sqlite":
                    sa.event.listen(self._engine, "connect", _on_connect)
                    held.callback(os.close, _locked(self._engine))
                elif self._engine.dialect.name == "postgresql":
                    held.callback(_claimed(self._engine, claim_seconds).close)
                _TABLES.create_all(self._engine)
                self._held = held.pop_all()
        except ModuleNotFoundError as error:
            hint = "; pip install 'ditrelay[postgres]'" if error.name in ("psycopg", "psycopg2") else ""
            raise ConfigError("--job-store", f"its driver, {error.name}, is not installed{hint}") from error
        except BlockingIOError:
            raise ConfigError("--job-store", _IN_USE) from None
        except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
            # Without the URL, which may hold a password.
            reason = str(error).splitlines()[0]
            raise ConfigError("--job-store", f"{reason}; allowed: an SQLAlchemy URL that can be opened") from error

    def close(self) -> None:
        self._held.close()

    def add(self, job: Job, *, limit: int, picture: bytes | None = None, max_bytes: int = sys.maxsize) -> Job | None:
        """Keep a new job; ``None`` where ``limit`` jobs are queued already, or its picture is too much.

        Args:
            picture: what the job starts from; kept until the job ends.
            max_bytes: of all pictures kept; one is, whatever its size.

        Returns:
            The job as it is kept, or the older one that has its idempotency key.
        """
        values = {name: getattr(job, name) for name in _NAMES if name != "seq"}
        try:
            with self._engine.begin() as connection:
                if older := self._by_key(connection, job.idempotency_key):
                    return older
                waiting = sa.select(sa.func.count()).where(_JOBS.c.state == JobState.QUEUED)
                if connection.execute(waiting).scalar_one() >= limit:
                    return None
                if picture is not None and _is_full(connection, len(picture), max_bytes):
                    return None
                connection.execute(_JOBS.insert().values(values))
                if picture is not None:
                    connection.execute(_PICTURES.insert().values(job=job.id, content=picture))
                return _one(connection, _JOBS.c.id == job.id)
        except sa.exc.IntegrityError:  # another thread was faster with the same key
            with self._engine.connect() as connection:
                if older := self._by_key(connection, job.idempotency_key):
                    return older
            raise

    def _by_key(self, connection: sa.Connection, key: str | None) -> Job | None:
        return None if key is None else _one(connection, _JOBS.c.idempotency_key == key)

    def find(self, key: str) -> Job | None:
        """The job of that idempotency key."""
        with self._engine.connect() as connection:
            return self._by_key(connection, key)

    def get(self, job_id: str) -> Job | None:
        if not job_id.isprintable():  # a client's text; PostgreSQL would refuse a NUL in it
            return None
        with self._engine.connect() as connection:
            return _one(connection, _JOBS.c.id == job_id)

    def picture(self, job_id: str) -> bytes | None:
        """What the job starts from, until it has ended."""
        query = sa.select(_PICTURES.c.content).where(_PICTURES.c.job == job_id)
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one_or_none()

    def page(self, *, limit: int, after: Job | None = None, oldest_first: bool = False) -> list[Job]:
        """Up to ``limit`` jobs by submission, those behind ``after``."""
        seq = _JOBS.c.seq
        query = _ROWS.order_by(seq if oldest_first else seq.desc()).limit(limit)
        if after is not None:
            query = query.where(seq > after.seq if oldest_first else seq < after.seq)
        return self._all(query)

    def queued(self, models: Sequence[str], limit: int) -> list[Job]:
        """The jobs of a model to be done next, whichever of its names they have, in the order of submission."""
        mine = sa.and_(_JOBS.c.state == JobState.QUEUED, _JOBS.c.model.in_(models))
        return self._all(_ROWS.where(mine).order_by(_JOBS.c.seq).limit(limit))

    def queue(self, models: Sequence[str]) -> list[str]:
        """The ids of all queued jobs of a model, the next one first."""
        mine = sa.and_(_JOBS.c.state == JobState.QUEUED, _JOBS.c.model.in_(models))
        with self._engine.connect() as connection:
            return list(connection.execute(sa.select(_JOBS.c.id).where(mine).order_by(_JOBS.c.seq)).scalars())

    def place(self, job: Job, models: Sequence[str]) -> int:
        """How many queued jobs of its model there are up to this one, itself included."""
        c = _JOBS.c
        mine = sa.and_(c.state == JobState.QUEUED, c.model.in_(models), c.seq <= job.seq)
        with self._engine.connect() as connection:
            return connection.execute(sa.select(sa.func.count()).where(mine)).scalar_one()

    def interrupted(self) -> list[Job]:
        """Jobs in progress: at a start, those that the last server has left."""
        return self._all(_ROWS.where(_JOBS.c.state == JobState.IN_PROGRESS).order_by(_JOBS.c.seq))

    def start(self, job_id: str) -> bool:
        """Whether the job was queued, and is in progress now."""
        return self._move(job_id, (JobState.QUEUED,), state=JobState.IN_PROGRESS, started=self._clock())

    def requeue(self, job_id: str) -> bool:
        return self._move(job_id, (JobState.IN_PROGRESS,), state=JobState.QUEUED, started=None)

    def complete(self, job_id: str, file_name: str, nbytes: int) -> bool:
        """Whether this call ended the job; false where it was cancelled or deleted before."""
        output = {"file_name": file_name, "nbytes": nbytes}
        return self._end(job_id, (JobState.IN_PROGRESS,), state=JobState.COMPLETED, **output)

    def fail(self, job_id: str, error: str) -> bool:
        """As ``complete``."""
        text = error.replace("\0", "")  # PostgreSQL keeps no text with it
        return self._end(job_id, _OPEN, state=JobState.FAILED, error=text)

    def cancel(self, job_id: str) -> bool:
        """As ``complete``."""
        return self._end(job_id, _OPEN, state=JobState.CANCELLED)

    def delete(self, job_id: str) -> bool:
        """Whether there was such a job."""
        with self._engine.begin() as connection:
            _drop_picture(connection, job_id)
            return connection.execute(_JOBS.delete().where(_JOBS.c.id == job_id)).rowcount == 1

    def expired(self, *, lifetime: float, max_bytes: int) -> list[str]:
        """Ids of ended jobs that are older than ``lifetime`` seconds, and of the oldest whose files are more than
        ``max_bytes`` with the newer ones; of these the newest stays even where it alone is larger."""
        c = _JOBS.c
        ended = sa.select(c.id, c.completed, c.nbytes).where(c.completed.is_not(None)).order_by(c.completed.desc())
        with self._engine.connect() as connection:
            rows = connection.execute(ended).all()
        oldest = self._clock() - lifetime
        due, held, newest = [], 0, True
        for row in rows:
            held += row.nbytes
            if row.completed <= oldest or (row.nbytes and held > max_bytes and not newest):
                due.append(row.id)
            newest = newest and not row.nbytes
        return due

    def _move(self, job_id: str, states: Sequence[JobState], **values: object) -> bool:
        with self._engine.begin() as connection:
            return _moved(connection, job_id, states, values)

    def _end(self, job_id: str, states: Sequence[JobState], **values: object) -> bool:
        with self._engine.begin() as connection:
            ended = _moved(connection, job_id, states, values | {"completed": self._clock()})
            if ended:
                _drop_picture(connection, job_id)
            return ended

    def _all(self, query: sa.Select[Any]) -> list[Job]:
        with self._engine.connect() as connection:
            return [_job(row) for row in connection.execute(query)]


def _moved(connection: sa.Connection, job_id: str, states: Sequence[JobState], values: Mapping[str, object]) -> bool:
    move = _JOBS.update().where(_JOBS.c.id == job_id, _JOBS.c.state.in_(states)).values(values)
    return connection.execute(move).rowcount == 1


def _drop_picture(connection: sa.Connection, job_id: str) -> None:
    connection.execute(_PICTURES.delete().where(_PICTURES.c.job == job_id))


def _is_full(connection: sa.Connection, nbytes: int, max_bytes: int) -> bool:
    """Whether a picture of ``nbytes`` is too much beside those kept. SQLite and PostgreSQL do not read them for it."""
    kept = connection.execute(sa.select(sa.func.sum(sa.func.length(_PICTURES.c.content)))).scalar_one()
    return bool(kept) and kept + nbytes > max_bytes


def _one(connection: sa.Connection, where: sa.ColumnElement[bool]) -> Job | None:
    row = connection.execute(_ROWS.where(where)).first()
    return None if row is None else _job(row)


def _job(row: sa.Row[Any]) -> Job:
    values: dict[str, Any] = dict(zip(_NAMES, row, strict=True))
    values["state"] = JobState(values["state"])
    return Job(**values)


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


def _locked(engine: sa.Engine) -> int:
    """The same for the file of an SQLite database: a lock in a file of its own, for as long as its descriptor is open.

    Raises:
        BlockingIOError: another process has it.
    """
    with engine.connect() as connection:  # a URL has many ways to name one file
        path = connection.exec_driver_sql("PRAGMA database_list").one().file
    if not path:
        raise ConfigError("--job-store", "a database in memory forgets its jobs; allowed: sqlite:///FILE")
    return lock_file(Path(f"{path}.lock"))


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
