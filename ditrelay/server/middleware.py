"""What happens to every HTTP request, whatever its address: one log line, and who may send it."""

from __future__ import annotations

import hmac
import logging
import re
import socket
import time
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditrelay.runtime.telemetry import CARRIER_HEADERS, called_by
from ditrelay.server import playground
from ditrelay.server.addresses import address_of
from ditrelay.server.problem import cross_site, shorten, strange_host, unauthorized

logger = logging.getLogger(__name__)

# Asked for every second or so by what watches the server.
_POLLED = frozenset({"/health", "/ready", "/metrics", "/v1/jobs", "/v1/topology"})

# Open to all: what watches the server has no key, and the address of a file is a secret of its own.
_OPEN_PATH = "/health"
_OPEN_FILE = re.compile("/v1/images/[^/]+/content")

_READING = frozenset({"GET", "HEAD", "OPTIONS"})

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
            level = logging.DEBUG if _is_noise(scope["path"]) else logging.INFO
            seconds = time.monotonic() - began
            # Quoted: a path may hold a newline, and a log line must stay one line.
            path = quote(shorten(scope["path"], _LOGGED_CHARACTERS))
            logger.log(level, "%s %s -> %d in %.2f s", scope["method"], path, status, seconds)


def _is_noise(path: str) -> bool:
    return path in _POLLED or path.startswith(f"{playground.PREFIX}/")


class ApiKey:
    """Answers 401 to whoever does not send ``Authorization: Bearer KEY``, but for addresses that are open to all."""

    def __init__(self, app: ASGIApp, *, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope) or self._knows_key(scope):
            await self._app(scope, receive, send)
        else:
            await unauthorized().response()(scope, receive, send)

    def _knows_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")  # the scheme's case is free (RFC 9110)
        # In constant time: how long it takes must not tell how much of a guess was right.
        return scheme.lower() == b"bearer" and hmac.compare_digest(key, self._key)


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return path == _OPEN_PATH or _OPEN_FILE.fullmatch(path) is not None or playground.is_open(scope)


class OwnPages:
    """Answers 403 to pages of other web sites: for servers without a key.

    Browsers let any page send forms to a server on its visitor's machine, and say so in ``Sec-Fetch-Site``, which no
    page can change. Other clients have no such header. A site may also let its own name point to the visitor's machine
    (DNS rebinding): then its pages seem to be the server's own and may read, too, but ``Host`` has the site's name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif (name := _strange_name(scope)) is not None:
            await strange_host(name).response()(scope, receive, send)
        elif scope["method"] not in _READING and _is_cross_site(scope):
            await cross_site().response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _strange_name(scope: Scope) -> str | None:
    """By which name, not the machine's own, a loopback address was called; an address is no name."""
    host = Headers(scope=scope).get("host")
    if not host or not _is_loopback(scope.get("server")):
        return None
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return host
    own = {"localhost", socket.gethostname().lower()}
    if address_of(name) is not None or name in own or name.endswith((".localhost", ".local")):
        return None
    return name


def _is_loopback(server: tuple[str, int | None] | None) -> bool:
    address = address_of(server[0]) if server else None
    return address is not None and address.is_loopback


def _is_cross_site(scope: Scope) -> bool:
    return Headers(scope=scope).get("sec-fetch-site") == "cross-site"


class CallersTrace:
    """What is submitted for a request belongs to the trace that its caller names (W3C Trace Context)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        with called_by({name: headers[name] for name in CARRIER_HEADERS if name in headers} or None):
            await self._app(scope, receive, send)
