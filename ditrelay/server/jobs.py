"""Runs the stored jobs on the engine: some at a time, in order, each to one end; a restart takes up what was left."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from ditrelay.errors import ConfigError, DitrelayError, EngineClosed, QueueFull
from ditrelay.runtime.request import RequestState, SamplingParams
from ditrelay.server.job_store import Job, JobStore

if TYPE_CHECKING:
    from ditrelay.engine import AsyncEngine, AsyncTicket, Progress, Result

T = TypeVar("T")

logger = logging.getLogger(__name__)

_SUFFIX = ".mp4"
_PART = ".part"  # an output that is still written
_SWEEP_SECONDS = 60.0
_RETRY_SECONDS = 5.0
_ENCODED, _DENOISED = 5, 90  # percent done after these stages


@dataclass
class Live:
    """A job on the engine.

    Attributes:
        stage: what is done for it now.
        step, total_steps: of the denoise.
        first_step: when the denoise had done its first step, monotonic seconds; later steps measure its pace.
    """

    ticket: AsyncTicket | None = None
    stage: RequestState = RequestState.QUEUED
    step: int = 0
    total_steps: int = 0
    first_step: float | None = None
    last_step: float = 0.0

    def observe(self, progress: Progress) -> None:
        self.stage = progress.state
        if progress.state is not RequestState.DENOISING:
            self.step, self.first_step = 0, None  # done, or to be done again
        elif progress.step:
            self.step, self.total_steps, self.last_step = progress.step, progress.total_steps, progress.at
            self.first_step = self.last_step if self.first_step is None else self.first_step

    @property
    def percent(self) -> int:
        if self.stage in (RequestState.QUEUED, RequestState.ENCODING):
            return 0
        if self.stage is RequestState.DENOISING and self.total_steps:
            return _ENCODED + (_DENOISED - _ENCODED) * self.step // self.total_steps
        return _DENOISED if self.stage in _AFTER_DENOISE else _ENCODED

    def seconds_left(self) -> float | None:
        """Of the denoise, by the pace of its steps; ``None`` before that is known."""
        if self.first_step is None or self.step < 2:
            return None
        return (self.last_step - self.first_step) / (self.step - 1) * (self.total_steps - self.step)


_AFTER_DENOISE = (
    RequestState.DENOISED,
    RequestState.TO_DECODER,
    RequestState.AT_DECODER,
    RequestState.DECODING,
    RequestState.DONE,
)


@dataclass
class Jobs:
    """The jobs of one server. For the event loop's thread; whatever blocks runs on a thread of its own.

    Attributes:
        live: jobs on the engine, by id.
    """

    engine: AsyncEngine
    store: JobStore
    folder: Path
    live: dict[str, Live] = field(default_factory=dict)
    _lock: int = -1
    _closed: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "ditrelay-jobs"))

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
        lock = _lock_folder(folder)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, lock)
            jobs = cls(engine, JobStore(args.job_store or _sqlite_url(folder)), folder, _lock=lock)
            _recover(jobs.store, folder)
            undo.pop_all()
        return jobs

    # ------------------------------------------------------------ what routes call

    async def call(self, what: Callable[..., T], *values: Any, **named: Any) -> T:
        """``what`` on the thread of the database; calls are done one after the other.

        Raises:
            EngineClosed: the server ends.
        """
        if self._closed:
            raise EngineClosed("the server is shutting down")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: what(*values, **named))

    async def add(self, params: SamplingParams, *, key: str | None, fingerprint: str) -> Job | None:
        """Queue a job of resolved parameters. Returns what ``JobStore.add`` does."""
        document = msgspec.to_builtins(params)  # the picture as base64
        job = Job(
            id=f"video_{secrets.token_hex(16)}",
            model=self.engine.args.model_name,
            params=document,
            created=time.time(),
            idempotency_key=key,
            fingerprint=fingerprint,
        )
        kept = await self.call(self.store.add, job, limit=self.engine.args.max_jobs)
        self._news.set()
        return kept

    async def cancel(self, job_id: str) -> bool:
        """Whether this call ended the job."""
        ended = await self.call(self.store.cancel, job_id)
        self._stop(job_id)
        return ended

    async def delete(self, job: Job) -> None:
        """Remove the job and its file; one that runs is cancelled."""
        await self.call(self._remove, job.id)
        self._stop(job.id)

    def path(self, job: Job) -> Path:
        return self.folder / job.file_name

    def _stop(self, job_id: str) -> None:
        live = self.live.get(job_id)
        if live is not None and live.ticket is not None:
            live.ticket.cancel()

    def _remove(self, job_id: str) -> None:
        self.store.delete(job_id)
        (self.folder / (job_id + _SUFFIX)).unlink(missing_ok=True)

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """The engine is up: begin with the queue."""
        self._spawn(self._repeat(self._dispatch))
        self._spawn(self._repeat(self._sweep))

    async def close(self) -> None:
        """Stop; the jobs that run stay in progress in the store, and the next server queues them again."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)
        self.store.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

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

    async def _dispatch(self) -> None:
        """Puts as many jobs on the engine as its ranks and windows have room for; the rest waits in the store, where
        ``--request-timeout`` does not count it. Returns when that may have changed."""
        args = self.engine.args
        room = args.num_gpus * (args.max_pending_transfers + 2) - len(self.live)
        self._news.clear()
        if room > 0 and not self.engine.status().lost_roles:
            for job in await self.call(self.store.queued, args.model_name, room):
                if await self.call(self.store.start, job.id):
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
        finally:
            if live.ticket is not None:
                live.ticket.cancel()
            del self.live[job.id]

    async def _fail(self, job: Job, reason: str) -> None:
        """It has no effect where the job was cancelled."""
        if not self._closed:  # what the end of the server cut short is not over
            await self._insist(lambda: self.call(self.store.fail, job.id, reason))

    async def _finish(self, job: Job, result: Result) -> None:
        path = self.folder / (job.id + _SUFFIX)
        await self.call(_write, self.folder / (job.id + _PART), path, result.media)
        if not await self._insist(lambda: self.call(self.store.complete, job.id, path.name, len(result.media))):
            await self.call(path.unlink, missing_ok=True)  # cancelled or deleted in the meantime

    async def _draw(self, job: Job, live: Live) -> Result:
        params = msgspec.convert(job.params, SamplingParams)
        while live.ticket is None:
            try:
                live.ticket = await self.engine.submit(params)
            except QueueFull:
                await asyncio.sleep(_RETRY_SECONDS)
        now = await self._insist(lambda: self.call(self.store.get, job.id))
        if now is None or now.state.ended:  # cancelled before there was a ticket to cancel
            live.ticket.cancel()
        async for progress in live.ticket.events():
            live.observe(progress)
        return await live.ticket.result()

    # ------------------------------------------------------------ retention

    async def _sweep(self) -> None:
        await self.sweep()
        await asyncio.sleep(_SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Remove what ``--job-retention`` and ``--max-output-bytes`` no longer keep."""
        args = self.engine.args
        due = await self.call(self.store.expired, lifetime=args.job_retention, max_bytes=args.max_output_bytes)
        for job_id in due:
            await self.call(self._remove, job_id)


def fingerprint(params: SamplingParams) -> str:
    """Equal for requests that ask for the same."""
    return hashlib.sha256(msgspec.json.encode(params, order="sorted")).hexdigest()


def _recover(store: JobStore, folder: Path) -> None:
    """Take up what the last server has left."""
    for part in folder.glob(f"*{_PART}"):
        part.unlink(missing_ok=True)
    for job in store.interrupted():
        path = folder / (job.id + _SUFFIX)
        if path.exists():  # written whole; only the row was not
            store.complete(job.id, path.name, path.stat().st_size)
        else:
            store.requeue(job.id)
            logger.info("%s was interrupted and is queued again", job.id)


def _lock_folder(folder: Path) -> int:
    """A lock that lasts as long as its descriptor is open. Raises ``ConfigError`` where another process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError("--output-dir", f"{folder} cannot be written to: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError("--output-dir", f"{folder} is in use by another server; give each its own") from None
    return lock


def _sqlite_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'jobs.sqlite'}"


def _write(part: Path, path: Path, content: bytes) -> None:
    """Under its own name there is the whole file or none, also after a power cut."""
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
