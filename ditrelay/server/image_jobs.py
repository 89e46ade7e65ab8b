"""Pictures as jobs: each can be watched and cancelled. They live in memory and end with the server."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ditrelay.errors import DitrelayError, InvalidRequest, RequestCancelled
from ditrelay.runtime.request import RequestState
from ditrelay.server.events import EventLog
from ditrelay.server.files import FileStore, Shares
from ditrelay.server.job_schemas import (
    Cancelled,
    Completed,
    Decoding,
    Denoising,
    Encoding,
    Failed,
    JobEvent,
    JobInfo,
    JobStatus,
    Preview,
    Queued,
)
from ditrelay.server.live import JobNames, Live
from ditrelay.server.problem import INVALID, SERVER
from ditrelay.server.schemas import Error

if TYPE_CHECKING:
    from ditrelay.async_engine import AsyncTicket
    from ditrelay.engine import Progress, Result

logger = logging.getLogger(__name__)


@dataclass
class ImageJob:
    """One picture, from its submission on.

    Attributes:
        files: where its file is put.
        file_id: under which id; empty before it is finished.
        client: whose it is.
        created: Unix time in seconds.
    """

    id: str
    ticket: AsyncTicket
    files: FileStore
    log: EventLog
    live: Live
    file_id: str = ""
    client: str = ""
    created: float = field(default_factory=time.time)
    work: asyncio.Task[Result] = field(init=False)

    async def result(self) -> Result:
        """Wait for the end; raises what ``AsyncTicket.result`` does. Cancelling the wait does not cancel the job."""
        return await asyncio.shield(self.work)

    def info(self, position: int | None) -> JobInfo:
        last, params = self.log.last, self.ticket.params
        steps = self.live.total_steps or params.num_inference_steps or 0
        return JobInfo(
            id=self.id,
            kind="image",
            status=_status(last, self.live.stage),
            stage=None if self.log.ended else str(self.live.stage),
            step=steps if isinstance(last, Completed) else self.live.step,
            total_steps=steps,
            position=position,
            eta_seconds=None if self.log.ended else self.live.seconds_left(),
            prompt=params.prompt,
            created_at=int(self.created),
            url=last.url if isinstance(last, Completed) else None,
            error=last.error if isinstance(last, Failed) else None,
        )


@dataclass(frozen=True)
class EndedImage:
    """What is still known of a picture that has ended: not its request, nor its file, which are megabytes.

    Attributes:
        created: Unix time in seconds.
    """

    id: str
    created: float
    log: EventLog
    told: JobInfo
    client: str

    def info(self, position: int | None) -> JobInfo:
        return self.told


def _status(last: JobEvent | None, stage: RequestState) -> JobStatus:
    match last:
        case Completed():
            return "completed"
        case Failed():
            return "failed"
        case Cancelled():
            return "cancelled"
        case _:
            return "queued" if stage is RequestState.QUEUED else "in_progress"


class ImageJobs:
    """The pictures that are drawn now, and those that ended of late. Belongs to the event loop's thread.

    Attributes:
        names: which picture an engine's request is for.

    Args:
        lifetime: seconds that an ended one is known.
        limit: ended ones known at most; where there are more, the oldest of the client that has the most goes.
        clock: seconds that only grow.
    """

    def __init__(
        self, *, lifetime: float = 600.0, limit: int = 500, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifetime = lifetime
        self._limit = limit
        self._clock = clock
        self.names = JobNames()
        self._live: dict[str, ImageJob] = {}  # in the order of submission
        self._ended: dict[str, EndedImage] = {}  # in the order in which they ended
        self._shares = Shares()

    def follow(self, ticket: AsyncTicket, files: FileStore, client: str = "") -> ImageJob:
        """Make a job of a submitted picture of ``client``, whose file is put into ``files``."""
        job_id = f"image_{secrets.token_hex(16)}"
        job = ImageJob(job_id, ticket, files, EventLog(self._clock), Live(ticket), client=client)
        self._live[job.id] = job
        self.names.note(ticket.request_id, job.id)
        job.work = asyncio.create_task(self._work(job))
        job.work.add_done_callback(lambda work: self._end(job, work))
        return job

    def live(self, job_id: str) -> ImageJob | None:
        """The job with that id, where it has not ended."""
        return self._live.get(job_id)

    def get(self, job_id: str) -> ImageJob | EndedImage | None:
        self._drop_old()
        return self._live.get(job_id) or self._ended.get(job_id)

    def newest(self, limit: int) -> list[ImageJob | EndedImage]:
        self._drop_old()
        jobs: list[ImageJob | EndedImage] = [*self._live.values(), *self._ended.values()]
        return sorted(jobs, key=lambda job: job.created, reverse=True)[:limit]

    def queue(self) -> list[ImageJob]:
        """Those that wait for an encoder, the next one first."""
        return [job for job in self._live.values() if job.live.stage is RequestState.QUEUED]

    # ------------------------------------------------------------ inside

    async def _work(self, job: ImageJob) -> Result:
        async for progress in job.ticket.events():
            job.live.observe(progress)
            if event := event_of(progress, job.live, self._place(job)):
                job.log.add(event)
        result = await job.ticket.result()
        job.file_id = job.files.add(result.media, result.media_type, job.client)
        job.log.add(completed(f"/v1/images/{job.file_id}/content", result))
        return result

    def _place(self, job: ImageJob) -> int | None:
        return len(self.queue()) if job.live.stage is RequestState.QUEUED else None

    def _end(self, job: ImageJob, work: asyncio.Task[Result]) -> None:
        error = RequestCancelled(job.ticket.request_id) if work.cancelled() else work.exception()
        if isinstance(error, RequestCancelled):
            job.log.add(Cancelled())
        elif error is not None:
            job.log.add(Failed(error=error_of(error)))
            if not isinstance(error, DitrelayError):
                logger.error("%s failed: %s", job.id, error, exc_info=error)
        del self._live[job.id]
        self._ended[job.id] = EndedImage(job.id, job.created, job.log, job.info(None), job.client)
        self._shares.add(job.id, job.client)
        self._drop_old()

    def _drop_old(self) -> None:
        oldest = self._clock() - self._lifetime
        while self._ended:
            job = next(iter(self._ended.values()))
            if job.log.ended_at is not None and job.log.ended_at > oldest:
                break
            self._forget(job.id)
        while len(self._ended) > max(self._limit, 1):
            self._forget(self._shares.oldest_of_most_things())

    def _forget(self, job_id: str) -> None:
        del self._ended[job_id]
        self._shares.remove(job_id)


def event_of(progress: Progress, live: Live, position: int | None) -> JobEvent | None:
    """What a job's readers are told of ``progress``; ``None``: nothing, it is a place between two stages or an end.

    Args:
        live: has observed ``progress``.
        position: the job's place in the queue, where it is queued.
    """
    if progress.preview is not None:
        return Preview(step=progress.step, b64_jpeg=base64.b64encode(progress.preview).decode("ascii"))
    match progress.state:
        case RequestState.QUEUED:
            return Queued(position=position)
        case RequestState.ENCODING:
            return Encoding()
        case RequestState.DENOISING:
            total = progress.total_steps or (live.ticket.params.num_inference_steps if live.ticket else None) or 0
            return Denoising(step=progress.step, total_steps=total, eta_seconds=live.seconds_left())
        case RequestState.DECODING:
            return Decoding()
        case _:
            return None


def completed(url: str, result: Result) -> Completed:
    """The last event of a job whose file is at ``url``."""
    return Completed(
        url=url,
        media_type=result.media_type,
        width=result.width,
        height=result.height,
        seed=result.seed,
        timings=result.timings,
    )


def error_of(error: BaseException) -> Error:
    """Why a job failed, as a client may see it."""
    if isinstance(error, InvalidRequest):
        return Error(message=str(error), type=INVALID, param=error.param, code="invalid_value")
    known = isinstance(error, DitrelayError)
    message = str(error) if known else "internal error; the server's log has the cause"
    return Error(message=message, type=SERVER, param=None, code="request_failed" if known else "internal_error")
