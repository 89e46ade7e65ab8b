"""The database of jobs and the disk, on a thread of their own, for the event loop's tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from ditrelay.errors import EngineClosed
from ditrelay.server.one_thread import OneThread
from ditrelay.server.problem import store_down

T = TypeVar("T")

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
_CALL_SECONDS = 30.0  # longer than a database that is busy takes, and a large file on a slow disk
_CLOSE_SECONDS = 10.0


class JobThread:
    """Whatever blocks is done here, one call after the other. For the event loop's thread."""

    def __init__(self) -> None:
        self.closed = False
        self._thread = OneThread("ditrelay-jobs")
        self._tasks: set[asyncio.Task[None]] = set()

    async def call(self, what: Callable[..., T], *values: Any, **named: Any) -> T:
        """What ``what`` returns, for a client who waits.

        Raises:
            EngineClosed: the server ends.
            ApiError: 503; it is not done within ``_CALL_SECONDS``, and may yet be.
        """
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                return await self.do(what, *values, **named)
        except TimeoutError:
            logger.error("--job-store: no answer within %g s", _CALL_SECONDS)
            raise store_down() from None

    async def do(self, what: Callable[..., T], *values: Any, **named: Any) -> T:
        """As ``call``, for as long as it takes: whoever changes a job's state must know whether it was changed."""
        if self.closed:
            raise EngineClosed("the server is shutting down")
        return await self._thread.call(lambda: what(*values, **named))

    async def insist(self, work: Callable[[], Awaitable[T]]) -> T:
        """What ``work`` returns, once the database answers."""
        while True:
            try:
                return await work()
            except SQLAlchemyError as error:
                logger.error("--job-store: %s; trying again in %g s", str(error).splitlines()[0], _RETRY_SECONDS)
                await asyncio.sleep(_RETRY_SECONDS)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it beside all else, until it is done or the server ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def repeat(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """``work`` again and again, whatever becomes of it: what it meets once must not stop it for good."""
        while not self.closed:
            try:
                await self.insist(work)
            except EngineClosed:
                return
            except Exception as error:
                logger.exception("jobs: %s; trying again in %g s", error, _RETRY_SECONDS)
                await asyncio.sleep(_RETRY_SECONDS)

    async def close(self, last: Callable[[], None]) -> bool:
        """End the tasks, then call ``last``. Whether it came to its end."""
        self.closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._thread.call(last)
        except TimeoutError:
            logger.error("--job-store: no answer within %g s; ending without it", _CLOSE_SECONDS)
            return False
        self._thread.stop()
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a job's task failed: %s", error, exc_info=error)
