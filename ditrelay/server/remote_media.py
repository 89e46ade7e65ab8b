"""Pictures fetched from addresses that a request names: only from hosts that the server's owner has named.

A request must not make the server talk to itself or to its own network. So a host's name is resolved once, all its
addresses must be public, and the connection goes to what was checked, whatever the name means a moment later.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from ditrelay.errors import InvalidRequest
from ditrelay.server.problem import ApiError
from ditrelay.server.public_addresses import is_public

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3
_CHUNK = 1 << 16

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""The addresses of a host: numbers, as text."""


@dataclass(frozen=True)
class Fetched:
    """A file, and the type that its server says it has, if any."""

    content: bytes
    media_type: str | None


class RemoteMedia:
    """Fetches files from named hosts.

    Args:
        hosts: ``HOST`` for its default ports, ``HOST:PORT`` for that port; in lower case.
        max_bytes: the largest file.
        timeout: seconds for one file, from the look-up of its host on.
        max_fetches: files fetched at a time.
        resolve: looks a host up.
        may_reach: whether the server may connect to an address; public ones where it isn't given.
    """

    def __init__(
        self,
        hosts: Collection[str],
        *,
        max_bytes: int,
        timeout: float = 10.0,
        max_fetches: int = 32,
        resolve: Resolve | None = None,
        may_reach: Callable[[str], bool] | None = None,
    ) -> None:
        self.hosts = tuple(hosts)
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._max_fetches = max_fetches
        self._fetches = 0
        self._resolve = resolve or look_up
        self._may_reach = may_reach or is_public

    async def fetch(self, address: str, *, count: Callable[[int], None]) -> Fetched:
        """The file at ``address``; a redirect is followed where it leads to a host that is allowed, too.

        Args:
            count: told of bytes as they come; what it raises ends the fetch.

        Raises:
            InvalidRequest: naming ``image``: the address is not allowed, or the file could not be had, and why.
            ApiError: 429; too many are fetched at a time.
        """
        if self._fetches >= self._max_fetches:
            raise self._too_many()
        self._fetches += 1
        try:
            return await self._fetch(address, count)
        finally:
            self._fetches -= 1

    async def _fetch(self, address: str, count: Callable[[int], None]) -> Fetched:
        try:
            async with asyncio.timeout(self._timeout):
                for _ in range(1 + _MAX_REDIRECTS):
                    found = await self._ask(address, count)
                    if isinstance(found, Fetched):
                        return found
                    address = found
        except TimeoutError:
            raise InvalidRequest("image", f"its address did not answer within {self._timeout:g} s") from None
        except (OSError, h11.RemoteProtocolError) as error:
            raise InvalidRequest("image", f"its address could not be read: {error}") from error
        raise InvalidRequest("image", f"its address leads on and on; allowed: {_MAX_REDIRECTS} redirects")

    async def _ask(self, address: str, count: Callable[[int], None]) -> Fetched | str:
        """The file, or the address to ask instead."""
        url, port = self._allowed(address)
        host = url.hostname or ""
        async with self._connected(host, port, encrypted=url.scheme == "https") as (reader, writer):
            exchange = h11.Connection(h11.CLIENT)
            target = (url.path or "/") + (f"?{url.query}" if url.query else "")
            headers = [("Host", url.netloc), ("Accept", "image/*"), ("Accept-Encoding", "identity")]
            headers.append(("Connection", "close"))
            try:
                asked = exchange.send(h11.Request(method="GET", target=target, headers=headers))
            except (h11.LocalProtocolError, UnicodeError) as error:
                raise InvalidRequest("image", f"its address is wrong: {error}") from error
            writer.write((asked or b"") + (exchange.send(h11.EndOfMessage()) or b""))
            await writer.drain()
            return await self._answer(exchange, reader, address, count)

    def _allowed(self, address: str) -> tuple[SplitResult, int]:
        try:
            url = urlsplit(address)
            port = url.port or _PORTS.get(url.scheme, 0)
        except ValueError as error:
            raise InvalidRequest("image", f"its address is wrong: {error}") from error
        named = f"{url.hostname}:{port}"
        default = url.hostname in self.hosts and port == _PORTS.get(url.scheme)
        if url.scheme not in _PORTS or url.username is not None or not (default or named in self.hosts):
            raise InvalidRequest("image", f"its address is not allowed; allowed: http(s) at {', '.join(self.hosts)}")
        return url, port

    @asynccontextmanager
    async def _connected(
        self, host: str, port: int, *, encrypted: bool
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        numbers = await self._resolve(host, port)
        if not numbers or not all(self._may_reach(number) for number in numbers):
            raise InvalidRequest("image", f"its host {host} is in a network that no picture is fetched from")
        secure = {"ssl": self._encryption, "server_hostname": host} if encrypted else {}
        reader, writer = await asyncio.open_connection(numbers[0], port, limit=_CHUNK, **secure)  # type: ignore[arg-type]
        try:
            yield reader, writer
        finally:
            writer.transport.abort()  # nothing more is wanted: no farewell that the other side could draw out

    @cached_property
    def _encryption(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    async def _answer(
        self, exchange: h11.Connection, reader: asyncio.StreamReader, address: str, count: Callable[[int], None]
    ) -> Fetched | str:
        head: h11.Response | None = None
        content = bytearray()
        while True:
            event = exchange.next_event()
            if event is h11.NEED_DATA:
                exchange.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Response):
                head = event
                if location := _redirect(head):
                    return _joined(address, location)
                self._check_head(head)
            elif isinstance(event, h11.Data):
                content += event.data
                if len(content) > self._max_bytes:
                    raise self._too_large()
                count(len(event.data))
            elif isinstance(event, h11.EndOfMessage):
                return Fetched(bytes(content), _header(head, b"content-type") if head else None)
            elif not isinstance(event, h11.InformationalResponse):
                raise InvalidRequest("image", "its address broke off")

    def _check_head(self, head: h11.Response) -> None:
        if head.status_code != 200:
            raise InvalidRequest("image", f"its address answered {head.status_code}")
        if (_header(head, b"content-encoding") or "identity") != "identity":
            raise InvalidRequest("image", "its address sends it packed, which was not asked for")
        if int(_header(head, b"content-length") or 0) > self._max_bytes:
            raise self._too_large()

    def _too_many(self) -> ApiError:
        seconds = math.ceil(self._timeout)  # none of those that are fetched now takes longer
        message = f"{self._max_fetches} pictures are fetched from their addresses now; try again in {seconds} s"
        headers = {"Retry-After": str(seconds)}
        return ApiError(429, message, type="rate_limit_error", code="too_many_fetches", headers=headers)

    def _too_large(self) -> InvalidRequest:
        return InvalidRequest("image", f"the file at its address is too large; allowed: {self._max_bytes} bytes")


async def look_up(host: str, port: int) -> list[str]:
    """By the machine's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)
    return [str(address[0]) for _, _, _, _, address in found]


def _joined(address: str, location: str) -> str:
    try:
        return urljoin(address, location)
    except ValueError as error:
        raise InvalidRequest("image", f"its address leads to none: {error}") from error


def _redirect(head: h11.Response) -> str | None:
    return _header(head, b"location") if head.status_code in _REDIRECTS else None


def _header(head: h11.Response, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in head.headers if key == name), None)
