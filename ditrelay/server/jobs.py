"""The videos of one server: what routes ask of them, their life, and how long they are kept."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from ditrelay.runtime.request import RequestState, SamplingParams
from ditrelay.runtime.telemetry import caller
from ditrelay.server.clock_watch import ClockWatch
from ditrelay.server.events import EventLog, EventLogs
from ditrelay.server.job_rows import Job, JobState
from ditrelay.server.job_runner import JobRunner, content_path, failure
from ditrelay.server.job_schemas import Cancelled, Completed, Failed
from ditrelay.server.job_store import JobStore
from ditrelay.server.job_thread import JobThread
from ditrelay.server.live import JobNames, Live
from ditrelay.server.output_folder import last_seen, lock_folder, note_seen, output_path, recover, sqlite_url
from ditrelay.server.problem import ApiError

if TYPE_CHECKING:
    from ditrelay.async_engine import AsyncEngine

T = TypeVar("T")

logger = logging.getLogger(__name__)

_SWEEP_SECONDS = 60.0
_LOOK_SECONDS = 2.0


@dataclass
class Jobs:
    """The jobs of one server. For the event loop's thread; whatever blocks runs on a thread of its own."""

    engine: AsyncEngine
    store: JobStore
    folder: Path
    _lock: int
    _thread: JobThread = field(init=False)
    _runner: JobRunner = field(init=False)
    _clock: ClockWatch = field(init=False)

    def __post_init__(self) -> None:
        self._thread = JobThread(self.folder)
        self._clock = ClockWatch(last=last_seen(self.folder))
        self._runner = JobRunner(self.engine, self.store, self._thread, self.folder)

    @classmethod
    async def open(cls, engine: AsyncEngine) -> Jobs:
        """The jobs in ``--output-dir``; those that a dead server has left are queued again.

        Raises:
            ConfigError: the folder or the database cannot be used, or another server uses the folder.
        """
        return await asyncio.to_thread(cls._open, engine)

    @classmethod
    def _open(cls, engine: AsyncEngine) -> Jobs:
        folder, args = Path(engine.args.output_dir).absolute(), engine.args
        lock = lock_folder(folder)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, lock)
            jobs = cls(engine, JobStore(args.job_store or sqlite_url(folder)), folder, lock)
            recover(jobs.store, folder)
            undo.pop_all()
        return jobs

    # ------------------------------------------------------------ what routes call

    @property
    def live(self) -> dict[str, Live]:
        """The jobs on the engine, by id."""
        return self._runner.live

    @property
    def trouble(self) -> str:
        """Why jobs cannot be kept at present; empty where they can."""
        return self._thread.trouble

    @property
    def names(self) -> JobNames:
        """Which job an engine's request is for."""
        return self._runner.names

    @property
    def logs(self) -> EventLogs:
        """What happens to jobs, for those who follow them."""
        return self._runner.logs

    async def call(self, what: Callable[..., T], *values: Any, **named: Any) -> T:
        """As ``JobThread.call``."""
        return await self._thread.call(what, *values, **named)

    async def add(self, params: SamplingParams, *, key: str | None, fingerprint: str) -> Job | None:
        """Queue a job of resolved parameters. Returns what ``JobStore.add`` does."""
        document = msgspec.to_builtins(msgspec.structs.replace(params, image=None)) | {"fps": self.engine.card.fps}
        job = Job(
            id=f"video_{secrets.token_hex(16)}",
            model=self.engine.args.model_name,
            params=document,
            created=time.time(),
            idempotency_key=key,
            fingerprint=fingerprint,
        )
        args = self.engine.args
        limits = {"limit": args.max_jobs, "max_bytes": args.max_output_bytes}
        try:
            kept = await self.call(self.store.add, job, picture=params.image, **limits)
        finally:  # where the answer is lost it may be queued all the same
            self._runner.wake()
        if kept is not None and kept.id == job.id and (trace := caller()):
            self._runner.callers[job.id] = trace
        return kept

    async def cancel(self, job_id: str) -> bool:
        """Whether this call ended the job."""
        ended = await self._ending(job_id, self.store.cancel)
        if ended:
            self.logs.open(job_id).add(Cancelled())
        self._runner.stop(job_id)
        return ended

    async def delete(self, job: Job) -> None:
        """Remove the job and its file; one that runs is cancelled."""
        await self._ending(job.id, self._remove)
        self.logs.open(job.id).add(Cancelled())
        self._runner.stop(job.id)

    def path(self, job: Job) -> Path:
        return self.folder / job.file_name

    async def queue(self) -> list[str]:
        """The ids of the jobs that wait, the next one first: those on the engine, then those in the store."""
        stored = await self.call(self.store.queue, self.engine.args.model_names)
        # Read after the store: what has moved to the engine in between is not missing, but there twice.
        return self._next() + [job_id for job_id in stored if job_id not in self.live]

    async def place(self, job: Job) -> int | None:
        """Where the job is in ``queue``, 1 is next; ``None``: it does not wait. Does not read the whole queue."""
        waits = job.state is JobState.QUEUED and job.model in (names := self.engine.args.model_names)
        stored = await self.call(self.store.place, job, names) if waits else None
        first = self._next()
        if job.id in self.live or stored is None:
            return first.index(job.id) + 1 if job.id in first else None
        return len(first) + stored

    def _next(self) -> list[str]:
        return [job_id for job_id, live in self.live.items() if live.stage is RequestState.QUEUED]

    def log_of(self, job: Job) -> EventLog:
        """What happened to a job, as far as this server knows; of one that has ended at least the end."""
        log = self.logs.open(job.id)
        if job.state is JobState.COMPLETED:
            log.add(_completed(job))
        elif job.state is JobState.FAILED:
            log.add(Failed(error=failure(job)))
        elif job.state is JobState.CANCELLED:
            log.add(Cancelled())
        return log

    async def _ending(self, job_id: str, what: Callable[[str], T]) -> T:
        """``call`` for what ends a job."""
        try:
            return await self.call(what, job_id)
        except (SQLAlchemyError, ApiError):  # it may have ended, and nobody may ask again
            self._thread.spawn(self._stop_ended(job_id))
            raise

    async def _stop_ended(self, job_id: str) -> None:
        job = await self._thread.insist(lambda: self._thread.do(self.store.get, job_id))
        if job is None:
            self.logs.open(job_id).add(Cancelled())
        if job is None or self.log_of(job).ended:
            self._runner.stop(job_id)

    def _remove(self, job_id: str) -> None:
        # In this order: a file without a row would stay for good.
        output_path(self.folder, job_id).unlink(missing_ok=True)
        self.store.delete(job_id)

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """The engine is up: begin with the queue."""
        self._thread.spawn(self._thread.repeat(self._runner.dispatch))
        self._thread.spawn(self._thread.repeat(self._sweep))
        self._thread.spawn(self._thread.repeat(self._look))

    async def close(self) -> None:
        """Stop; the jobs that run stay in progress in the store, and the next server queues them again."""
        if not self._thread.closed and await self._thread.close(self.store.close):
            os.close(self._lock)

    async def _look(self) -> None:
        await asyncio.sleep(_LOOK_SECONDS)
        await self._thread.look(self.store.probe)

    # ------------------------------------------------------------ retention

    async def _sweep(self) -> None:
        await self.sweep()
        await asyncio.sleep(_SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Remove what ``--job-retention`` and ``--max-output-bytes`` no longer keep."""
        args = self.engine.args
        await self._thread.do(self.store.mend)
        if leap := self._clock.leap():
            logger.warning("the clock was set ahead by %.0f s: for a day no video counts as too old", leap)
        note_seen(self.folder)
        lifetime = math.inf if self._clock.suspect else args.job_retention
        due = await self._thread.do(self.store.expired, lifetime=lifetime, max_bytes=args.max_output_bytes)
        for job_id in due:
            try:
                await self._thread.do(self._remove, job_id)
            except OSError as error:  # of one file; the others go all the same
                logger.error("--output-dir: %s cannot be removed: %s", job_id, error.strerror)


def _completed(job: Job) -> Completed:
    params = msgspec.convert(job.params, SamplingParams)
    return Completed(
        url=content_path(job),
        media_type="video/mp4",
        width=params.width or 0,
        height=params.height or 0,
        seed=params.seed or 0,
        timings=None,
    )


def fingerprint(params: SamplingParams) -> str:
    """Equal for requests that ask for the same."""
    return hashlib.sha256(msgspec.json.encode(params, order="sorted")).hexdigest()
