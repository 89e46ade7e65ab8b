"""A server of the playground in this process: its engine draws nothing, and a test stops, starts and silences it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import uvicorn
from picture_samples import picture
from playground_browser import KEY
from server_fakes import EMOJI, FakeEngine, FakeResult, FakeTicket
from starlette.types import ASGIApp, Receive, Scope, Send

from ditrelay.errors import InvalidRequest
from ditrelay.models.card import ModelCard
from ditrelay.runtime.messages import Started
from ditrelay.runtime.metrics import Timings
from ditrelay.runtime.request import RequestState, SamplingParams
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.tickets import Progress
from ditrelay.server.app import create_app

SECONDS = 30.0
PICTURE = picture(64, 64)
PREVIEW = picture(64, 64, "JPEG")
STEPS = 120  # of which two are told, a second each: two minutes are left


@dataclass(frozen=True)
class DrawnResult(FakeResult):
    """Its file is one that a browser can show."""

    timings: Timings = Timings(encode=0.05, denoise=0.5, decode=0.1, total=0.75)

    @property
    def media_type(self) -> str:
        return "video/mp4" if (self.params.num_frames or 1) > 1 else super().media_type


class DrawnTicket(FakeTicket):
    """``[wait]`` in its prompt: it stands at step 2 of 120 until ``finish``. ``[fail]``: it fails there."""

    def __init__(self, engine: DeskEngine, request_id: str, params: SamplingParams) -> None:
        self._engine = engine
        super().__init__(request_id, params)

    @property
    def ended(self) -> bool:
        return self._ended.done()

    def finish(self) -> None:
        if not self.ended:
            self._ended.set_result(DrawnResult(self.request_id, self.params, self._engine.file))

    def _end(self, error: Exception) -> None:
        super()._end(error)
        self._engine.feed.finished(self.request_id, time.monotonic())

    async def events(self) -> AsyncIterator[Progress]:
        yield Progress(self.request_id, RequestState.QUEUED)
        for step in (0, 1, 2):
            yield Progress(self.request_id, RequestState.DENOISING, step, STEPS, at=float(step))
        if self.params.previews:
            yield Progress(self.request_id, RequestState.DENOISING, 2, STEPS, preview=PREVIEW)
        await asyncio.wait([self._ended])
        yield Progress(self.request_id, RequestState.FAILED if self._ended.exception() else RequestState.DONE)


class DeskEngine(FakeEngine):
    """Checks parameters as the real engine does. What ``[wait]``s is seen at work in the lanes of rank 0."""

    model_card: ModelCard = EMOJI
    file: bytes = PICTURE
    tickets: list[DrawnTicket]

    @property
    def card(self) -> ModelCard:
        return self.model_card

    async def submit(self, params: SamplingParams, **how: object) -> DrawnTicket:
        if params.image is not None and not params.image.startswith(b"\x89PNG"):
            raise InvalidRequest("image", "cannot be read")
        ticket = DrawnTicket(self, f"r{len(self.tickets)}", self.card.resolve(params))
        self.tickets.append(ticket)
        if not ticket.ended:
            now = time.monotonic()
            self.feed.observe(Started(0, ticket.request_id, "denoise", now), now)
        return ticket


class Desk:
    """``with Desk() as desk: desk.url``. On loopback, on a port that it keeps.

    Args:
        key: what it asks for.
        prefix: the path under which it is seen: cut off on the way in, as a proxy does, so that it doesn't know it.
        card, file: what it serves, and what all that it makes looks like.
        args: more settings of the server.

    Attributes:
        engine: of the server that runs now; a new one after ``start``.
    """

    def __init__(
        self, *, key: str | None = KEY, prefix: str = "", card: ModelCard = EMOJI, file: bytes = PICTURE, **args: str
    ) -> None:
        self._args: dict[str, Any] = {"served_model_name": "tiny", "api_key": key, **args}
        self._prefix = prefix
        self._card, self._file = card, file
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}{prefix}/"
        self.engine = DeskEngine()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._speaks = threading.Event()

    def __enter__(self) -> Desk:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, **args: str) -> None:
        """A new server, which knows nothing of the one before."""
        self.engine = DeskEngine(args=ServerArgs(**{**self._args, **args}))
        self.engine.model_card, self.engine.file = self._card, self._file
        self.engine.loaded.set()
        self._speaks.set()
        app = _Way(create_app(self.engine), self._prefix, self._speaks)
        config = uvicorn.Config(
            app, port=self._port, log_config=None, log_level="critical", ws="none", timeout_graceful_shutdown=1
        )
        server = self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + SECONDS
        while not server.started:
            assert time.monotonic() < deadline, f"the server did not start within {SECONDS:g} s"
            time.sleep(0.01)

    def stop(self) -> None:
        """As if it was killed: nothing is told to those that wait."""
        assert self._server is not None and self._thread is not None
        self._server.force_exit = self._server.should_exit = True
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), f"the server did not end within {SECONDS:g} s"

    def silence(self) -> None:
        """From now on no new request is answered, as by a process that is stopped."""
        self._speaks.clear()

    def speak(self) -> None:
        self._speaks.set()

    def finish(self) -> None:
        """End all that waits."""
        assert self.engine.loop is not None
        for ticket in self.engine.tickets:
            self.engine.loop.call_soon_threadsafe(ticket.finish)

    def asked(self, prompt: str) -> list[SamplingParams]:
        """What the server that runs now was asked for with that prompt."""
        return [ticket.params for ticket in self.engine.tickets if ticket.params.prompt == prompt]


class _Way:
    """What lies between a client and the application."""

    def __init__(self, app: ASGIApp, prefix: str, speaks: threading.Event) -> None:
        self._app = app
        self._prefix = prefix
        self._speaks = speaks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            while not self._speaks.is_set():
                await asyncio.sleep(0.05)
            if not scope["path"].startswith(f"{self._prefix}/"):
                await send({"type": "http.response.start", "status": 404, "headers": []})
                return await send({"type": "http.response.body", "body": b"outside of the prefix"})
            path = scope["path"].removeprefix(self._prefix)
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)
