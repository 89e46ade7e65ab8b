"""Which web sites' pages may use a server, and by which names it may be called."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ditrelay.server.addresses import address_of
from ditrelay.server.problem import cross_site, strange_host
from ditrelay.server.proxies import hosts_of

if TYPE_CHECKING:
    from ditrelay.runtime.server_args import ServerArgs

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


class KnownHosts:
    """Answers 403 where the server is called by a name that is none of its own.

    A site may let its own name point to the visitor's machine or network (DNS rebinding): to the browser its pages are
    then the server's own and may read, too, but ``Host`` has the site's name. An address is no name: a browser that
    calls one is where it seems to be.
    """

    def __init__(self, app: ASGIApp, *, names: Iterable[str] = ()) -> None:
        self._app = app
        given = (*names, "localhost", socket.gethostname().lower())
        self._names = {name.rstrip(".") for name in given if name.strip(".")}
        self._endings = (".localhost", ".local", *(name.lstrip("*") for name in self._names if name[:1] in "*."))
        self._any = "*" in self._names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._any:
            for host in hosts_of(scope):
                if not self._knows(host, scope.get("server")):
                    return await strange_host(host).response()(scope, receive, send)
        await self._app(scope, receive, send)

    def _knows(self, host: str, server: tuple[str, int | None] | None) -> bool:
        place = _place(host, 0)
        if place is None:
            return False
        name = place[0].rstrip(".")
        if address_of(name) is not None or name in self._names or name.endswith(self._endings):
            return True
        if server is not None and name == server[0]:  # it listens under that name: not over TCP
            return True
        # No web site has a name without a dot, but containers and machines of a network have. Where only this machine
        # reaches the server, there are none of these.
        return bool(name) and "." not in name and not _is_here(server)


def known_names(args: ServerArgs) -> tuple[str, ...]:
    """Those by which a server may be called, besides the machine's own."""
    public = _place(args.public_origin[1], 0) if args.public_origin else None
    listening = [host.lower() for host in args.hosts if address_of(host) is None]
    return (*args.allowed_names, *listening, *([public[0]] if public else []))


class OwnPages:
    """Answers 403 to pages of other web sites: for servers without a key.

    Browsers let any page send forms to any server that its visitor reaches. They say so in ``Sec-Fetch-Site``, which no
    page can change; where the server has no https and is not on their machine, only in ``Origin``. Other clients have
    neither. A page that links here, or shows a picture of ours, sends no ``Origin``.

    Args:
        allowed: origins of web sites that may; ``*`` is every one.
        public: the host by which clients reach the server, where it has been told.
    """

    def __init__(self, app: ASGIApp, *, allowed: Iterable[str] = (), public: str | None = None) -> None:
        self._app = app
        self._allowed = frozenset(allowed)
        self._public = (public,) if public else ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (site := self._other_site(scope)) is not None:
            return await cross_site(site).response()(scope, receive, send)
        await self._app(scope, receive, send)

    def _other_site(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        origins = headers.getlist("origin")
        others = [] if "*" in self._allowed else [each for each in origins if each.lower() not in self._allowed]
        if origins and not others:
            return None
        site = headers.get("sec-fetch-site")
        if site in ("same-origin", "none"):
            return None
        if site is None:
            own = (*hosts_of(scope), *self._public)
            return next((each for each in others if not _is_own(each, own)), None)
        if others or scope["method"] not in _READING:
            return others[0] if others else "another web site"
        return None


def _is_own(origin: str, hosts: Iterable[str]) -> bool:
    scheme, found, place = origin.partition("://")
    port = _DEFAULT_PORTS.get(scheme.lower())
    if not found or port is None:
        return False
    # Whether the proxy before the server has https, the server need not know: ports are compared by the origin's.
    page = _place(place, port)
    return page is not None and any(_place(host, port) == page for host in hosts)


def _place(host: str, default_port: int) -> tuple[str, int] | None:
    """``Host`` as name and port; ``None`` where it can be read as none."""
    try:
        url = urlsplit(f"//{host}")
        is_host = url.netloc == host and "@" not in host
        return ((url.hostname or "").lower(), url.port or default_port) if is_host else None
    except ValueError:
        return None


def _is_here(server: tuple[str, int | None] | None) -> bool:
    """Whether only this machine reaches the socket that was called: a loopback address, or a Unix socket."""
    if server is None or server[1] is None:
        return True
    address = address_of(server[0])
    return address is not None and address.is_loopback
