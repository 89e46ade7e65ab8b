"""``/v1/videos``: jobs that make a video, in OpenAI's form."""

from __future__ import annotations

import io
import json
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Header, Query, Request
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from ditrelay.errors import InvalidRequest
from ditrelay.runtime.request import SamplingParams
from ditrelay.server.context import Context, ContextDep
from ditrelay.server.job_store import Job, JobState
from ditrelay.server.jobs import Jobs, Live, fingerprint
from ditrelay.server.problem import RESPONSES, ApiError, not_ready, shorten
from ditrelay.server.video_schemas import DeletedVideo, Video, VideoError, VideoList, VideoRequest

router = APIRouter(prefix="/v1", tags=["videos"], responses=RESPONSES)

_FORM = "multipart/form-data"
_MAX_PIXELS = 100_000_000
_QUERY = ("after", "limit", "order")
_SCHEMA = VideoRequest.model_json_schema()
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _SCHEMA},
            _FORM: {
                "schema": _SCHEMA
                | {"properties": _SCHEMA["properties"] | {"input_reference": {"type": "string", "format": "binary"}}}
            },
        },
    }
}


def _jobs(context: ContextDep) -> Jobs:
    """Raises ``ApiError``: the model makes no videos (400), or the server only begins (503)."""
    if context.engine.card.media != "video":
        reason = (
            f"{context.model_name!r} makes {context.engine.card.media}s; this address serves models that make videos"
        )
        raise ApiError(400, f"model: {reason}", param="model", code="unsupported_model")
    if context.jobs is None:
        raise not_ready("the job store is not open yet")
    return context.jobs


JobsDep = Annotated[Jobs, Depends(_jobs)]


@router.post("/videos", openapi_extra=_BODY)
async def create_video(
    request: Request,
    context: ContextDep,
    jobs: JobsDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Video:
    """Queue a video; its status tells when it is done. The same ``Idempotency-Key`` again returns the same video."""
    body, upload = await _read(request)
    context.check_model(body.model)
    params = _as_asked(body, context, upload)
    mark = fingerprint(params)
    if idempotency_key is not None and (older := await jobs.call(jobs.store.find, idempotency_key)):
        return _repeated(older, mark, jobs)
    context.check_open()
    job = await jobs.add(_resolved(body, params, context), key=idempotency_key, fingerprint=mark)
    if job is None:
        raise _too_many(context)
    return _repeated(job, mark, jobs)


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
    if not await jobs.call(path.is_file):
        raise ApiError(404, "video_id: the file is not there any more", param="video_id", code="file_not_found")
    headers = {"Cache-Control": "private, immutable", "X-Content-Type-Options": "nosniff"}
    return FileResponse(path, media_type="video/mp4", filename=job.file_name, headers=headers)


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


async def _read(request: Request) -> tuple[VideoRequest, bytes | None]:
    """The body, and the picture of a form. Raises ``ApiError`` (400)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _FORM:
        return await _read_form(request)
    if kind != "application/json":
        raise ApiError(400, f"Content-Type: must be application/json or {_FORM}", code="invalid_content_type")
    try:
        document = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return _checked(document), None


async def _read_form(request: Request) -> tuple[VideoRequest, bytes | None]:
    try:
        form = await request.form(max_files=1, max_fields=50)
    except HTTPException as error:
        if error.status_code != 400:  # the limits on bodies speak for themselves
            raise
        raise ApiError(400, f"the form cannot be read: {error.detail}", code="invalid_form") from None
    fields: dict[str, Any] = {}
    upload = None
    for name, value in form.multi_items():
        if name in fields:
            raise _wrong(name, "it is given twice")
        fields[name] = value
    if isinstance(file := fields.get("input_reference"), UploadFile):
        upload = await file.read()
        del fields["input_reference"]
    return _checked(fields, strict=False), upload


def _checked(document: dict[str, Any], *, strict: bool | None = None) -> VideoRequest:
    try:
        return VideoRequest.model_validate(document, strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = shorten(str(first["loc"][0]))
    if first["type"] == "extra_forbidden":
        known = ", ".join(VideoRequest.model_fields)
        raise ApiError(400, f"{param}: unknown field; known: {known}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        raise ApiError(400, f"{param}: required", param=param, code="missing_required_parameter")
    raise _wrong(param, first["msg"])


def _as_asked(body: VideoRequest, context: Context, upload: bytes | None) -> SamplingParams:
    params = body.sampling_params(context.engine.card, upload)
    if params.image is not None:
        if not context.engine.card.needs_image:
            raise InvalidRequest("input_reference", "this model takes no picture; leave it out")
        _check_picture(params.image)
    return params


def _resolved(body: VideoRequest, params: SamplingParams, context: Context) -> SamplingParams:
    try:
        return context.engine.card.resolve(params)
    except InvalidRequest as error:
        names = {"height": "size", "width": "size", "image": "input_reference"}
        if body.seconds is not None:
            names["num_frames"] = "seconds"
        if (name := names.get(error.param)) is None:
            raise
        raise InvalidRequest(name, f"{error.param} {error.reason}") from None


def _check_picture(content: bytes) -> None:
    """Reads the header only: nothing is decoded in this process."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as picture:
            pixels, frames = picture.width * picture.height, getattr(picture, "n_frames", 1)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        raise InvalidRequest("input_reference", "it cannot be read; allowed: a PNG, JPEG or WebP picture") from None
    if frames != 1:
        raise InvalidRequest("input_reference", "it is animated; allowed: one picture")
    if pixels > _MAX_PIXELS:
        raise InvalidRequest("input_reference", f"{pixels} pixels; allowed: at most {_MAX_PIXELS}")


def _wrong(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{shorten(param)}: {reason}", param=shorten(param), code="invalid_value")


def _too_many(context: Context) -> ApiError:
    seconds = context.engine.status().retry_after
    message = f"{context.engine.args.max_jobs} videos are queued (--max-jobs); try again in {seconds} s"
    return ApiError(429, message, type="rate_limit_error", code="queue_full", headers={"Retry-After": str(seconds)})


# ---------------------------------------------------------------- answering


async def _find(video_id: str, jobs: Jobs) -> Job:
    job = await jobs.call(jobs.store.get, video_id) if len(video_id) <= 64 else None
    if job is None:
        raise ApiError(404, "video_id: there is no such video (any more)", param="video_id", code="video_not_found")
    return job


def _repeated(job: Job, mark: str, jobs: Jobs) -> Video:
    if job.fingerprint != mark:
        raise ApiError(
            400,
            "Idempotency-Key: it was used for another request; take a new key",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return _video(job, jobs)


def _video(job: Job, jobs: Jobs) -> Video:
    params, running = msgspec.convert(job.params, SamplingParams), job.state is JobState.IN_PROGRESS
    live = jobs.live.get(job.id) or Live()
    frames, fps = params.num_frames or 1, jobs.engine.card.fps
    return Video(
        id=job.id,
        model=job.model,
        status=job.state.value,
        progress=100 if job.state is JobState.COMPLETED else live.percent if running else 0,
        stage=str(live.stage) if running else None,
        step=live.step if running else 0,
        eta_seconds=live.seconds_left() if running else None,
        created_at=int(job.created),
        started_at=None if job.started is None else int(job.started),
        completed_at=None if job.completed is None else int(job.completed),
        expires_at=None if job.completed is None else int(job.completed + jobs.engine.args.job_retention),
        prompt=params.prompt,
        seconds=f"{frames / fps:.4g}",
        size=f"{params.width}x{params.height}",
        num_frames=frames,
        num_inference_steps=params.num_inference_steps or 0,
        seed=params.seed or 0,
        error=None if job.error is None else VideoError(code="request_failed", message=job.error),
    )
