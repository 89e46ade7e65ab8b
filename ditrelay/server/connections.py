"""Clients' connections: how many at a time, for how long without a request, and how slowly an answer may be read."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ditrelay.server.problem import too_many_connections
from ditrelay.server.seldom import Seldom
from ditrelay.server.traffic import Traffic

if TYPE_CHECKING:
    from ditrelay.runtime.server_args import ServerArgs

logger = logging.getLogger(__name__)

# Open to connections beyond the limit: what watches the server must not be told that it is down because it is busy.
_WATCHING = frozenset({"/health", "/ready", "/metrics"})
# Connections beyond the limit, for these.
SPARE_CONNECTIONS = 16

# Bytes of an answer that are handed over at a time; the next ones when the client has taken most of these.
_SLICE = 64 << 10
# A client that takes nothing for so long is cut off where all answers together are too much.
_SLOW_SECONDS = 1.0
# Read from a connection at a time. The parser takes all of it before anybody else has a turn, and a body may come in
# chunks of one byte each.
_READ_BYTES = 32 << 10


@dataclass(frozen=True)
class ConnectionRules:
    """Attributes:
    limit: connections at a time.
    header_timeout: seconds that a connection may be without a request that is complete but for its body.
    write_timeout: seconds in which a client must take what lies ready for it.
    max_unsent: bytes of all answers together that clients have not taken yet.
    prefix: the path before every address.
    """

    limit: int = 1000
    header_timeout: float = 30.0
    write_timeout: float = 30.0
    max_unsent: int = 256 << 20
    prefix: str = ""

    @classmethod
    def of(cls, args: ServerArgs, limit: int) -> ConnectionRules:
        return cls(limit, args.header_timeout, args.write_timeout, args.max_unsent_bytes, args.prefix)


class Connections:
    """All of one server's. Belongs to the event loop's thread.

    Args:
        traffic: is told what happens.
        clock: seconds that only grow.
    """

    def __init__(self, rules: ConnectionRules, traffic: Traffic, clock: Callable[[], float] = time.monotonic) -> None:
        self.rules = rules
        self.traffic = traffic
        self.clock = clock
        traffic.limit = rules.limit
        self._all: dict[Connection, None] = {}
        self._idle: dict[Connection, float] = {}  # since when, oldest first
        self._busy, self._slow, self._full = Seldom(logger), Seldom(logger), Seldom(logger)

    def add(self, connection: Connection) -> None:
        """Make room for it by closing the connection that has been idle for longest; without one, it is a spare."""
        self._all[connection] = None
        self.rest(connection)
        if len(self._all) > self.rules.limit and not self.close_oldest(besides=connection):
            connection.is_spare = True
            self._busy.warn(f"{self.rules.limit} connections are busy (--max-connections); others are refused")
            if len(self._all) > self.rules.limit + SPARE_CONNECTIONS:
                self.cut(connection, "too_many")
        self._count()

    def remove(self, connection: Connection) -> None:
        self._all.pop(connection, None)
        self._idle.pop(connection, None)
        self._count()

    def rest(self, connection: Connection) -> None:
        """It has no request, from now on."""
        self._idle[connection] = self.clock()
        self._count()

    def work(self, connection: Connection) -> None:
        """It has a request."""
        self._idle.pop(connection, None)
        self._count()

    def close_oldest(self, *, besides: Connection | None = None) -> bool:
        """Close the connection that has been idle for longest. ``False``: none is."""
        idle = [each for each in self._idle if each is not besides]
        if not idle:
            return False
        # One that still reads the end of its answer goes last.
        self.cut(next((each for each in idle if not each.transport.get_write_buffer_size()), idle[0]), "idle")
        return True

    def cut(self, connection: Connection, reason: str) -> None:
        """End it, whatever is under way on it."""
        self._idle.pop(connection, None)
        self._all.pop(connection, None)
        self.traffic.turned_away[reason] += 1
        connection.transport.abort()
        self._count()

    def sweep(self) -> None:
        """Cut off those that are too slow; to be called every second or so."""
        now = self.clock()
        late = [each for each, since in self._idle.items() if now - since > self.rules.header_timeout]
        for connection in late:
            self.cut(connection, "header_timeout")
        for connection in list(self._all):
            if connection.outgoing.stands_still(now) > self.rules.write_timeout:
                self._slow.warn(
                    f"a client did not read its answer for {self.rules.write_timeout:g} s (--write-timeout): cut off"
                )
                self.cut(connection, "write_timeout")

    def unsent(self, nbytes: int) -> None:
        """Count ``nbytes`` more, or less, of answers; where it is too much, the slowest readers are cut off."""
        self.traffic.unsent += nbytes
        if nbytes < 0 or self.traffic.unsent <= self.rules.max_unsent:
            return
        now, left = self.clock(), self.traffic.unsent
        still = [(each.outgoing.stands_still(now), each) for each in self._all if each.outgoing.unsent]
        for seconds, connection in sorted(still, key=lambda each: each[0], reverse=True):
            if left <= self.rules.max_unsent or seconds < _SLOW_SECONDS:
                return
            left -= connection.outgoing.unsent
            self._full.warn(
                f"answers with more than {self.rules.max_unsent} bytes wait for their readers (--max-unsent-bytes): "
                "the slowest reader is cut off"
            )
            self.cut(connection, "unsent_bytes")

    def _count(self) -> None:
        self.traffic.connections = len(self._all)
        self.traffic.busy = len(self._all) - len(self._idle)


class Outgoing:
    """The answer that is being sent on one connection.

    Attributes:
        unsent: bytes of it that are not handed over yet.
    """

    def __init__(self, connections: Connections, transport: asyncio.Transport) -> None:
        self._connections = connections
        self._transport = transport
        self._since: float | None = None
        self.unsent = 0

    async def send(self, send: Send, message: Message) -> None:
        """Send ``message`` in slices, the next one when the client has taken most of the one before."""
        body = message.get("body", b"")
        for at in range(0, max(len(body), 1), _SLICE):
            if self._transport.is_closing():
                return await asyncio.sleep(0)  # the connection is told of its end first
            is_last = at + _SLICE >= len(body) and not message.get("more_body", False)
            part = {**message, "body": body[at : at + _SLICE], "more_body": not is_last}
            await self._slice(send, part if body else message, len(body) - at)

    async def _slice(self, send: Send, message: Message, left: int) -> None:
        self.unsent, self._since = left, self._connections.clock()
        self._connections.unsent(left)
        try:
            await send(message)
        finally:
            self.unsent, self._since = 0, None
            self._connections.unsent(-left)

    def stands_still(self, now: float) -> float:
        """Seconds in which the client has not taken the slice that lies ready for it."""
        return 0.0 if self._since is None else now - self._since


class Connection(H11Protocol):
    """One connection, by uvicorn, with these limits.

    Attributes:
        is_spare: it is one too many, and only serves what watches the server; another request ends it.
    """

    def __init__(self, connections: Connections, *, is_spare: bool = False, **how: Any) -> None:
        super().__init__(**how)
        self._all = connections
        self._served: ASGIApp = self.app
        self.app = self._serve
        self.is_spare = is_spare

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        super().connection_made(transport)
        self.outgoing = Outgoing(self._all, transport)
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._all.rest(self)
        super().on_response_complete()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._all.work(self)

        async def send_slowly(message: Message) -> None:
            await self.outgoing.send(send, message)

        if self.is_spare and scope["path"].removeprefix(self._all.rules.prefix) not in _WATCHING:
            self._all.traffic.turned_away["too_many"] += 1
            return await too_many_connections(self._all.rules.limit).response()(scope, receive, send_slowly)
        await self._served(scope, receive, send_slowly)
