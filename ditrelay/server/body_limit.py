"""Every request's body on its way in: how large, how fast, and how many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditrelay.server.encodings import Inflater, JsonSize, check_encoding
from ditrelay.server.held_bytes import Arrival, HeldBytes, RequestBytes, client_of, count_bytes
from ditrelay.server.problem import Refused
from ditrelay.server.proxies import route_of

if TYPE_CHECKING:
    from ditrelay.runtime.server_args import ServerArgs

# Whose bodies may hold a picture.
_UPLOADS = frozenset({"/v1/images/edits", "/v1/videos"})

_FORM = "multipart/form-data"

# Read and thrown away, at most, of a body that is refused.
_DRAINED_BYTES = 64 << 20


@dataclass(frozen=True)
class BodyRules:
    """What a body may be.

    Attributes:
        max_bytes: the largest body.
        max_upload: the same at the addresses that take pictures.
        max_json: of a JSON body, the bytes outside of its strings (see ``JsonSize``).
        rate: bytes a second at which it must come.
        timeout: seconds that it may lag behind that.
    """

    max_bytes: int = 1 << 20
    max_upload: int = 32 << 20
    max_json: int = 512 << 10
    rate: float = 4 << 10
    timeout: float = 30.0

    @classmethod
    def of(cls, args: ServerArgs) -> BodyRules:
        return cls(
            args.max_request_bytes, args.largest_body, args.max_json_bytes, args.min_body_rate, args.body_timeout
        )

    def check_size(self, received: int, *, is_upload: bool) -> None:
        """Raises ``Refused`` (413)."""
        limit = self.max_upload if is_upload else self.max_bytes
        if received > limit:
            flag = "--max-upload-bytes" if is_upload else "--max-request-bytes"
            raise Refused(413, f"the body is larger than {limit} bytes ({flag})", code="body_too_large")


class BodyLimit:
    """Refuses a body that is too large (413), too slow (408), one too many at a time (429), or packed in a way that is
    not known (415); unpacks gzip.

    One whose client leaves in the middle is 499 in the log, nginx's status for it, and no fault of the server's.

    Args:
        rules: what a body may be.
        held: counts what is held, also by others; one of its own where it isn't given.
        retry_after: seconds after which a client that is turned away should come back.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        rules: BodyRules | None = None,
        held: HeldBytes | None = None,
        retry_after: Callable[[], int] = lambda: 1,
    ) -> None:
        self._app = app
        self._rules = rules or BodyRules()
        self._held = held or HeldBytes()
        self._retry_after = retry_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(raw=scope.get("headers", []))
        try:
            is_packed = check_encoding(headers.get("content-encoding", ""))
        except Refused as error:
            return await error.described().response()(scope, receive, send)
        counted = RequestBytes(self._held, client_of(scope), self._retry_after)
        incoming = _Incoming(scope, headers, receive, self._rules, counted)
        scope = _unpacked(scope) if is_packed else scope
        count_bytes(scope, counted)
        try:
            await self._app(scope, incoming.receive_packed if is_packed else incoming.receive, send)
        finally:
            incoming.close()


class _Incoming:
    """The body of one request."""

    def __init__(
        self, scope: Scope, headers: Headers, receive: Receive, rules: BodyRules, counted: RequestBytes
    ) -> None:
        self._receive = receive
        self._rules = rules
        self._counted = counted
        self._arrival = Arrival(counted, rate=rules.rate, patience=rules.timeout)
        self._is_upload = route_of(scope) in _UPLOADS
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # Whatever is no form may be read as JSON.
        self._json = None if kind == _FORM else JsonSize(rules.max_json)
        self._inflater = Inflater()
        self._received = 0
        self._declared = _declared(headers)
        self._arrived = False  # all of it, as it is sent
        self._complete = False  # and handed over
        counted.held.arriving.add(self._arrival)

    async def receive(self) -> Message:
        """The application's ``receive``."""
        if self._complete:  # what comes now is the disconnect, and that may take as long as it likes
            return await self._receive()
        return await self._checked(await self._next(), more=not self._arrived)

    async def receive_packed(self) -> Message:
        """The same where the body is gzip."""
        if self._complete:
            return await self._receive()
        while True:
            try:
                if piece := self._inflater.take():
                    await asyncio.sleep(0)  # others have their turn
                    return await self._checked(piece, more=True)
                if self._arrived:
                    self._inflater.end()
                    return await self._checked(b"", more=False)
            except Refused:
                await self._drain()
                raise
            self._inflater.feed(await self._next())

    async def _next(self) -> bytes:
        message = await self._arrival.next(self._receive)
        if message["type"] == "http.disconnect":
            reason = "the client closed the connection before the end of the body"
            raise Refused(499, reason, code="client_closed_request")
        self._arrived = not message.get("more_body", False)
        if self._arrived:
            self._counted.held.arriving.discard(self._arrival)
        body: bytes = message.get("body", b"")
        return body

    async def _checked(self, body: bytes, *, more: bool) -> Message:
        self._received += len(body)
        try:
            self._rules.check_size(max(self._received, self._declared), is_upload=self._is_upload)
            self._counted.add(len(body))
            if self._json is not None:
                self._json.feed(body)
        except Refused:
            await self._drain()
            raise
        self._complete = not more
        return {"type": "http.request", "body": body, "more_body": more}

    async def _drain(self) -> None:
        if not self._arrived and not self._complete:
            await self._arrival.drain(self._receive, _DRAINED_BYTES)
        self._complete = True

    def close(self) -> None:
        self._counted.held.arriving.discard(self._arrival)
        self._counted.release()


def _declared(headers: Headers) -> int:
    """Bytes that are said to come; of a packed body they are fewer than what is in it."""
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() and length.isascii() and len(length) < 20 else 0


def _unpacked(scope: Scope) -> Scope:
    """As if the body had come plain."""
    packed = (b"content-encoding", b"content-length")
    return {**scope, "headers": [each for each in scope["headers"] if each[0] not in packed]}
