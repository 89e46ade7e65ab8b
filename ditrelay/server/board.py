"""Every job of the server, whether it makes a picture or a video."""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy.exc import SQLAlchemyError

from ditrelay.server.events import EventLog
from ditrelay.server.image_jobs import ImageJobs
from ditrelay.server.job_rows import Job, JobState
from ditrelay.server.job_runner import content_path, failure
from ditrelay.server.job_schemas import JobInfo, Queued
from ditrelay.server.jobs import Jobs
from ditrelay.server.live import Live
from ditrelay.server.problem import ApiError

logger = logging.getLogger(__name__)

_POSITION_SECONDS = 1.0
_CANCEL_SECONDS = 2.0
_ID_CHARACTERS = 64


@dataclass
class Board:
    """The jobs of one server. Belongs to the event loop's thread.

    Attributes:
        images: pictures, in memory.
        videos: durable; ``None`` for models that make pictures, and before the store is open.
    """

    images: ImageJobs = field(default_factory=ImageJobs)
    videos: Jobs | None = None

    async def find(self, job_id: str) -> JobInfo | None:
        """The job with that id, or ``None`` where there is none (any more)."""
        if job := self.images.get(job_id):
            return job.info((await self._places()).get(job_id))
        video = await self._video(job_id)
        if video is None or self.videos is None:
            return None
        return self._info(video, await self.videos.place(video))

    async def newest(self, limit: int) -> list[JobInfo]:
        """Up to ``limit`` jobs, the newest first."""
        places = await self._places()
        pictures = [job.info(places.get(job.id)) for job in self.images.newest(limit)]
        rows = [] if self.videos is None else await self.videos.call(self.videos.store.page, limit=limit)
        videos = [self._info(job, places.get(job.id)) for job in rows]
        both = heapq.merge(pictures, videos, key=lambda job: job.created_at, reverse=True)
        return list(both)[:limit]

    async def cancel(self, job_id: str) -> None:
        """End a job; without effect where it has ended, or there is none."""
        if job := self.images.live(job_id):
            job.ticket.cancel()
            await asyncio.wait((job.work,), timeout=_CANCEL_SECONDS)  # between two steps, so that is soon
        elif self.videos is not None:
            await self.videos.cancel(job_id)

    async def log(self, job_id: str) -> EventLog | None:
        """What happened to a job and happens to it, or ``None`` where there is none with that id."""
        if job := self.images.get(job_id):
            return job.log
        video = await self._video(job_id)
        if video is None or self.videos is None:
            return None
        log = self.videos.log_of(video)
        if not log.ended:
            _tell_places([(job_id, log)], await self._places())
        return log

    def job_of(self, request_id: str) -> str | None:
        """The job that the engine's request is for."""
        found = self.images.names.job_of(request_id)
        return self.videos.names.job_of(request_id) if found is None and self.videos else found

    async def watch_places(self) -> None:
        """Tell those who follow jobs that wait when their place changes; without an end."""
        while True:
            await asyncio.sleep(_POSITION_SECONDS)
            try:
                await self._tell_waiting()
            except (SQLAlchemyError, ApiError) as error:
                logger.error("--job-store: %s; places in the queue are not known", str(error).splitlines()[0])

    # ------------------------------------------------------------ inside

    async def _tell_waiting(self) -> None:
        followed = [(job.id, job.log) for job in self.images.queue() if job.log.readers]
        followed += self.videos.logs.followed() if self.videos else []
        waiting = [(job_id, log) for job_id, log in followed if not log.ended]
        if waiting:
            _tell_places(waiting, await self._places())

    async def _places(self) -> dict[str, int]:
        """The place in the queue of each job that waits; 1 is next."""
        waiting = [job.id for job in self.images.queue()]
        waiting += [] if self.videos is None else await self.videos.queue()
        return {job_id: place for place, job_id in enumerate(waiting, 1)}

    async def _video(self, job_id: str) -> Job | None:
        if self.videos is None or len(job_id) > _ID_CHARACTERS:
            return None
        return await self.videos.call(self.videos.store.get, job_id)

    def _info(self, job: Job, place: int | None) -> JobInfo:
        running = job.state is JobState.IN_PROGRESS
        live = (self.videos.live.get(job.id) if self.videos and running else None) or Live()
        steps = live.total_steps or job.params.get("num_inference_steps") or 0
        return JobInfo(
            id=job.id,
            kind="video",
            status=job.state.value,
            stage="queued" if job.state is JobState.QUEUED else str(live.stage) if running else None,
            step=steps if job.state is JobState.COMPLETED else live.step,
            total_steps=steps,
            position=place,
            eta_seconds=live.seconds_left(),
            prompt=job.params["prompt"],
            created_at=int(job.created),
            url=content_path(job) if job.state is JobState.COMPLETED else None,
            error=failure(job) if job.state is JobState.FAILED else None,
        )


def _tell_places(logs: Iterable[tuple[str, EventLog]], places: dict[str, int]) -> None:
    for job_id, log in logs:
        event = Queued(position=places.get(job_id))
        if event.position is not None and log.last != event:
            log.add(event)
