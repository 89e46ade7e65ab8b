"""Jobs that outlive the process: one row each in a database, SQLite or whatever SQLAlchemy reaches. No torch here."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ditrelay.server.job_database import open_database
from ditrelay.server.job_rows import NAMES, OPEN, Job, JobState, job_of
from ditrelay.server.job_tables import JOBS, PICTURES, SCHEMA

logger = logging.getLogger(__name__)

_ROWS = sa.select(*(JOBS.c[name] for name in NAMES))


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
        self._database = open_database(url, claim_seconds)
        self._engine = self._database.engine
        self.mend()

    def close(self) -> None:
        self._database.close()

    def add(self, job: Job, *, limit: int, picture: bytes | None = None, max_bytes: int = sys.maxsize) -> Job | None:
        """Keep a new job; ``None`` where ``limit`` jobs are queued already, or its picture is too much.

        Args:
            picture: what the job starts from; kept until the job ends.
            max_bytes: of all pictures kept; one is, whatever its size.

        Returns:
            The job as it is kept, or the older one that has its idempotency key.
        """
        values = {name: getattr(job, name) for name in NAMES if name != "seq"}
        try:
            with self._engine.begin() as connection:
                if older := self._by_key(connection, job.idempotency_key):
                    return older
                waiting = sa.select(sa.func.count()).where(JOBS.c.state == JobState.QUEUED)
                if connection.execute(waiting).scalar_one() >= limit:
                    return None
                if picture is not None and _is_full(connection, len(picture), max_bytes):
                    return None
                connection.execute(JOBS.insert().values(values))
                if picture is not None:
                    connection.execute(PICTURES.insert().values(job=job.id, content=picture))
                return _one(connection, JOBS.c.id == job.id)
        except sa.exc.IntegrityError:  # another thread was faster with the same key
            with self._engine.connect() as connection:
                if older := self._by_key(connection, job.idempotency_key):
                    return older
            raise

    def _by_key(self, connection: sa.Connection, key: str | None) -> Job | None:
        return None if key is None else _one(connection, JOBS.c.idempotency_key == key)

    def find(self, key: str) -> Job | None:
        """The job of that idempotency key."""
        with self._engine.connect() as connection:
            return self._by_key(connection, key)

    def get(self, job_id: str) -> Job | None:
        if not job_id.isprintable():  # a client's text; PostgreSQL would refuse a NUL in it
            return None
        with self._engine.connect() as connection:
            return _one(connection, JOBS.c.id == job_id)

    def picture(self, job_id: str) -> bytes | None:
        """What the job starts from, until it has ended."""
        query = sa.select(PICTURES.c.content).where(PICTURES.c.job == job_id)
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one_or_none()

    def page(self, *, limit: int, after: Job | None = None, oldest_first: bool = False) -> list[Job]:
        """Up to ``limit`` jobs by submission, those behind ``after``."""
        seq = JOBS.c.seq
        query = _ROWS.order_by(seq if oldest_first else seq.desc()).limit(limit)
        if after is not None:
            query = query.where(seq > after.seq if oldest_first else seq < after.seq)
        return self._all(query)

    def queued(self, models: Sequence[str], limit: int) -> list[Job]:
        """The jobs of a model to be done next, whichever of its names they have, in the order of submission."""
        mine = sa.and_(JOBS.c.state == JobState.QUEUED, JOBS.c.model.in_(models))
        return self._all(_ROWS.where(mine).order_by(JOBS.c.seq).limit(limit))

    def queue(self, models: Sequence[str]) -> list[str]:
        """The ids of all queued jobs of a model, the next one first."""
        mine = sa.and_(JOBS.c.state == JobState.QUEUED, JOBS.c.model.in_(models))
        with self._engine.connect() as connection:
            return list(connection.execute(sa.select(JOBS.c.id).where(mine).order_by(JOBS.c.seq)).scalars())

    def place(self, job: Job, models: Sequence[str]) -> int:
        """How many queued jobs of its model there are up to this one, itself included."""
        c = JOBS.c
        mine = sa.and_(c.state == JobState.QUEUED, c.model.in_(models), c.seq <= job.seq)
        with self._engine.connect() as connection:
            return connection.execute(sa.select(sa.func.count()).where(mine)).scalar_one()

    def interrupted(self) -> list[Job]:
        """Jobs in progress: at a start, those that the last server has left."""
        return self._all(_ROWS.where(JOBS.c.state == JobState.IN_PROGRESS).order_by(JOBS.c.seq))

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
        return self._end(job_id, OPEN, state=JobState.FAILED, error=text)

    def cancel(self, job_id: str) -> bool:
        """As ``complete``."""
        return self._end(job_id, OPEN, state=JobState.CANCELLED)

    def delete(self, job_id: str) -> bool:
        """Whether there was such a job."""
        with self._engine.begin() as connection:
            _drop_picture(connection, job_id)
            return connection.execute(JOBS.delete().where(JOBS.c.id == job_id)).rowcount == 1

    def expired(self, *, lifetime: float, max_bytes: int) -> list[str]:
        """Ids of ended jobs that are older than ``lifetime`` seconds, and of the oldest whose files are more than
        ``max_bytes`` with the newer ones; of these the newest stays even where it alone is larger."""
        c = JOBS.c
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

    def mend(self) -> list[Job]:
        """Fail the jobs whose rows cannot be read, with that as the reason; of each row what is right stays."""
        with self._engine.begin() as connection:
            unreadable = [job for row in connection.execute(_ROWS) if (job := job_of(row)).damage]
            for job in unreadable:
                values = {name: getattr(job, name) for name in NAMES if name not in ("seq", "params")}
                ended = {"completed": job.completed or self._clock()}
                connection.execute(JOBS.update().where(JOBS.c.seq == job.seq).values(values | ended))
        for job in unreadable:
            logger.error("--job-store: %s is failed: %s", job.id, job.damage)
        return unreadable

    def probe(self) -> None:
        """Raises where the database takes no change."""
        with self._engine.begin() as connection:
            connection.execute(SCHEMA.update().values(version=SCHEMA.c.version))

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
            return [job_of(row) for row in connection.execute(query)]


def _moved(connection: sa.Connection, job_id: str, states: Sequence[JobState], values: Mapping[str, object]) -> bool:
    move = JOBS.update().where(JOBS.c.id == job_id, JOBS.c.state.in_(states)).values(values)
    return connection.execute(move).rowcount == 1


def _drop_picture(connection: sa.Connection, job_id: str) -> None:
    connection.execute(PICTURES.delete().where(PICTURES.c.job == job_id))


def _is_full(connection: sa.Connection, nbytes: int, max_bytes: int) -> bool:
    """Whether a picture of ``nbytes`` is too much beside those kept. SQLite and PostgreSQL do not read them for it."""
    kept = connection.execute(sa.select(sa.func.sum(sa.func.length(PICTURES.c.content)))).scalar_one()
    return bool(kept) and kept + nbytes > max_bytes


def _one(connection: sa.Connection, where: sa.ColumnElement[bool]) -> Job | None:
    row = connection.execute(_ROWS.where(where)).first()
    return None if row is None else job_of(row)
