"""What a reverse proxy says of a request: by which address the client came, and by which it called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ditrelay.runtime.http_args import Network, is_prefix
from ditrelay.server.addresses import address_of

if TYPE_CHECKING:
    from ditrelay.runtime.server_args import ServerArgs

_HOSTS = "ditrelay.hosts"  # the key in a request's scope


@dataclass(frozen=True)
class Proxies:
    """Which proxies are believed, and what holds where they say nothing.

    Attributes:
        networks: where they are; ``None``: everywhere.
        sockets: whether whoever comes over a Unix socket is one.
        prefix: the path before every address of the server.
        public: (scheme, host and port) of every address in an answer; ``None``: as the client called.
    """

    networks: tuple[Network, ...] | None = ()
    sockets: bool = False
    prefix: str = ""
    public: tuple[str, str] | None = None

    @classmethod
    def of(cls, args: ServerArgs) -> Proxies:
        return cls(args.proxy_networks, args.trusts_sockets, args.prefix, args.public_origin)

    def trust(self, client: str | None) -> bool:
        """Whether ``client`` is one of them; ``None`` has no address, as over a Unix socket."""
        if client is None:
            return self.sockets
        if self.networks is None:
            return True
        address = address_of(client)
        return address is not None and any(address in network for network in self.networks)


class Forwarded:
    """Puts into each request's scope what a trusted proxy says in its ``X-Forwarded-`` headers.

    ``For`` becomes the client, ``Proto`` and ``Host`` those of the addresses in the answer, and ``Prefix`` the path
    before them, which the proxy may have cut off or not.
    """

    def __init__(self, app: ASGIApp, *, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        client = scope.get("client")
        is_trusted = self._proxies.trust(client[0] if client else None)
        said = _said(headers) if is_trusted else {}
        hosts = [each for each in (headers.get("host"), said.get("host")) if each]
        scope[_HOSTS] = tuple(hosts)
        if said.get("for"):
            scope["client"] = (self._client(said["for"]), 0)
        self._call(scope, said, hosts)
        prefix = said.get("prefix", "").rstrip("/")
        if not _put_before(scope, prefix if is_prefix(prefix) else self._proxies.prefix):
            # The page's own addresses are relative to the slash.
            query = scope.get("query_string", b"").decode("latin-1")
            redirect = RedirectResponse(f"{scope['path']}/" + (f"?{query}" if query else ""))
            return await redirect(scope, receive, send)
        await self._app(scope, receive, send)

    def _client(self, forwarded: str) -> str:
        """The address nearest to the server that is no proxy's: what is before it may be made up."""
        addresses = [_without_port(each.strip()) for each in forwarded.split(",")]
        return next((each for each in reversed(addresses) if not self._proxies.trust(each)), addresses[0])

    def _call(self, scope: Scope, said: dict[str, str], hosts: list[str]) -> None:
        """What the addresses in the answer begin with."""
        scheme, host = self._proxies.public or (said.get("proto", ""), hosts[-1] if hosts else "")
        if scheme in ("http", "https"):
            scope["scheme"] = scheme
        if host and [host] != hosts:
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope["headers"] = [(b"host", host.encode("latin-1")), *others]


def hosts_of(scope: Scope) -> tuple[str, ...]:
    """By which hosts the server was called: the proxy's ``Host``, and what it forwards as the client's."""
    hosts: tuple[str, ...] = scope[_HOSTS]
    return hosts


def route_of(scope: Scope) -> str:
    """The path without what a proxy shows before it."""
    path: str = scope.get("path", "")
    return path.removeprefix(scope.get("root_path", ""))


def _said(headers: Headers) -> dict[str, str]:
    """The first of each header's values: that of the proxy nearest to the client. All of them for ``for``."""
    said = {name: headers.get(f"x-forwarded-{name}", "") for name in ("proto", "host", "prefix")}
    first = {name: value.partition(",")[0].strip() for name, value in said.items()}
    first["proto"] = first["proto"].lower()
    return first | {"for": ",".join(headers.getlist("x-forwarded-for"))}


def _put_before(scope: Scope, prefix: str) -> bool:
    """Let the path begin with ``prefix``. ``False``: it is nothing else, not even with a slash."""
    path: str = scope["path"]
    if prefix and path == prefix:
        return False
    if prefix:
        scope["root_path"] = prefix
        scope["path"] = path if path.startswith(f"{prefix}/") else prefix + path
    return True


def _without_port(address: str) -> str:
    """``192.0.2.7:4711`` and ``[2001:db8::7]:4711`` -> the address."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    host, _, port = address.rpartition(":")
    return host if port.isdigit() and host.count(":") == 0 and host else address
