"""``/v1/videos``: jobs that make a video, in OpenAI's form."""

from __future__ import annotations

import os
from typing import Annotated, BinaryIO, Literal

import msgspec
from fastapi import Depends, Header, Query, Request
from starlette.datastructures import Headers
from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from ditrelay.errors import InvalidRequest
from ditrelay.runtime.request import SamplingParams
from ditrelay.server.bodies import Body, picture_page_entry, read_body
from ditrelay.server.context import Context, ContextDep
from ditrelay.server.held_bytes import bytes_of, client_of
from ditrelay.server.job_rows import Job, JobState
from ditrelay.server.jobs import Jobs, fingerprint
from ditrelay.server.live import Live
from ditrelay.server.problem import RESPONSES, ApiError, not_ready, shorten
from ditrelay.server.router import Router
from ditrelay.server.streaming import while_connected
from ditrelay.server.uploads import picture_of
from ditrelay.server.video_schemas import DeletedVideo, Video, VideoError, VideoList, VideoRequest

router = Router(prefix="/v1", tags=["videos"], responses=RESPONSES)

_QUERY = ("after", "limit", "order")


async def _jobs(context: ContextDep) -> Jobs:
    """Raises ``ApiError``: the model makes no videos (400), or the server only begins (503)."""
    if context.engine.card.media != "video":
        reason = (
            f"{context.model_name!r} makes {context.engine.card.media}s; this address serves models that make videos,"
            " such as builtin:emoji-video"
        )
        raise ApiError(400, f"model: {reason}", param="model", code="unsupported_model")
    if context.jobs is None:
        raise not_ready("the job store is not open yet")
    return context.jobs


JobsDep = Annotated[Jobs, Depends(_jobs)]


@router.post("/videos", openapi_extra=picture_page_entry(VideoRequest, "input_reference", required=False))
async def create_video(
    request: Request,
    context: ContextDep,
    jobs: JobsDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Video:
    """Queue a video; its status tells when it is done. The same ``Idempotency-Key`` again returns the same video."""
    sent = await read_body(request, files=("input_reference",))
    body = sent.checked(VideoRequest, extra=context.engine.args.extra_fields)
    context.check_model(body.model)
    params = body.sampling_params(context.engine.card, await _picture(sent, body, request, context))
    mark = fingerprint(params)
    if idempotency_key is not None and (older := await jobs.call(jobs.store.find, idempotency_key)):
        return _repeated(older, mark, jobs, body.warnings)
    context.check_open()
    resolved = await while_connected(request, _resolved(body, params, context, client_of(request.scope)))
    job = await jobs.add(resolved, key=idempotency_key, fingerprint=mark)
    if job is None:
        raise _too_many(context)
    return _repeated(job, mark, jobs, body.warnings)


@router.get("/videos")
async def list_videos(
    request: Request,
    jobs: JobsDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="The id of the last video of the page before.")] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By the time of submission.")] = "desc",
) -> VideoList:
    """The videos, newest first, a page at a time."""
    for name in request.query_params:
        if name not in _QUERY:
            known = ", ".join(_QUERY)
            message = f"{shorten(name)}: unknown parameter; known: {known}"
            raise ApiError(400, message, param=shorten(name), code="unknown_parameter")
    last = None if after is None else await jobs.call(jobs.store.get, after)
    if after is not None and last is None:
        raise ApiError(
            400, f"after: there is no video {shorten(after)!r} (any more)", param="after", code="invalid_value"
        )
    found = await jobs.call(jobs.store.page, limit=limit + 1, after=last, oldest_first=order == "asc")
    data = [_video(job, jobs) for job in found[:limit]]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, first_id=ends[0], last_id=ends[1], has_more=len(found) > limit)


@router.get("/videos/{video_id}")
async def get_video(video_id: str, jobs: JobsDep) -> Video:
    """How far a video is."""
    return _video(await _find(video_id, jobs), jobs)


@router.get(
    "/videos/{video_id}/content",
    response_class=FileResponse,
    responses={
        200: {"content": {"video/mp4": {}}, "description": "The file."},
        206: {"content": {"video/mp4": {}}, "description": "The range asked for."},
    },
)
async def get_video_content(
    video_id: str,
    jobs: JobsDep,
    variant: Annotated[Literal["video"], Query(description="Only the video itself.")] = "video",
) -> FileResponse:
    """The file of a completed video."""
    job = await _find(video_id, jobs)
    if job.state is not JobState.COMPLETED:
        reason = f"video_id: this video is {job.state}; there is a file once it is completed"
        raise ApiError(400, reason, param="video_id", code="video_not_completed")
    path = jobs.path(job)
    try:
        file = await jobs.call(lambda: path.open("rb"))
    except FileNotFoundError:
        reason = "video_id: the file is not there any more"
        raise ApiError(404, reason, param="video_id", code="file_not_found") from None
    return _OpenFile(file, job.file_name)


@router.post("/videos/{video_id}/cancel")
async def cancel_video(video_id: str, jobs: JobsDep) -> Video:
    """End a video that is queued or in progress; one that is cancelled stays as it is."""
    job = await _find(video_id, jobs)
    await jobs.cancel(job.id)
    job = await _find(video_id, jobs)
    if job.state is not JobState.CANCELLED:
        raise ApiError(400, f"video_id: it has ended ({job.state})", param="video_id", code="video_ended")
    return _video(job, jobs)


@router.delete("/videos/{video_id}")
async def delete_video(video_id: str, jobs: JobsDep) -> DeletedVideo:
    """Remove a video and its file; one in progress is cancelled."""
    job = await _find(video_id, jobs)
    await jobs.delete(job)
    return DeletedVideo(id=job.id)


# ---------------------------------------------------------------- reading a request


async def _picture(sent: Body, body: VideoRequest, request: Request, context: Context) -> bytes | None:
    """The picture to start from, if there is one. Raises ``InvalidRequest``, ``ApiError``, ``HTTPException`` (429)."""
    pictures = sent.files.get("input_reference") or body.input_reference
    if not pictures:
        return None
    if not context.engine.card.needs_image:
        raise InvalidRequest("input_reference", "this model takes no picture; leave it out")
    if len(pictures) > 1:
        raise InvalidRequest("input_reference", f"{len(pictures)} pictures; allowed: one to start from")
    picture = await picture_of(
        pictures[0], param="input_reference", remote=context.remote, count=bytes_of(request).add
    )
    if len(picture) > (allowed := context.engine.args.max_output_bytes):  # could never be queued
        reason = f"its file has {len(picture)} bytes; allowed: {allowed} (--max-output-bytes)"
        raise InvalidRequest("input_reference", reason)
    return picture


async def _resolved(body: VideoRequest, params: SamplingParams, context: Context, client: str) -> SamplingParams:
    try:
        return await context.engine.check_picture(params, client=client)
    except InvalidRequest as error:
        raise body.as_written(error) from None


def _too_many(context: Context) -> ApiError:
    seconds = context.engine.status().retry_after
    args = context.engine.args
    allowed = f"{args.max_jobs} videos (--max-jobs)"
    if context.engine.card.needs_image:
        allowed += f" with {args.max_output_bytes} bytes of pictures (--max-output-bytes)"
    message = f"the queue of videos is full; allowed: {allowed}; try again in {seconds} s"
    return ApiError(429, message, type="rate_limit_error", code="queue_full", headers={"Retry-After": str(seconds)})


# ---------------------------------------------------------------- answering


class _OpenFile(FileResponse):
    """A file that is open: it is sent whole, though it may be deleted before its end, or before its begin."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(
            f"/proc/self/fd/{file.fileno()}",  # which opens it again, whether it still has a name or not
            stat_result=os.fstat(file.fileno()),
            media_type="video/mp4",
            filename=name,
            headers={"Cache-Control": "private, immutable", "X-Content-Type-Options": "nosniff"},
        )
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":  # of which there are no parts (RFC 9110, 14.2)
            scope = {**scope, "headers": [each for each in scope["headers"] if each[0] != b"range"]}
        refused = False

        async def send_in_our_form(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                refused = True
                await _bad_range(message, int(self.headers["content-length"])).response()(scope, receive, send)
            elif not refused:  # what follows is Starlette's own text
                await send(message)

        with self._file:
            await super().__call__(scope, receive, send_in_our_form)


def _bad_range(refusal: Message, size: int) -> ApiError:
    answered = Headers(raw=refusal["headers"])
    return ApiError(
        refusal["status"],
        f"Range: the file has {size} bytes; allowed: bytes=FIRST-LAST, counted from 0, or no Range for all of it",
        param="Range",
        code="invalid_range",
        headers={name: answered[name] for name in ("Content-Range",) if name in answered},
    )


async def _find(video_id: str, jobs: Jobs) -> Job:
    job = await jobs.call(jobs.store.get, video_id) if len(video_id) <= 64 else None
    if job is None:
        raise ApiError(404, "video_id: there is no such video (any more)", param="video_id", code="video_not_found")
    return job


def _repeated(job: Job, mark: str, jobs: Jobs, warnings: list[str]) -> Video:
    if job.fingerprint != mark:
        raise ApiError(
            400,
            "Idempotency-Key: it was used for another request; take a new key",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return _video(job, jobs).model_copy(update={"warnings": warnings})


def _video(job: Job, jobs: Jobs) -> Video:
    params, running = msgspec.convert(job.params, SamplingParams), job.state is JobState.IN_PROGRESS
    live = jobs.live.get(job.id) or Live()
    # Of the model that made it, which may not be served any more; rows of older servers don't have it.
    frames, fps = params.num_frames or 1, job.params.get("fps", jobs.engine.card.fps)
    steps = params.num_inference_steps or 0
    return Video(
        id=job.id,
        model=job.model,
        status=job.state.value,
        progress=100 if job.state is JobState.COMPLETED else live.percent if running else 0,
        stage=str(live.stage) if running else None,
        step=steps if job.state is JobState.COMPLETED else live.step if running else 0,
        eta_seconds=live.seconds_left() if running else None,
        created_at=int(job.created),
        started_at=None if job.started is None else int(job.started),
        completed_at=None if job.completed is None else int(job.completed),
        expires_at=None if job.completed is None else int(job.completed + jobs.engine.args.job_retention),
        prompt=params.prompt,
        seconds=f"{frames / fps:.4g}",
        size=f"{params.width}x{params.height}",
        num_frames=frames,
        num_inference_steps=steps,
        seed=params.seed or 0,
        error=None if job.error is None else VideoError(code="request_failed", message=job.error),
    )
