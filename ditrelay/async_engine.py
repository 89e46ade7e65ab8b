"""The engine for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack, overload

from ditrelay.engine import Engine, not_decoded
from ditrelay.errors import START_THREAD, settings_as_fields
from ditrelay.runtime.activity import Activity, follow
from ditrelay.runtime.event_relay import EventRelay
from ditrelay.runtime.pictures.pictures import Picture
from ditrelay.runtime.placement import Advice
from ditrelay.runtime.request import Sampling, SamplingParams, spread
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.status import EngineStatus
from ditrelay.runtime.tickets import Progress, Result, Ticket, cancelled_on_error
from ditrelay.runtime.trace import TraceFiles

__all__ = ["AsyncEngine", "AsyncTicket"]

_SMALL = 1 << 16  # bytes of a picture whose parts are counted in no time; others on a thread


class AsyncTicket:
    """A ``Ticket`` for asyncio."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self.request_id = ticket.request_id
        self.params = ticket.params

    async def result(self, timeout: float | None = None) -> Result:
        """As ``Ticket.result``. Cancelling the awaiting task does not cancel the request; ``cancel`` does."""
        future = asyncio.wrap_future(self._ticket.future)
        future.add_done_callback(_retrieved)
        try:
            return await asyncio.wait_for(asyncio.shield(future), timeout)
        except TimeoutError:
            raise TimeoutError(f"request {self.request_id} has not ended within {timeout} s") from None

    async def events(self) -> AsyncIterator[Progress]:
        """As ``Ticket.events``."""
        relay = EventRelay(asyncio.get_running_loop())
        self._ticket.subscribe(relay.put)
        while True:
            progress = await relay.news.get()
            yield progress
            if progress.state.ended:
                return

    def cancel(self) -> None:
        self._ticket.cancel()


def _retrieved(future: asyncio.Future[Any]) -> None:
    """Nobody may wait for it any more, and asyncio would say that its exception was never retrieved."""
    if not future.cancelled():
        future.exception()


class AsyncEngine:
    """The asyncio twin of ``Engine``: same names, and nothing blocks the event loop."""

    def __init__(self, args: ServerArgs | None = None) -> None:
        self._engine = Engine(args)
        self.args = self._engine.args
        self.card = self._engine.card
        self.topology = self._engine.topology

    async def start(self) -> AsyncEngine:
        """As ``Engine.start``. Where the awaiting task is cancelled, the engine is closed."""
        try:
            # On a thread of its own, which the end of the event loop does not wait for.
            pool = ThreadPoolExecutor(1, START_THREAD)
            await asyncio.get_running_loop().run_in_executor(pool, self._engine.start)
        except asyncio.CancelledError:
            await self.close()
            raise
        return self

    async def close(self, *, at_once: bool = False) -> None:
        """As ``Engine.close``."""
        await asyncio.to_thread(self._engine.close, at_once=at_once)

    async def __aenter__(self) -> AsyncEngine:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def submit(self, params: SamplingParams, *, client: str = "", patient: bool = False) -> AsyncTicket:
        """As ``Engine.submit``. Where the awaiting task is cancelled, so is the decoding of its picture."""
        resolved, picture = await self._resolve(params)
        pixels = await self._pixels(resolved, picture, client) if picture else None
        return AsyncTicket(self._engine.submit_decoded(resolved, picture, pixels, patient=patient))

    async def check_picture(self, params: SamplingParams, *, client: str = "") -> SamplingParams:
        """As ``Engine.check_picture``."""
        resolved, picture = await self._resolve(params)
        if picture is not None:
            await self._pixels(resolved, picture, client)
        return resolved

    async def _resolve(self, params: SamplingParams) -> tuple[SamplingParams, Picture | None]:
        if not isinstance(params.image, bytes) or len(params.image) <= _SMALL:
            return self._engine.resolve(params)
        return await asyncio.to_thread(self._engine.resolve, params)

    async def _pixels(self, resolved: SamplingParams, picture: Picture, client: str) -> bytes:
        limit = self.args.request_timeout
        with self._engine.pictures.decoding(picture, resolved, client) as decoded:
            future = asyncio.wrap_future(decoded)
            future.add_done_callback(_retrieved)
            try:
                return await asyncio.wait_for(asyncio.shield(future), limit)
            except TimeoutError:
                raise not_decoded(limit) from None

    @overload
    async def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self, prompt: str, *, timeout: float | None = None, **sampling: Unpack[Sampling]
    ) -> Result: ...
    @overload
    async def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[Result]: ...
    @overload
    async def generate(
        self, prompt: Sequence[str], *, timeout: float | None = None, **sampling: Unpack[Sampling]
    ) -> list[Result]: ...
    async def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int | None = None,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Result | list[Result]:
        """As ``Engine.generate``."""
        with settings_as_fields():
            return await self._generate(prompt, num_images, timeout, sampling)

    async def _generate(
        self, prompt: str | Sequence[str], num_images: int | None, timeout: float | None, sampling: Sampling
    ) -> Result | list[Result]:
        many = not isinstance(prompt, str) or num_images is not None
        tickets: list[AsyncTicket] = []
        with cancelled_on_error(tickets):
            for params in spread(prompt, 1 if num_images is None else num_images, **sampling):
                tickets.append(await self.submit(params))
            results = await asyncio.gather(*(ticket.result(timeout) for ticket in tickets))
        return results if many else results[0]

    def activity(self) -> AsyncGenerator[Activity, None]:
        """What the ranks do, as ``Engine.watch`` tells it, without an end; a slow reader misses some.

        Close it (``contextlib.aclosing``) when it is left.
        """
        return follow(self._engine.watch)

    async def write_trace(self, path: str | Path) -> TraceFiles:
        """As ``Engine.write_trace``."""
        return await asyncio.to_thread(self._engine.write_trace, path)

    def advice(self) -> Advice | None:
        """As ``Engine.advice``."""
        return self._engine.advice()

    def restart(self, rank: int) -> None:
        """As ``Engine.restart``."""
        self._engine.restart(rank)

    @property
    def ready(self) -> bool:
        return self._engine.ready

    def status(self) -> EngineStatus:
        return self._engine.status()
