"""Runs the stored jobs on the engine: some at a time, in order, each to one end; a restart takes up what was left."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from ditrelay.errors import DitrelayError, EngineClosed, QueueFull
from ditrelay.runtime.request import RequestState, SamplingParams
from ditrelay.runtime.telemetry import Carrier, called_by, caller
from ditrelay.server.events import EventLog, EventLogs
from ditrelay.server.image_jobs import completed, error_of, event_of
from ditrelay.server.job_schemas import Cancelled, Completed, Failed, Queued
from ditrelay.server.job_store import Job, JobState, JobStore
from ditrelay.server.live import JobNames, Live
from ditrelay.server.one_thread import OneThread
from ditrelay.server.output_folder import lock_folder, output_path, recover, sqlite_url, write
from ditrelay.server.problem import SERVER, ApiError, store_down
from ditrelay.server.schemas import Error

if TYPE_CHECKING:
    from ditrelay.async_engine import AsyncEngine
    from ditrelay.engine import Result

T = TypeVar("T")

logger = logging.getLogger(__name__)

_SWEEP_SECONDS = 60.0
_RETRY_SECONDS = 5.0
_CALL_SECONDS = 30.0  # longer than a database that is busy takes, and a large file on a slow disk
_CLOSE_SECONDS = 10.0


@dataclass
class Jobs:
    """The jobs of one server. For the event loop's thread; whatever blocks runs on a thread of its own.

    Attributes:
        live: jobs on the engine, by id.
        names: which job an engine's request is for.
        logs: what happens to jobs, for those who follow them.
    """

    engine: AsyncEngine
    store: JobStore
    folder: Path
    _lock: int
    live: dict[str, Live] = field(default_factory=dict)
    names: JobNames = field(default_factory=JobNames)
    logs: EventLogs = field(default_factory=EventLogs)
    _callers: dict[str, Carrier] = field(default_factory=dict)  # of queued jobs; a restart forgets them
    _closed: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _thread: OneThread = field(default_factory=lambda: OneThread("ditrelay-jobs"))

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

    async def call(self, what: Callable[..., T], *values: Any, **named: Any) -> T:
        """``what`` on the thread of the database; calls are done one after the other.

        Raises:
            EngineClosed: the server ends.
            ApiError: 503; it is not done within ``_CALL_SECONDS``, and may yet be.
        """
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                return await self._do(what, *values, **named)
        except TimeoutError:
            logger.error("--job-store: no answer within %g s", _CALL_SECONDS)
            raise store_down() from None

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
            self._news.set()
        if kept is not None and kept.id == job.id and (trace := caller()):
            self._callers[job.id] = trace
        return kept

    async def cancel(self, job_id: str) -> bool:
        """Whether this call ended the job."""
        ended = await self._ending(job_id, self.store.cancel)
        if ended:
            self.logs.open(job_id).add(Cancelled())
        self._stop(job_id)
        return ended

    async def delete(self, job: Job) -> None:
        """Remove the job and its file; one that runs is cancelled."""
        await self._ending(job.id, self._remove)
        self.logs.open(job.id).add(Cancelled())
        self._stop(job.id)

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
            self._spawn(self._stop_ended(job_id))
            raise

    async def _stop_ended(self, job_id: str) -> None:
        job = await self._insist(lambda: self._do(self.store.get, job_id))
        if job is None:
            self.logs.open(job_id).add(Cancelled())
        if job is None or self.log_of(job).ended:
            self._stop(job_id)

    def _stop(self, job_id: str) -> None:
        self._callers.pop(job_id, None)
        live = self.live.get(job_id)
        if live is not None and live.ticket is not None:
            live.ticket.cancel()

    def _remove(self, job_id: str) -> None:
        # In this order: a file without a row would stay for good.
        output_path(self.folder, job_id).unlink(missing_ok=True)
        self.store.delete(job_id)

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """The engine is up: begin with the queue."""
        self._spawn(self._repeat(self._dispatch))
        self._spawn(self._repeat(self._sweep))

    async def close(self) -> None:
        """Stop; the jobs that run stay in progress in the store, and the next server queues them again."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._thread.call(self.store.close)
        except TimeoutError:
            logger.error("--job-store: no answer within %g s; ending without it", _CLOSE_SECONDS)
            return
        self._thread.stop()
        os.close(self._lock)

    async def _do(self, what: Callable[..., T], *values: Any, **named: Any) -> T:
        """As ``call``, for as long as it takes: whoever changes a job's state must know whether it was changed."""
        if self._closed:
            raise EngineClosed("the server is shutting down")
        return await self._thread.call(lambda: what(*values, **named))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._news.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a job's task failed: %s", error, exc_info=error)

    async def _repeat(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            await self._insist(work)

    async def _insist(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What ``work`` returns, once the database answers."""
        while True:
            try:
                return await work()
            except SQLAlchemyError as error:
                logger.error("--job-store: %s; trying again in %g s", str(error).splitlines()[0], _RETRY_SECONDS)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _moved(self, state: JobState, move: Callable[..., bool], job_id: str, *values: Any) -> bool:
        """Whether ``move`` has brought the job to ``state``, which only this server's own tasks do: also where the
        answer was lost, so that it finds itself done when it is tried again."""

        async def tried() -> bool:
            if await self._do(move, job_id, *values):
                return True
            job = await self._do(self.store.get, job_id)
            return job is not None and job.state is state

        return await self._insist(tried)

    async def _dispatch(self) -> None:
        """Puts as many jobs on the engine as its ranks and windows have room for; the rest waits in the store, where
        ``--request-timeout`` does not count it. Returns when that may have changed."""
        args = self.engine.args
        room = args.num_gpus * (args.max_pending_transfers + 2) - len(self.live)
        self._news.clear()
        if room > 0 and not self.engine.status().lost_roles:
            for job in await self._do(self.store.queued, args.model_names, room):
                if await self._moved(JobState.IN_PROGRESS, self.store.start, job.id):
                    self.live[job.id] = Live()
                    self._spawn(self._run(job))
        with contextlib.suppress(TimeoutError):  # another look now and then: ranks come back without a word
            await asyncio.wait_for(self._news.wait(), _SWEEP_SECONDS)

    async def _run(self, job: Job) -> None:
        """One job from the queue to its end."""
        live = self.live[job.id]
        try:
            await self._finish(job, await self._draw(job, live))
        except (DitrelayError, msgspec.ValidationError) as error:
            await self._fail(job, str(error))
        except OSError as error:
            await self._fail(job, f"the video could not be written to --output-dir: {error.strerror}")
        except Exception as error:  # a fault of ours; the job must not stay in progress for good
            logger.exception("%s failed: %s", job.id, error)
            await self._fail(job, error_of(error).message)
        finally:
            if live.ticket is not None:
                live.ticket.cancel()
            del self.live[job.id]

    async def _fail(self, job: Job, reason: str) -> None:
        """It has no effect where the job was cancelled."""
        if not self._closed:  # what the end of the server cut short is not over
            if await self._moved(JobState.FAILED, self.store.fail, job.id, reason):
                self.logs.open(job.id).add(Failed(error=failure(replace(job, error=reason))))

    async def _finish(self, job: Job, result: Result) -> None:
        path = await self._do(write, self.folder, job.id, result.media)
        if await self._moved(JobState.COMPLETED, self.store.complete, job.id, path.name, len(result.media)):
            self.logs.open(job.id).add(completed(content_path(job), result))
        else:
            await self._do(path.unlink, missing_ok=True)  # cancelled or deleted in the meantime

    async def _draw(self, job: Job, live: Live) -> Result:
        params, trace = await self._params(job), self._callers.pop(job.id, None)
        while live.ticket is None:
            try:
                with called_by(trace):
                    live.ticket = await self.engine.submit(params)
            except QueueFull:
                await asyncio.sleep(_RETRY_SECONDS)
        self.names.note(live.ticket.request_id, job.id)
        now = await self._insist(lambda: self._do(self.store.get, job.id))
        if now is None or now.state.ended:  # cancelled before there was a ticket to cancel
            live.ticket.cancel()
        async for progress in live.ticket.events():
            live.observe(progress)
            # Its place in the queue is told by the board, which knows it.
            if (event := event_of(progress, live, None)) and not isinstance(event, Queued):
                self.logs.open(job.id).add(event)
        return await live.ticket.result()

    async def _params(self, job: Job) -> SamplingParams:
        params = msgspec.convert(job.params, SamplingParams)
        picture = await self._insist(lambda: self._do(self.store.picture, job.id))
        return params if picture is None else msgspec.structs.replace(params, image=picture)

    # ------------------------------------------------------------ retention

    async def _sweep(self) -> None:
        await self.sweep()
        await asyncio.sleep(_SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Remove what ``--job-retention`` and ``--max-output-bytes`` no longer keep."""
        args = self.engine.args
        due = await self._do(self.store.expired, lifetime=args.job_retention, max_bytes=args.max_output_bytes)
        for job_id in due:
            try:
                await self._do(self._remove, job_id)
            except OSError as error:  # of one file; the others go all the same
                logger.error("--output-dir: %s cannot be removed: %s", job_id, error.strerror)


def content_path(job: Job) -> str:
    """Where the file is to be had."""
    return f"/v1/videos/{job.id}/content"


def failure(job: Job) -> Error:
    """Why a job failed."""
    return Error(message=job.error or "no reason given", type=SERVER, param=None, code="request_failed")


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
