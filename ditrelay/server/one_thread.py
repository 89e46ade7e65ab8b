"""A thread for what blocks, so that the server's event loop does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")


class OneThread:
    """Does one call after the other, on a thread of its own.

    The thread is a daemon, as no executor's is: a call that never returns (a database that stands still) must not keep
    the process from its end.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        # Asked for errors that nobody waits for any more; those of a database quote what clients have sent.
        self._loop.set_exception_handler(lambda loop, context: None)
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def call(self, what: Callable[[], T]) -> T:
        """What ``what`` returns or raises. Cancelled before its turn, it is not done; later, it goes on by itself."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_call(what), self._loop))

    def stop(self) -> None:
        """End the thread; nothing may be under way, and nothing is called any more."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        with closing(self._loop):
            self._loop.run_forever()


async def _call(what: Callable[[], T]) -> T:
    return what()
