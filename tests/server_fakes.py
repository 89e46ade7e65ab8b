"""An engine that draws nothing, for the tests of the server, and a client for its application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import msgspec

from ditrelay.errors import (
    DitrelayError,
    EngineClosed,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    StartupError,
)
from ditrelay.models.card import ModelCard, load_card
from ditrelay.runtime.activity import Activity, ActivityFeed, follow
from ditrelay.runtime.messages import Heartbeat
from ditrelay.runtime.metrics import Timings
from ditrelay.runtime.placement import Advice
from ditrelay.runtime.request import RequestState, SamplingParams
from ditrelay.runtime.scheduler import EdgeSnapshot
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.status import EngineStatus, WorkerStatus
from ditrelay.runtime.tickets import Progress
from ditrelay.runtime.topology import Edge, Topology
from ditrelay.server.app import create_app

DRAWN_SEED = 1234
ADDRESS = "http://fuzz.test"
EMOJI = load_card("builtin:emoji")


@dataclass(frozen=True)
class FakeResult:
    request_id: str
    params: SamplingParams
    media: bytes
    timings: Timings = Timings(denoise=0.5, total=0.75)

    @property
    def seed(self) -> int:
        return self.params.seed

    @property
    def media_type(self) -> str:
        return f"image/{self.params.output_format or 'png'}"

    @property
    def width(self) -> int:
        return self.params.width or 128

    @property
    def height(self) -> int:
        return self.params.height or 128


class FakeTicket:
    """Ends by ``finish``; a prompt with ``[fail]`` or ``[bad size]`` fails, one with ``[wait]`` waits for a cancel."""

    def __init__(self, request_id: str, params: SamplingParams) -> None:
        self.request_id = request_id
        self.params = params
        self.cancelled = False
        self._ended = asyncio.get_running_loop().create_future()
        if "[fail]" in params.prompt:
            self._end(RequestFailed(request_id, "denoise on rank 0: out of memory"))
        elif "[bad size]" in params.prompt:
            self._end(InvalidRequest("height", "130 is not allowed; allowed: a multiple of 8"))
        elif "[bug]" in params.prompt:
            self._end(ZeroDivisionError("secret"))
        elif "[wait]" not in params.prompt:
            self.finish()

    def finish(self) -> None:
        media = f"PNG of {self.params.prompt} with {self.params.seed}".encode()
        self._ended.set_result(FakeResult(self.request_id, self.params, media))

    def close(self) -> None:
        self._end(EngineClosed("the engine is shut down"))

    def cancel(self) -> None:
        if not self._ended.done():
            self.cancelled = True
            self._end(RequestCancelled(self.request_id))

    async def result(self, timeout: float | None = None) -> FakeResult:
        return await asyncio.shield(self._ended)

    async def events(self) -> AsyncIterator[Progress]:
        yield Progress(self.request_id, RequestState.QUEUED)
        for step in (0, 1, 2):
            yield Progress(self.request_id, RequestState.DENOISING, step, 2)
        await asyncio.wait([self._ended])
        yield Progress(self.request_id, RequestState.FAILED if self._ended.exception() else RequestState.DONE)

    def _end(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)
            self._ended.exception()  # a ticket that nobody waits for is no error


@dataclass
class FakeEngine:
    """The interface of ``AsyncEngine``; ``loaded`` lets ``start`` return, or raise ``failure``."""

    args: ServerArgs = field(default_factory=lambda: ServerArgs(served_model_name="tiny"))
    media: str = "image"
    max_queue: int = 256
    failure: DitrelayError | None = None
    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop | None = None
    closed: bool = False
    tickets: list[FakeTicket] = field(default_factory=list)
    down: dict[int, str] = field(default_factory=dict)
    lost_roles: tuple[tuple[str, str], ...] = ()
    topology: Topology = field(default_factory=lambda: Topology.build(ServerArgs(enable_disagg=True, num_gpus=3)))
    feed: ActivityFeed = field(default_factory=ActivityFeed)
    placement: Advice | None = None
    restarted: list[int] = field(default_factory=list)
    ended: str = ""  # why the engine has ended by itself
    dit_ranks: int = 2

    def advice(self) -> Advice | None:
        return self.placement

    def activity(self) -> AsyncGenerator[Activity, None]:
        return follow(self.feed.watch)

    @property
    def card(self) -> ModelCard:
        return msgspec.structs.replace(EMOJI, media=self.media)

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.loaded.wait()
        if self.failure:
            raise self.failure
        if self.closed:
            raise StartupError("the engine is shut down")

    async def close(self, *, at_once: bool = False) -> None:
        self.closed = True
        self.loaded.set()
        for ticket in self.tickets:
            ticket.close()

    @property
    def ready(self) -> bool:
        return self.loaded.is_set() and not self.down and not self.closed

    def restart(self, rank: int) -> None:
        self.restarted.append(rank)

    def status(self) -> EngineStatus:
        return EngineStatus(
            ready=self.ready,
            workers=(*(self._worker(rank, rank) for rank in range(self.dit_ranks)), self._worker(self.dit_ranks, None)),
            running=len(self.tickets),
            edges=(EdgeSnapshot(Edge(2, 0), True, 3, 1, 2, 500),),
            lost_roles=self.lost_roles,
            trouble=self.ended,
            failure=self.ended,
            retry_after=9,
        )

    async def check_picture(self, params: SamplingParams, *, client: str = "") -> SamplingParams:
        return self.card.resolve(params)

    async def submit(self, params: SamplingParams, *, client: str = "", patient: bool = False) -> FakeTicket:
        if self.closed:
            raise EngineClosed("the engine is closed")
        if not params.prompt:
            raise InvalidRequest("prompt", "must not be empty")
        if params.height is not None and params.height % 8:
            raise InvalidRequest("height", f"{params.height} is not allowed; allowed: a multiple of 8")
        if len(self.tickets) >= self.max_queue:
            raise QueueFull(self.max_queue, 7)
        seed = DRAWN_SEED if params.seed is None else params.seed
        ticket = FakeTicket(f"r{len(self.tickets)}", msgspec.structs.replace(params, seed=seed))
        self.tickets.append(ticket)
        return ticket

    def _worker(self, rank: int, replica: int | None) -> WorkerStatus:
        up = WorkerStatus(
            rank=rank,
            role="non_dit" if replica is None else "dit",
            roles=("encode", "decode") if replica is None else ("denoise",),
            replica=replica,
            state="up" if self.loaded.is_set() else "starting",
            pid=1000 + rank,
            memory=Heartbeat(rank, 0.0, pending_sends=1, kept=70),
        )
        down = rank in self.down
        return replace(up, state="down", reason=self.down[rank], pid=None, restarts=2, memory=None) if down else up


@asynccontextmanager
async def running(engine: FakeEngine, *, loaded: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application over ``engine`` whose lifespan runs."""
    app = create_app(engine)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://pictures.test:8000")
    async with app.router.lifespan_context(app), client:
        if loaded:
            engine.loaded.set()
            await settle()
        yield client


async def settle() -> None:
    """Let tasks that can run, run."""
    for _ in range(10):
        await asyncio.sleep(0)


def post(engine: FakeEngine, **body: object) -> httpx.Response:
    """The answer to one image generation request on a fresh application over ``engine``."""

    async def main() -> httpx.Response:
        async with running(engine) as client:
            return await client.post("/v1/images/generations", json=body)

    return asyncio.run(main())


class CardEngine(FakeEngine):
    """Checks parameters as the real engine does."""

    model_card = EMOJI

    async def submit(self, params: SamplingParams, *, client: str = "", patient: bool = False) -> FakeTicket:
        return await super().submit(self.model_card.resolve(params))


class Server:
    """One application whose lifespan runs, used from synchronous tests.

    Attributes:
        page: its OpenAPI page.
    """

    def __init__(self, engine: FakeEngine) -> None:
        self._loop = asyncio.new_event_loop()
        self._engine = engine
        self._app = create_app(self._engine)
        self.page: dict[str, Any] = self._app.openapi()
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url=ADDRESS)
        self._life = self._app.router.lifespan_context(self._app)
        self._loop.run_until_complete(self._start())

    async def _start(self) -> None:
        await self._life.__aenter__()
        self._engine.loaded.set()
        await settle()

    def ask(self, method: str, address: str, **how: Any) -> httpx.Response:
        self._engine.tickets.clear()
        return self._loop.run_until_complete(self._client.request(method, address, **how))

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.run_until_complete(self._life.__aexit__(None, None, None))
        self._loop.close()
