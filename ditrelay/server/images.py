"""``POST /v1/images/generations``, and the pictures that it answers with an address."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from ditrelay.errors import InvalidRequest, RequestFailed
from ditrelay.server.context import Context, ContextDep
from ditrelay.server.problem import RESPONSES, SERVER, ApiError, shutting_down
from ditrelay.server.schemas import ImageCompleted, ImageGenerationRequest, ImageProgress, ImagesResponse, Picture
from ditrelay.server.streaming import Emit, EventStream, while_connected

if TYPE_CHECKING:
    from ditrelay.engine import AsyncEngine, AsyncTicket, Result

router = APIRouter(prefix="/v1", tags=["images"], responses=RESPONSES)


@router.post(
    "/images/generations",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses={200: {"content": {"text/event-stream": {}}, "description": "The pictures, or with stream the events."}},
)
async def generate_images(
    body: ImageGenerationRequest, request: Request, context: ContextDep
) -> ImagesResponse | EventStream:
    """Draw pictures from a prompt."""
    context.check_model(body.model)
    _check_draws(context.engine)
    body.check_stream()
    context.check_open()
    if body.stream:
        return EventStream(lambda emit: _stream(context, body, emit))
    with context.taken():
        results = await while_connected(request, _draw(context, body))
    as_url = body.response_format != "b64_json"
    return ImagesResponse(
        created=int(time.time()),
        data=[_linked(result, request, context) if as_url else _inline(result) for result in results],
        output_format=_format(results[0]),
        size=_size(results[0]),
    )


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
    file = context.files.get(file_id)
    if file is None:
        raise ApiError(404, "file_id: there is no such file (any more)", param="file_id", code="file_not_found")
    headers = {
        "Cache-Control": f"private, max-age={context.files.lifetime:.0f}, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(file.content, media_type=file.media_type, headers=headers)


def _check_draws(engine: AsyncEngine) -> None:
    if engine.card.media != "image":
        reason = f"{engine.args.model_name!r} makes {engine.card.media}s; this address serves models that make images"
        raise ApiError(400, f"model: {reason}", param="model", code="unsupported_model")


async def _draw(context: Context, body: ImageGenerationRequest) -> list[Result]:
    """All pictures of one request, in order."""
    async with _submitted(context, body) as tickets:
        return await asyncio.gather(*(ticket.result() for ticket in tickets))


async def _stream(context: Context, body: ImageGenerationRequest, emit: Emit) -> None:
    """Tells every picture's progress, and each when it is finished; the first that fails ends them all."""
    with context.taken():
        async with _submitted(context, body) as tickets:
            following = [asyncio.ensure_future(_follow(i, ticket, emit)) for i, ticket in enumerate(tickets)]
            try:
                await asyncio.gather(*following)
            finally:
                for task in following:
                    task.cancel()
                await asyncio.gather(*following, return_exceptions=True)


async def _follow(index: int, ticket: AsyncTicket, emit: Emit) -> None:
    async for each in ticket.events():
        if not each.state.ended:
            progress = ImageProgress(index=index, state=each.state, step=each.step, total_steps=each.total_steps)
            await emit(progress.type, progress)
    result = await ticket.result()
    completed = ImageCompleted(
        index=index,
        b64_json=_base64(result),
        created_at=int(time.time()),
        size=_size(result),
        output_format=_format(result),
        seed=result.seed,
        timings=result.timings,
    )
    await emit(completed.type, completed)


@asynccontextmanager
async def _submitted(context: Context, body: ImageGenerationRequest) -> AsyncIterator[list[AsyncTicket]]:
    """Around the wait for all pictures of one request. Whatever ends it before that cancels those not finished."""
    timeout = context.engine.args.request_timeout
    tickets: list[AsyncTicket] = []
    try:
        async with asyncio.timeout(timeout):
            for params in body.sampling_params():
                tickets.append(await context.engine.submit(params))
            yield tickets
    except InvalidRequest as error:
        raise body.as_written(error) from None
    except RequestFailed as error:
        if context.closing:
            raise shutting_down() from error
        raise
    except TimeoutError as error:
        reason = f"the pictures were not finished within {timeout:g} s (--request-timeout)"
        raise ApiError(504, reason, type=SERVER, code="timeout") from error
    finally:
        for ticket in tickets:
            ticket.cancel()


def _linked(result: Result, request: Request, context: Context) -> Picture:
    file_id = context.files.add(result.media, result.media_type)
    url = str(request.url_for("get_image_content", file_id=file_id))
    return Picture(url=url, seed=result.seed, timings=result.timings)


def _inline(result: Result) -> Picture:
    return Picture(b64_json=_base64(result), seed=result.seed, timings=result.timings)


def _base64(result: Result) -> str:
    return base64.b64encode(result.media).decode("ascii")


def _format(result: Result) -> str:
    return result.media_type.removeprefix("image/")


def _size(result: Result) -> str:
    return f"{result.width}x{result.height}"
