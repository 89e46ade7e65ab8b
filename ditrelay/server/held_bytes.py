"""Bytes that clients have brought into memory: counted, bounded, and shared out among them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from fastapi import Request
from starlette.types import Message, Receive, Scope

from ditrelay.server.problem import Refused

# A body that lags behind for so long gives its place to another one, where there is none left.
_SLOW_SECONDS = 2.0


@dataclass
class HeldBytes:
    """Bytes of clients that are in memory: bodies of requests that are not answered yet, pictures fetched for them, and
    pictures to start from where nobody waits for the answer. Belongs to the event loop's thread.

    Attributes:
        max_total: what all may have.
        max_client: what one client's address may have.
        nbytes: what all have.
        arriving: the bodies on their way.
        given_up: bodies that were turned away because they were slow and others needed their place.
    """

    max_total: int = 256 << 20
    max_client: int = 192 << 20
    nbytes: int = 0
    arriving: set[Arrival] = field(default_factory=set)
    given_up: int = 0
    _of_clients: dict[str, int] = field(default_factory=dict)

    def of(self, client: str) -> int:
        """What the client with this address has."""
        return self._of_clients.get(client, 0)

    def add(self, client: str, nbytes: int) -> None:
        """Count ``nbytes`` more, or less, of a client."""
        self.nbytes += nbytes
        self._of_clients[client] = self.of(client) + nbytes
        if not self._of_clients[client]:
            del self._of_clients[client]

    @contextmanager
    def holding(self, client: str, nbytes: int) -> Iterator[None]:
        """Around the time for which ``nbytes`` more are held."""
        self.add(client, nbytes)
        try:
            yield
        finally:
            self.add(client, -nbytes)

    def excess(self, counted: RequestBytes) -> str | None:
        """Why there is no room for what ``counted`` has, where no slow body can make room. ``None``: there is."""
        client = counted.client
        if self._is_over(lambda: self.nbytes > self.max_total, counted, lambda other: True):
            return f"requests with {self.max_total} bytes are under way (--max-total-bytes)"
        if self._is_over(lambda: self.of(client) > self.max_client, counted, lambda other: other.client == client):
            return f"requests of your address with {self.max_client} bytes are under way (--max-client-bytes)"
        return None

    def _is_over(
        self, is_over: Callable[[], bool], counted: RequestBytes, may_go: Callable[[RequestBytes], bool]
    ) -> bool:
        if not is_over():
            return False
        slow = [each for each in self.arriving if each.lag >= _SLOW_SECONDS and may_go(each.counted)]
        for arrival in sorted(slow, key=lambda each: each.lag, reverse=True):
            if arrival.counted is not counted:
                arrival.give_up()
                self.given_up += 1
            if not is_over():
                return False
        return True


@dataclass(eq=False)
class RequestBytes:
    """What one request has brought into memory: its body, and the pictures fetched for it.

    Args:
        held: counts what all have.
        client: the address that it came from.
        retry_after: seconds after which a client that is turned away should come back.
    """

    held: HeldBytes
    client: str
    retry_after: Callable[[], int]
    nbytes: int = 0

    def add(self, nbytes: int) -> None:
        """Count ``nbytes`` more. Raises ``Refused`` (429) where all, or this client, have too much."""
        self.nbytes += nbytes
        self.held.add(self.client, nbytes)
        if (reason := self.held.excess(self)) is not None:
            raise self.too_many(reason)

    def too_many(self, reason: str) -> Refused:
        """429; the client should try again."""
        seconds = str(self.retry_after())
        headers = {"Retry-After": seconds}
        return Refused(429, f"{reason}; try again in {seconds} s", code="too_many_bytes", headers=headers)

    def release(self) -> None:
        """The request has ended."""
        self.held.add(self.client, -self.nbytes)
        self.nbytes = 0


class Arrival:
    """A body on its way from the client. Only the time that is waited for it counts.

    Args:
        counted: what it has brought so far.
        rate: bytes a second at which it must come.
        patience: seconds that it may lag behind that.
    """

    def __init__(self, counted: RequestBytes, *, rate: float, patience: float) -> None:
        self.counted = counted
        self._rate = rate
        self._patience = patience
        self._lag = 0.0
        self._waits_since: float | None = None
        self._timeout: asyncio.Timeout | None = None
        self._given_up = False

    @property
    def lag(self) -> float:
        """Seconds that it is behind now."""
        waits = 0.0 if self._waits_since is None else asyncio.get_running_loop().time() - self._waits_since
        return self._lag + waits

    async def next(self, receive: Receive) -> Message:
        """The next part of it.

        Raises:
            Refused: it is too slow (408), or too slow while others need its place (429).
        """
        try:
            return await self._wait(receive)
        except TimeoutError:
            if self._given_up:
                reason = "the server has no room for bodies (--max-total-bytes), and this one comes slowly"
                raise self.counted.too_many(reason) from None
            expected = f"at {self._rate:g} bytes a second (--min-body-rate)"
            reason = f"the rest of the body did not come within {self._patience:g} s {expected} (--body-timeout)"
            raise Refused(408, reason, code="body_timeout") from None

    async def _wait(self, receive: Receive) -> Message:
        if self._given_up:
            raise TimeoutError
        self._waits_since = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._patience - self._lag) as self._timeout:
                message = await receive()
        finally:
            self._lag, self._waits_since, self._timeout = self.lag, None, None
        self._lag = max(0.0, self._lag - len(message.get("body", b"")) / self._rate)
        return message

    def give_up(self) -> None:
        """Its bytes count no longer, and whoever waits for it is told so."""
        self._given_up = True
        self.counted.release()
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def drain(self, receive: Receive, limit: int) -> None:
        """Read on for a while: a client that is still sending would find its connection reset, not the answer."""
        drained = 0
        with suppress(Refused):  # it has been turned away already
            while drained < limit:
                message = await self.next(receive)
                drained += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


_BYTES = "ditrelay.bytes"  # in the scope of a request


def count_bytes(scope: Scope, counted: RequestBytes) -> None:
    """Let the routes find ``counted``."""
    scope[_BYTES] = counted


def bytes_of(request: Request) -> RequestBytes:
    """What ``request`` has brought into memory."""
    counted: RequestBytes = request.scope[_BYTES]
    return counted


def client_of(scope: Scope) -> str:
    """The address that a request came from; an empty one where there is none, as over a Unix socket."""
    client = scope.get("client")
    return client[0] if client else ""
