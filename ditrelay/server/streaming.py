"""Answers that are watched while they are made: the client may leave, and events go out one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from ditrelay.errors import EngineClosed, InvalidRequest, QueueFull, RequestCancelled, RequestFailed
from ditrelay.server.problem import ApiError, describe
from ditrelay.server.schemas import ErrorEvent

T = TypeVar("T")

HEARTBEAT_SECONDS = 15.0


class Emit(Protocol):
    """Sends one event: its name, its data, and the id at which a client may resume."""

    async def __call__(self, name: str, data: BaseModel, event_id: str | None = None) -> None: ...


# What a client may be told of in the middle of a stream. Anything else is a fault of ours: logged, the stream cut off.
_TOLD = (ApiError, InvalidRequest, QueueFull, RequestFailed, RequestCancelled, EngineClosed)


class ClientLeft(ApiError):
    """Nobody reads this answer; nginx's status for it shows in the log."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection", code="client_closed_request")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves first: then raises ``ClientLeft``."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, made by ``produce`` while they are sent.

    What ``produce`` raises before its first event is answered as for any other route, with its own status. After that
    the last event is ``error``, in OpenAI's form. A client that leaves cancels ``produce``. Comments between events
    that are far apart keep proxies from closing the connection.

    Args:
        produce: sends the events; the stream ends when it returns.
        until: ends the stream when it is set, for streams that have no end of their own.
        eager: begin the answer at once, not with the first event.
        heartbeat: seconds between two comments.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        produce: Callable[[Emit], Coroutine[Any, Any, None]],
        *,
        until: asyncio.Event | None = None,
        eager: bool = False,
        heartbeat: float = HEARTBEAT_SECONDS,
    ) -> None:
        # Without the last header nginx holds events back until it has a buffer full of them.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._produce = produce
        self._until = until
        self._eager = eager
        self._heartbeat = heartbeat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, sender = Request(scope, receive), _Sender(self, send)
        if scope["method"] == "HEAD":  # which asks for no event
            return await sender.end()
        if self._eager:
            await sender.comment("ok")
        beating = asyncio.create_task(sender.beat(self._heartbeat))
        try:
            await while_connected(request, self._events(sender))
        except _TOLD as error:
            if not sender.started:
                raise
            if not isinstance(error, ClientLeft):
                await sender.emit("error", ErrorEvent(error=describe(request, error).error))
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
        await sender.end()

    async def _events(self, sender: _Sender) -> None:
        if self._until is None:
            return await self._produce(sender.emit)
        producing, ending = asyncio.ensure_future(self._produce(sender.emit)), asyncio.ensure_future(self._until.wait())
        try:
            await asyncio.wait((producing, ending), return_when=asyncio.FIRST_COMPLETED)
            if producing.done():
                producing.result()
        finally:
            producing.cancel()
            ending.cancel()
            await asyncio.gather(producing, ending, return_exceptions=True)


class _Sender:
    """The body of one ``EventStream``. Events may come from several tasks."""

    def __init__(self, response: EventStream, send: Send) -> None:
        self.started = False
        self._response = response
        self._send = send
        self._one_at_a_time = asyncio.Lock()

    async def emit(self, name: str, data: BaseModel, event_id: str | None = None) -> None:
        # JSON holds no line breaks, so that the data is one line.
        text = f"event: {name}\ndata: {data.model_dump_json()}\n\n"
        await self._write(text if event_id is None else f"id: {event_id}\n{text}")

    async def comment(self, text: str) -> None:
        await self._write(f": {text}\n\n")

    async def beat(self, seconds: float) -> None:
        """A comment now and then, once the answer has begun."""
        while True:
            await asyncio.sleep(seconds)
            if self.started:
                await self.comment("still here")

    async def _write(self, text: str) -> None:
        async with self._one_at_a_time:
            await self._start()
            await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def end(self) -> None:
        async with self._one_at_a_time:
            await self._start()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self) -> None:
        if not self.started:
            self.started = True
            headers = self._response.raw_headers
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
