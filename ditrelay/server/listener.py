"""Accepts connections, also where the process runs out of descriptors."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable

from ditrelay.runtime.descriptors import EXHAUSTED, Spares
from ditrelay.server.seldom import Seldom

logger = logging.getLogger(__name__)

_BACKLOG = 2048  # connections that the system keeps until they are accepted
_AT_A_TIME = 16  # that are accepted and not counted yet
_RETRY_SECONDS = 1.0
_SPARE_DESCRIPTORS = 4


class Listener:
    """Accepts on several sockets.

    asyncio's own server logs a traceback for each connection that it can not accept, thousands of them a second. Here
    the connection that has been idle for longest gives its descriptor away; where none is idle, a spare one lets what
    watches the server in.

    Args:
        connect: makes the protocol of a connection; with ``True`` one that is beyond what there are descriptors for.
        close_idle: closes an idle connection; ``False``: there is none.
    """

    def __init__(
        self,
        sockets: Iterable[socket.socket],
        connect: Callable[[bool], asyncio.Protocol],
        close_idle: Callable[[], bool],
        spares: Spares | None = None,
    ) -> None:
        self._sockets = list(sockets)
        self._connect = connect
        self._close_idle = close_idle
        self._spares = spares or Spares(_SPARE_DESCRIPTORS)
        self._loop = asyncio.get_running_loop()
        self._seldom = Seldom(logger)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_open = True

    def start(self) -> None:
        for each in self._sockets:
            each.setblocking(False)
            each.listen(_BACKLOG)
            self._loop.add_reader(each, self._accept, each)

    def refill(self) -> None:
        """To be called every second or so: descriptors may be free again."""
        if self._is_open:
            self._spares.refill()

    def close(self) -> None:
        """Accept no more; the sockets stay open."""
        self._is_open = False
        for each in self._sockets:
            self._loop.remove_reader(each)
        self._spares.close()

    def _accept(self, listening: socket.socket) -> None:
        while len(self._tasks) < _AT_A_TIME:
            try:
                accepted, _ = listening.accept()
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._make_do(listening, error)
                return  # there is no other, or one that has left already
            self._serve(accepted)

    def _make_do(self, listening: socket.socket, error: OSError) -> None:
        self._seldom.warn(
            f"no connection can be accepted ({error.strerror}): raise the limit on file descriptors (ulimit -n), "
            "or lower --max-connections"
        )
        if self._close_idle():
            self._loop.call_soon(self._again, listening)
            return
        if self._spares.give():
            try:
                accepted, _ = listening.accept()
            except OSError:
                return
            self._serve(accepted, is_spare=True)
            return
        self._loop.remove_reader(listening)  # it would call again at once
        self._loop.call_later(_RETRY_SECONDS, self._again, listening)

    def _again(self, listening: socket.socket) -> None:
        if self._is_open:
            self._loop.add_reader(listening, self._accept, listening)

    def _serve(self, accepted: socket.socket, *, is_spare: bool = False) -> None:
        accepted.setblocking(False)
        task = self._loop.create_task(self._connected(accepted, is_spare))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connected(self, accepted: socket.socket, is_spare: bool) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: self._connect(is_spare), accepted)
        except OSError as error:
            accepted.close()
            logger.debug("a connection ended before it began: %s", error)
