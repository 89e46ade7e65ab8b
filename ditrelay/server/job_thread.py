"""The database of jobs and the disk, on a thread of their own, for the event loop's tasks."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import DatabaseError, IntegrityError, SQLAlchemyError

from ditrelay.errors import EngineClosed
from ditrelay.server.one_thread import OneThread
from ditrelay.server.problem import no_space, store_down

T = TypeVar("T")

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
_CALL_SECONDS = 30.0  # longer than a database that is busy takes, and a large file on a slow disk
_CLOSE_SECONDS = 10.0
_TROUBLES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_LEAST_FREE = 1 << 20  # bytes; a database that changes a row writes pages beside it
NO_SPACE = "no space is left in --output-dir for videos and their database"


class JobThread:
    """Whatever blocks is done here, one call after the other. For the event loop's thread.

    Attributes:
        trouble: why jobs cannot be kept at present; empty where they can.
    """

    def __init__(self, folder: Path) -> None:
        self.closed = False
        self.trouble = ""
        self._folder = folder
        self._thread = OneThread("ditrelay-jobs")
        self._tasks: set[asyncio.Task[None]] = set()

    async def call(self, what: Callable[..., T], *values: Any, **named: Any) -> T:
        """What ``what`` returns, for a client who waits.

        Raises:
            EngineClosed: the server ends.
            ApiError: 503; it is not done within ``_CALL_SECONDS``, and may yet be; or the database fails.
                507: there is no space.
        """
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                return await self.do(what, *values, **named)
        except TimeoutError:
            logger.error("--job-store: no answer within %g s", _CALL_SECONDS)
            raise store_down() from None
        except IntegrityError:
            raise
        except DatabaseError as error:
            logger.error("--job-store: %s", _first_line(error))  # without the statement, which holds prompts
            raise (no_space(NO_SPACE) if self.trouble == NO_SPACE else store_down(self.trouble)) from None

    async def do(self, what: Callable[..., T], *values: Any, **named: Any) -> T:
        """As ``call``, for as long as it takes: whoever changes a job's state must know whether it was changed."""
        if self.closed:
            raise EngineClosed("the server is shutting down")
        try:
            return await self._thread.call(lambda: what(*values, **named))
        except IntegrityError:
            raise
        except (DatabaseError, OSError) as error:
            if isinstance(error, DatabaseError) or error.errno in _TROUBLES:
                self.trouble = self._reason(error)
            raise

    async def look(self, probe: Callable[[], None]) -> None:
        """See whether jobs can be kept: whether there is space and, after a trouble, whether ``probe`` goes through."""

        def check() -> None:
            if self._free() < _LEAST_FREE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.trouble:
                probe()

        before = self.trouble
        try:
            await self.do(check)
        except (SQLAlchemyError, OSError) as error:
            if not before:
                logger.error("jobs: %s (%s)", self.trouble, _first_line(error))
        else:
            self.trouble = ""
            if before:
                logger.info("jobs: they are kept again")

    def _free(self) -> int:
        found = os.statvfs(self._folder)
        return found.f_bavail * found.f_frsize

    def _reason(self, error: DatabaseError | OSError) -> str:
        cause = error.orig if isinstance(error, DatabaseError) else error
        if isinstance(cause, FileNotFoundError):  # of the database, which says so itself
            return str(cause)
        try:
            is_full = self._free() < _LEAST_FREE
        except OSError:
            is_full = False
        is_full = is_full or "full" in str(cause) or getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        return NO_SPACE if is_full else f"the database of jobs fails: {_first_line(error)}"

    async def insist(self, work: Callable[[], Awaitable[T]]) -> T:
        """What ``work`` returns, once the database answers."""
        while True:
            try:
                return await work()
            except SQLAlchemyError as error:
                logger.error("--job-store: %s; trying again in %g s", _first_line(error), _RETRY_SECONDS)
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


def _first_line(error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    return (str(cause).splitlines() or [type(cause).__name__])[0]
