"""What happens to every HTTP request, whatever its address: one log line, and a limit on its body."""

from __future__ import annotations

import asyncio
import logging
import time
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

# Asked for every second or so by what watches the server.
_POLLED = frozenset({"/health", "/ready"})

# Read and thrown away, at most, of a body that is too large.
_DRAINED_BYTES = 64 << 20


class AccessLog:
    """Logs method, path, status and seconds of each request when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 500  # what the server answers where the application raised instead

        async def send_and_note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        began = time.monotonic()
        try:
            await self._app(scope, receive, send_and_note)
        finally:
            level = logging.DEBUG if scope["path"] in _POLLED else logging.INFO
            seconds = time.monotonic() - began
            # Quoted: a path may hold a newline, and a log line must stay one line.
            logger.log(level, "%s %s -> %d in %.2f s", scope["method"], quote(scope["path"]), status, seconds)


class BodyLimit:
    """Refuses a body that is too large (413) or that stops coming (408).

    Args:
        max_bytes: the largest body allowed.
        timeout: seconds that the body may stand still.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int = 1 << 20, timeout: float = 30.0) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        received, complete = 0, False

        async def receive_limited() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is the disconnect, and that may take as long as it likes
                return await receive()
            message = await self._next(receive)
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_bytes:
                if not complete:
                    await self._drain(receive)
                raise _refused(413, f"the body is larger than {self._max_bytes} bytes")
            return message

        await self._app(scope, receive_limited, send)

    async def _drain(self, receive: Receive) -> None:
        """Read on for a while: a client that is still sending would find its connection reset, not the answer."""
        drained = 0
        while drained < _DRAINED_BYTES:
            message = await self._next(receive)
            drained += len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    async def _next(self, receive: Receive) -> Message:
        try:
            async with asyncio.timeout(self._timeout):
                return await receive()
        except TimeoutError as error:
            raise _refused(408, f"the rest of the body did not come within {self._timeout:g} s") from error


def _refused(status: int, detail: str) -> HTTPException:
    # Closed, because the rest of the body may still be on its way. An HTTPException is what FastAPI lets through here.
    return HTTPException(status, detail, headers={"Connection": "close"})
