"""Pictures that nobody waits for: ``Prefer: respond-async`` (RFC 7240) is answered at once, with their jobs."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response

from ditrelay.server.held_bytes import client_of
from ditrelay.server.job_schemas import JobList
from ditrelay.server.problem import ApiError

if TYPE_CHECKING:
    from ditrelay.server.context import Context
    from ditrelay.server.image_jobs import ImageJob

logger = logging.getLogger(__name__)

_PREFERENCE = "respond-async"

RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {
        "model": JobList,
        "description": "With `Prefer: respond-async`: the jobs, one per picture, in order. They go on by themselves; "
        "`/v1/jobs/{job_id}/events` follows them.",
    }
}


def is_preferred(request: Request) -> bool:
    """Whether the client would rather not wait."""
    named = (each.strip().lower() for value in request.headers.getlist("prefer") for each in value.split(","))
    return _PREFERENCE in named


async def accept(
    context: Context,
    request: Request,
    submitted: AbstractAsyncContextManager[list[ImageJob]],
    *,
    warnings: list[str],
) -> Response:
    """Answer once the pictures are queued.

    Args:
        request: whose client has, from here on, what the pictures start from.
        submitted: submits them, and cancels on leaving those that are not finished.
        warnings: what was ignored of the request.

    Raises:
        whatever ``submitted`` does on entering: nothing was begun.
    """
    queued: asyncio.Future[list[ImageJob]] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(_see_through(context, client_of(request.scope), submitted, queued))
    context.tasks.add(task)
    task.add_done_callback(context.tasks.discard)
    await asyncio.wait((task, queued), return_when=asyncio.FIRST_COMPLETED)
    if not queued.done():
        task.result()
    jobs = JobList(data=[job.info(None) for job in queued.result()], warnings=warnings)
    headers = {"Preference-Applied": _PREFERENCE}
    return Response(jobs.model_dump_json(), status_code=202, media_type="application/json", headers=headers)


async def _see_through(
    context: Context,
    client: str,
    submitted: AbstractAsyncContextManager[list[ImageJob]],
    queued: asyncio.Future[list[ImageJob]],
) -> None:
    try:
        with context.taken():
            async with submitted as jobs:
                queued.set_result(jobs)
                # All start from the same.
                with context.held.holding(client, len(jobs[0].ticket.params.image or b"")):
                    await asyncio.wait([job.work for job in jobs])  # how each ended is told by its events
    except ApiError as error:
        if not queued.done():
            raise
        logger.info("%s", error)  # --request-timeout
