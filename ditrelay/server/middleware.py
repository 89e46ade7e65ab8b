"""What happens to every HTTP request, whatever its address: one log line, the key, the caller's trace."""

from __future__ import annotations

import hmac
import logging
import re
import time
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditrelay.runtime.telemetry import CARRIER_HEADERS, called_by
from ditrelay.server import playground
from ditrelay.server.problem import shorten, unauthorized
from ditrelay.server.proxies import route_of

logger = logging.getLogger(__name__)

# Asked for every second or so by what watches the server.
_POLLED = frozenset({"/health", "/ready", "/metrics", "/v1/jobs", "/v1/topology"})

# Open to all: what watches the server has no key, and the address of a file is a secret of its own.
_OPEN_PATHS = frozenset({"/health", "/ready"})
_OPEN_FILE = re.compile("/v1/images/[^/]+/content")

# In place of ``Authorization``, as Anthropic's and Azure's clients send it.
_KEY_HEADERS = frozenset({b"x-api-key", b"api-key"})

# Of a path, in the log: whoever has no key can ask for paths of 64 KiB, too.
_LOGGED_CHARACTERS = 200


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
            level = logging.DEBUG if _is_noise(route_of(scope)) else logging.INFO
            seconds = time.monotonic() - began
            # Quoted: a path may hold a newline, and a log line must stay one line.
            path = quote(shorten(scope["path"], _LOGGED_CHARACTERS))
            logger.log(level, "%s %s -> %d in %.2f s", scope["method"], path, status, seconds)


def _is_noise(path: str) -> bool:
    return path in _POLLED or path.startswith(f"{playground.PREFIX}/")


class ApiKey:
    """Answers 401 to whoever does not send the key, but for addresses that are open to all.

    It is in ``Authorization: Bearer KEY``, ``x-api-key`` or ``api-key``; a header that comes twice counts for nothing.
    """

    def __init__(self, app: ASGIApp, *, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope) or self._knows_key(scope):
            await self._app(scope, receive, send)
        else:
            await unauthorized().response()(scope, receive, send)

    def _knows_key(self, scope: Scope) -> bool:
        names = [name for name, _ in scope["headers"]]
        once = [(name, value) for name, value in scope["headers"] if names.count(name) == 1]
        given = [value for name, value in once if name in _KEY_HEADERS]
        for name, value in once:
            scheme, _, key = value.partition(b" ")
            if name == b"authorization" and scheme.lower() == b"bearer":  # the scheme's case is free (RFC 9110)
                given.append(key)
        # In constant time: how long it takes must not tell how much of a guess was right.
        return any([hmac.compare_digest(each, self._key) for each in given])


def _is_open(scope: Scope) -> bool:
    path = route_of(scope)
    return path in _OPEN_PATHS or _OPEN_FILE.fullmatch(path) is not None or playground.is_open(scope)


class CallersTrace:
    """What is submitted for a request belongs to the trace that its caller names (W3C Trace Context)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        with called_by({name: headers[name] for name in CARRIER_HEADERS if name in headers} or None):
            await self._app(scope, receive, send)
