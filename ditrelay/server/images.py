"""``POST /v1/images/generations``, and the pictures that it answers with an address."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Request, Response

from ditrelay.errors import InvalidRequest, RequestFailed
from ditrelay.server.context import Context, ContextDep
from ditrelay.server.problem import RESPONSES, SERVER, ApiError, shutting_down
from ditrelay.server.schemas import ImageGenerationRequest, ImagesResponse, Picture

if TYPE_CHECKING:
    from ditrelay.engine import AsyncEngine, AsyncTicket, Result

T = TypeVar("T")

router = APIRouter(prefix="/v1", tags=["images"], responses=RESPONSES)


@router.post("/images/generations", response_model_exclude_none=True)
async def generate_images(body: ImageGenerationRequest, request: Request, context: ContextDep) -> ImagesResponse:
    """Draw pictures from a prompt."""
    context.check_model(body.model)
    _check_draws(context.engine)
    context.check_open()
    with context.taken():
        results = await _while_connected(request, _draw(context, body))
    as_url = body.response_format != "b64_json"
    return ImagesResponse(
        created=int(time.time()),
        data=[_linked(result, request, context) if as_url else _inline(result) for result in results],
    )


@router.get(
    "/files/{file_id}",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}, "description": "The file."}},
)
async def get_file(file_id: str, context: ContextDep) -> Response:
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
    """All pictures of one request, in order. Whatever ends it before that cancels those not finished."""
    timeout = context.engine.args.request_timeout
    tickets: list[AsyncTicket] = []
    try:
        async with asyncio.timeout(timeout):
            for params in body.sampling_params():
                tickets.append(await context.engine.submit(params))
            return await asyncio.gather(*(ticket.result() for ticket in tickets))
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


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves first."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            # Nobody reads this answer; nginx's status for it shows in the log.
            raise ApiError(499, "the client closed the connection", code="client_closed_request")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _linked(result: Result, request: Request, context: Context) -> Picture:
    file_id = context.files.add(result.media, result.media_type)
    url = str(request.url_for("get_file", file_id=file_id))
    return Picture(url=url, seed=result.seed, timings=result.timings)


def _inline(result: Result) -> Picture:
    return Picture(b64_json=base64.b64encode(result.media).decode("ascii"), seed=result.seed, timings=result.timings)
