"""Takes the stored jobs to the engine: some at a time, in order, each to one end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ditrelay.errors import DitrelayError, EngineClosed, QueueFull
from ditrelay.runtime.request import SamplingParams
from ditrelay.runtime.telemetry import Carrier, called_by
from ditrelay.server.events import EventLogs
from ditrelay.server.image_jobs import completed, error_of, event_of
from ditrelay.server.job_rows import Job, JobState
from ditrelay.server.job_schemas import Failed, Queued
from ditrelay.server.job_store import JobStore
from ditrelay.server.job_thread import JobThread
from ditrelay.server.live import JobNames, Live
from ditrelay.server.output_folder import write
from ditrelay.server.problem import SERVER
from ditrelay.server.schemas import Error

if TYPE_CHECKING:
    from ditrelay.async_engine import AsyncEngine
    from ditrelay.engine import Result
    from ditrelay.runtime.status import EngineStatus

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 60.0
_LOOK_WHILE_DOWN_SECONDS = 1.0  # replicas come back without a word
_QUEUE_FULL_SECONDS = 1.0


@dataclass
class JobRunner:
    """The jobs on the engine. For the event loop's thread.

    Attributes:
        live: jobs on the engine, by id.
        names: which job an engine's request is for.
        logs: what happens to jobs, for those who follow them.
        callers: whose trace a queued job belongs to; a restart forgets them.
    """

    engine: AsyncEngine
    store: JobStore
    thread: JobThread
    folder: Path
    live: dict[str, Live] = field(default_factory=dict)
    names: JobNames = field(default_factory=JobNames)
    logs: EventLogs = field(default_factory=EventLogs)
    callers: dict[str, Carrier] = field(default_factory=dict)
    _engine_over: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """There may be something to begin with."""
        self._news.set()

    def stop(self, job_id: str) -> None:
        """The job has ended: the engine need not go on."""
        self.callers.pop(job_id, None)
        live = self.live.get(job_id)
        if live is not None and live.ticket is not None:
            live.ticket.cancel()

    async def dispatch(self) -> None:
        """Puts as many jobs on the engine as its replicas and windows have room for; the rest waits in the store, where
        it costs nothing. Returns when that may have changed."""
        args, status = self.engine.args, self.engine.status()
        self._news.clear()
        places = room(status, args.max_pending_transfers) - len(self.live)
        if places > 0 and not status.lost_roles and not self._engine_over:
            jobs = await self.thread.do(self.store.queued, args.model_names, places)
            for job in jobs:
                if not job.damage and await self._moved(JobState.IN_PROGRESS, self.store.start, job.id):
                    self.live[job.id] = Live()
                    self.thread.spawn(self._run(job))
            if any(job.damage for job in jobs):  # they take places in the queue, and nothing can be made of them
                await self.thread.do(self.store.mend)
                self._news.set()
        all_up = all(worker.state == "up" for worker in status.workers)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_SECONDS if all_up else _LOOK_WHILE_DOWN_SECONDS):
                await self._news.wait()

    # ------------------------------------------------------------ one job

    async def _run(self, job: Job) -> None:
        """One job from the queue to its end."""
        live = self.live[job.id]
        try:
            await self._finish(job, await self._draw(job, live))
        except EngineClosed as error:
            self._engine_over = True
            await self._put_back(job, str(error))
        except QueueFull as error:  # the engine had no place for it after all
            await self._put_back(job, str(error))
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
            self.wake()

    async def _put_back(self, job: Job, reason: str) -> None:
        """The engine's end is not the job's: the next server makes it. A job that was cancelled stays so."""
        if not self.thread.closed:  # else the next server finds it in progress, which is the same to it
            logger.warning("%s is queued again: %s", job.id, reason)
            await self._moved(JobState.QUEUED, self.store.requeue, job.id)

    async def _fail(self, job: Job, reason: str) -> None:
        """It has no effect where the job was cancelled."""
        if not self.thread.closed:  # what the end of the server cut short is not over
            if await self._moved(JobState.FAILED, self.store.fail, job.id, reason):
                self.logs.open(job.id).add(Failed(error=failure(replace(job, error=reason))))

    async def _finish(self, job: Job, result: Result) -> None:
        path = await self.thread.do(write, self.folder, job.id, result.media)
        if await self._moved(JobState.COMPLETED, self.store.complete, job.id, path.name, len(result.media)):
            self.logs.open(job.id).add(completed(content_path(job), result))
        else:
            await self.thread.do(path.unlink, missing_ok=True)  # cancelled or deleted in the meantime

    async def _draw(self, job: Job, live: Live) -> Result:
        params, trace = await self._params(job), self.callers.pop(job.id, None)
        while live.ticket is None:
            try:
                with called_by(trace):
                    live.ticket = await self.engine.submit(params, patient=True)
            except QueueFull:
                await asyncio.sleep(_QUEUE_FULL_SECONDS)
        self.names.note(live.ticket.request_id, job.id)
        now = await self.thread.insist(lambda: self.thread.do(self.store.get, job.id))
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
        picture = await self.thread.insist(lambda: self.thread.do(self.store.picture, job.id))
        return params if picture is None else msgspec.structs.replace(params, image=picture)

    async def _moved(self, state: JobState, move: Callable[..., bool], job_id: str, *values: Any) -> bool:
        """Whether ``move`` has brought the job to ``state``, which only this server's own tasks do: also where the
        answer was lost, so that it finds itself done when it is tried again."""

        async def tried() -> bool:
            if await self.thread.do(move, job_id, *values):
                return True
            job = await self.thread.do(self.store.get, job_id)
            return job is not None and job.state is state

        return await self.thread.insist(tried)


def room(status: EngineStatus, window: int) -> int:
    """How many jobs keep the engine busy: each replica one that is denoised, ``window`` that wait there, and one that
    is encoded for it. A replica counts once, however many its ranks are, and only while all of them are up."""
    whole: dict[int, bool] = {}
    for worker in status.workers:
        if worker.replica is not None:
            whole[worker.replica] = whole.get(worker.replica, True) and worker.state == "up"
    return sum(whole.values()) * (window + 2)


def content_path(job: Job) -> str:
    """Where the file is to be had."""
    return f"/v1/videos/{job.id}/content"


def failure(job: Job) -> Error:
    """Why a job failed."""
    return Error(message=job.error or "no reason given", type=SERVER, param=None, code="request_failed")
