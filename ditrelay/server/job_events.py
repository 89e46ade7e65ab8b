"""``/v1/jobs``: how far every picture and video is, and what happens to it as server-sent events."""

from __future__ import annotations

from typing import Annotated, TypeVar

from fastapi import Header, Query, Request, Response

from ditrelay.server.context import Context, ContextDep
from ditrelay.server.events import EventLog
from ditrelay.server.job_schemas import Completed, JobInfo, JobList
from ditrelay.server.problem import RESPONSES, ApiError, not_ready
from ditrelay.server.router import Router
from ditrelay.server.streaming import Emit, EventStream

router = Router(prefix="/v1", tags=["jobs"], responses=RESPONSES)

Told = TypeVar("Told", JobInfo, Completed)

_EVENTS = """The events, by name:

- `queued` {position}: it waits; again when its place changes
- `encoding` {}
- `denoising` {step, total_steps, eta_seconds}: step 0 when it begins, then after every step
- `preview` {step, b64_jpeg}: what it looked like after a step; only where previews were asked for
- `decoding` {}
- at last `completed` {url, media_type, width, height, seed, timings}, `failed` {error} or `cancelled` {}
"""


@router.get("/jobs")
async def list_jobs(
    request: Request, context: ContextDep, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> JobList:
    """The jobs that wait and run, and those that ended of late, newest first: pictures for some minutes, videos as long
    as they are kept."""
    jobs = await context.board.newest(limit)
    return JobList(data=[_addressed(job, request) for job in jobs])


@router.get("/jobs/{job_id}")
async def get_job(job_id: str, request: Request, context: ContextDep) -> JobInfo:
    """How far a job is."""
    return _addressed(await _find(job_id, context), request)


@router.post("/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, request: Request, context: ContextDep) -> JobInfo:
    """End a job that is queued or in progress; one that is cancelled stays as it is."""
    await _find(job_id, context)
    await context.board.cancel(job_id)
    job = await _find(job_id, context)
    if job.status in ("completed", "failed"):
        raise ApiError(400, f"job_id: it has ended ({job.status})", param="job_id", code="job_ended")
    return _addressed(job, request)


@router.get(
    "/jobs/{job_id}/events",
    response_class=Response,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": _EVENTS},
        204: {"description": "The event named is the last one: there will be no other."},
    },
)
async def follow_job(
    job_id: str,
    request: Request,
    context: ContextDep,
    last_event_id: Annotated[str | None, Header()] = None,
    after: Annotated[str | None, Query(alias="last_event_id", description="In place of the header.")] = None,
) -> Response:
    """What happened to a job, and what happens to it, up to its end, as server-sent events.

    With `Last-Event-ID` they go on exactly behind that event; an id that is not known (any more) counts as none.
    """
    _check_open(context)
    log = await context.board.log(job_id)
    if log is None:
        raise _not_found()
    number = log.number_of(last_event_id or after)
    if number and log.is_over_after(number):
        return Response(status_code=204)  # tells an EventSource not to come back
    return EventStream(lambda emit: _tell(log, number, request, emit), until=context.closed, eager=True)


async def _tell(log: EventLog, after: int, request: Request, emit: Emit) -> None:
    async for event in log.read(after):
        data = _addressed(event.data, request) if isinstance(event.data, Completed) else event.data
        await emit(event.name, data, log.id_of(event))


def _addressed(told: Told, request: Request) -> Told:
    """With the file's address as this client reaches the server."""
    return told.model_copy(update={"url": str(request.base_url).rstrip("/") + told.url}) if told.url else told


async def _find(job_id: str, context: Context) -> JobInfo:
    _check_open(context)
    job = await context.board.find(job_id)
    if job is None:
        raise _not_found()
    return job


def _check_open(context: Context) -> None:
    if context.engine.card.media == "video" and context.board.videos is None:
        raise not_ready("the job store is not open yet")


def _not_found() -> ApiError:
    return ApiError(404, "job_id: there is no such job (any more)", param="job_id", code="job_not_found")
