"""``POST /v1/images/generations``, and the pictures that it answers with an address."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

import msgspec
from fastapi import Request, Response
from PIL import Image
from pydantic import BaseModel

from ditrelay.errors import InvalidRequest, RequestCancelled, RequestFailed
from ditrelay.runtime.request import PictureFormat, SamplingParams
from ditrelay.server import detached
from ditrelay.server.bodies import page_entry, read_body
from ditrelay.server.context import Context, ContextDep
from ditrelay.server.files import FileStore
from ditrelay.server.held_bytes import client_of
from ditrelay.server.image_answers import (
    EventFamily,
    ImageCancelled,
    ImageCompleted,
    ImagePartial,
    ImageProgress,
    ImagesResponse,
    Picture,
)
from ditrelay.server.image_jobs import ImageJob
from ditrelay.server.image_schemas import ImageGenerationRequest
from ditrelay.server.live import Live
from ditrelay.server.problem import RESPONSES, SERVER, ApiError, shutting_down
from ditrelay.server.router import Router
from ditrelay.server.streaming import Emit, EventStream, while_connected

if TYPE_CHECKING:
    from ditrelay.async_engine import AsyncEngine
    from ditrelay.engine import Result

router = Router(prefix="/v1", tags=["images"], responses=RESPONSES)


class PictureRequest(Protocol):
    """The body of a request for pictures, whatever they are drawn from.

    Attributes:
        events: what the names of its stream's events begin with.
    """

    events: ClassVar[EventFamily]

    @property
    def model(self) -> str | None: ...

    @property
    def stream(self) -> bool | None: ...

    @property
    def response_format(self) -> str | None: ...

    @property
    def warnings(self) -> list[str]: ...

    def check_stream(self) -> None: ...

    def check_count(self, max_queue: int) -> None: ...

    def sampling_params(self) -> Iterator[SamplingParams]: ...

    def as_written(self, error: InvalidRequest) -> InvalidRequest: ...


@router.post(
    "/images/generations",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "The pictures, or with stream the events."},
        **detached.RESPONSES,
    },
    openapi_extra=page_entry(ImageGenerationRequest),
)
async def generate_images(request: Request, context: ContextDep) -> Response:
    """Draw pictures from a prompt."""
    sent = await read_body(request)
    body = sent.checked(ImageGenerationRequest, extra=context.engine.args.extra_fields)
    return await respond(body, request, context)


async def respond(body: PictureRequest, request: Request, context: Context) -> Response:
    """Draw what ``body`` asks for, and answer with the pictures or with the events of a stream.

    Raises:
        ApiError, InvalidRequest, QueueFull, RequestFailed, EngineClosed: nothing (more) is drawn, and why.
    """
    context.check_model(body.model)
    _check_draws(context.engine)
    body.check_stream()
    body.check_count(context.engine.args.max_queue)
    context.check_open()
    client = client_of(request.scope)
    if body.stream:
        return EventStream(lambda emit: _stream(context, body, client, emit))
    if detached.is_preferred(request):
        submitted = _submitted(context, body, client, context.files)
        return await detached.accept(context, request, submitted, warnings=body.warnings)
    as_url = (body.response_format or context.engine.args.default_response_format) == "url"
    files = context.files if as_url else context.recent_files
    with context.taken():
        drawn = await while_connected(request, _draw(context, body, client, files))
    results = [result for _, result in drawn]
    answer = ImagesResponse(
        created=int(time.time()),
        data=[_picture(result, _url(job, request) if as_url else None) for job, result in drawn],
        output_format=_format(results[0]),
        size=_size(results[0]),
        warnings=body.warnings or None,
    )
    return _written(answer, () if as_url else [result.media for result in results])


@router.get(
    "/images/{file_id}/content",
    response_class=Response,
    responses={
        200: {
            "content": {f"image/{kind}": {} for kind in ("png", "jpeg", "webp")},
            "description": "The picture's file.",
        }
    },
)
async def get_image_content(file_id: str, context: ContextDep) -> Response:
    """A finished picture, at the address given in the response that made it."""
    for files in (context.files, context.recent_files):
        if (file := files.get(file_id)) is not None:
            break
    else:
        raise ApiError(404, "file_id: there is no such file (any more)", param="file_id", code="file_not_found")
    headers = {
        "Cache-Control": f"private, max-age={files.lifetime:.0f}, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(file.content, media_type=file.media_type, headers=headers)


def _check_draws(engine: AsyncEngine) -> None:
    if engine.card.media != "image":
        reason = (
            f"{engine.args.model_name!r} makes {engine.card.media}s; this address serves models that make images,"
            " such as builtin:emoji"
        )
        raise ApiError(400, f"model: {reason}", param="model", code="unsupported_model")


async def _draw(context: Context, body: PictureRequest, client: str, files: FileStore) -> list[tuple[ImageJob, Result]]:
    """All pictures of one request, in order."""
    async with _submitted(context, body, client, files) as jobs:
        return list(zip(jobs, await asyncio.gather(*(job.result() for job in jobs)), strict=True))


async def _stream(context: Context, body: PictureRequest, client: str, emit: Emit) -> None:
    """Tells every picture's progress, and each when it is finished; the first that fails ends them all."""
    with context.taken():
        async with _submitted(context, body, client, context.recent_files) as jobs:
            told = [_Told(index, job, body, emit) for index, job in enumerate(jobs)]
            following = [asyncio.ensure_future(each.follow(context)) for each in told]
            try:
                await asyncio.gather(*following)
            finally:
                for task in following:
                    task.cancel()
                await asyncio.gather(*following, return_exceptions=True)


@dataclass
class _Told:
    """One picture of a stream, and what its client is told of it."""

    index: int
    job: ImageJob
    body: PictureRequest
    emit: Emit
    previews: int = 0
    live: Live = field(default_factory=Live)

    async def follow(self, context: Context) -> None:
        async for each in self.job.ticket.events():
            if each.preview is not None:
                await self._preview(each.step, each.preview)
            elif not each.state.ended:
                self.live.observe(each)
                step, total = self.live.step, each.total_steps or self.live.total_steps
                await self._tell(ImageProgress, "progress", state=each.state, step=step, total_steps=total)
        try:
            await self._completed(await self.job.result())
        except RequestCancelled:
            if context.closing:
                raise
            await self._tell(ImageCancelled, "cancelled")

    async def _tell(self, kind: type[BaseModel], name: str, **values: object) -> None:
        event = f"{self.body.events}.{name}"
        data = kind.model_validate({"type": event, "index": self.index, "job_id": self.job.id} | values)
        await self.emit(event, data)

    async def _preview(self, step: int, jpeg: bytes) -> None:
        kind = self.job.ticket.params.output_format or "png"
        content, size = await asyncio.to_thread(_converted, jpeg, kind)
        await self._tell(
            ImagePartial,
            "partial_image",
            b64_json=_base64(content),
            created_at=int(time.time()),
            size=size,
            output_format=kind,
            partial_image_index=self.previews,
            step=step,
        )
        self.previews += 1

    async def _completed(self, result: Result) -> None:
        await self._tell(
            ImageCompleted,
            "completed",
            b64_json=_base64(result.media),
            created_at=int(time.time()),
            size=_size(result),
            output_format=_format(result),
            seed=result.seed,
            timings=result.timings,
            warnings=self.body.warnings,
        )


@asynccontextmanager
async def _submitted(
    context: Context, body: PictureRequest, client: str, files: FileStore
) -> AsyncIterator[list[ImageJob]]:
    """Around the wait for all pictures of one request. Whatever ends it before that cancels those not finished."""
    timeout = context.engine.args.request_timeout
    jobs: list[ImageJob] = []
    try:
        async with asyncio.timeout(timeout):
            for params in body.sampling_params():
                jobs.append(context.images.follow(await context.engine.submit(params, client=client), files, client))
            yield jobs
    except InvalidRequest as error:
        raise body.as_written(error) from None
    except RequestFailed as error:
        if context.closing:
            raise shutting_down() from error
        raise
    except RequestCancelled as error:
        if context.closing:
            raise
        # A status that clients do not try again: somebody wanted the end.
        raise ApiError(400, "a picture was cancelled by POST /v1/jobs/{id}/cancel", code="request_cancelled") from error
    except TimeoutError as error:
        reason = f"the pictures were not finished within {timeout:g} s (--request-timeout)"
        raise ApiError(504, reason, type=SERVER, code="timeout") from error
    finally:
        for job in jobs:
            job.ticket.cancel()


def _url(job: ImageJob, request: Request) -> str:
    return str(request.url_for("get_image_content", file_id=job.file_id))


def _picture(result: Result, url: str | None) -> Picture:
    return Picture(url=url, seed=result.seed, timings=result.timings)


def _written(answer: ImagesResponse, files: Sequence[bytes]) -> Response:
    """``answer`` with the files of its pictures as ``b64_json``.

    msgspec writes base64 in one pass: a megabyte takes 0.5 ms of the event loop. By way of text it is 3 ms and more.
    """
    content = answer.model_dump(mode="json", exclude_none=True)
    for picture, file in zip(content["data"], files, strict=False):
        picture["b64_json"] = file
    return Response(msgspec.json.encode(content), media_type="application/json")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _converted(jpeg: bytes, kind: PictureFormat) -> tuple[bytes, str]:
    """A JPEG file in the format ``kind``, and its size."""
    with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as picture:
        size = f"{picture.width}x{picture.height}"
        if kind == "jpeg":
            return jpeg, size
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        return buffer.getvalue(), size


def _format(result: Result) -> str:
    return result.media_type.removeprefix("image/")


def _size(result: Result) -> str:
    return f"{result.width}x{result.height}"
