"""The HTTP application over an engine, and ``ditrelay serve``: the two on one socket until a signal."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from ditrelay._version import __version__
from ditrelay.errors import ConfigError, DitrelayError, EngineClosed
from ditrelay.runtime import logs
from ditrelay.runtime.descriptors import left_over, raise_limit
from ditrelay.runtime.server_args import API_KEY_VARIABLE
from ditrelay.server import activity, api_docs, edits, images, job_events, metrics, playground, problem, service, videos
from ditrelay.server.body_limit import BodyLimit, BodyRules
from ditrelay.server.connections import Connection, ConnectionRules, Connections
from ditrelay.server.context import Context
from ditrelay.server.listener import Listener
from ditrelay.server.middleware import AccessLog, ApiKey, CallersTrace
from ditrelay.server.origins import KnownHosts, OwnPages, known_names
from ditrelay.server.proxies import Forwarded, Proxies
from ditrelay.server.sockets import is_open_to_others, listening, name_of

if TYPE_CHECKING:
    from ditrelay.async_engine import AsyncEngine
    from ditrelay.runtime.server_args import ServerArgs

logger = logging.getLogger(__name__)

# Once the engine is closed, all that is left is to send what is already there.
_DRAIN_SECONDS = 3

# Of an answer's headers, those that pages of other web sites may read.
_EXPOSED = ("Retry-After", "Preference-Applied", "Content-Disposition", "Accept-Ranges", "Content-Range")

_OF_CONNECTION = 3  # descriptors
_LEAST_CONNECTIONS = 8
_TICKS = 10  # of the server's, in a second


def create_app(engine: AsyncEngine, *, on_failed_start: Callable[[BaseException], None] | None = None) -> FastAPI:
    """The API of one engine that is not started yet.

    The application's lifespan starts the engine beside the server, so that ``/health`` answers while models load, and
    closes it at the end.

    Args:
        engine: does the work.
        on_failed_start: called with the error where the engine does not start. The application itself goes on and
            answers requests for pictures with 503.
    """
    context = Context(engine)
    app = FastAPI(
        title="ditrelay",
        version=__version__,
        description="Pictures and videos from diffusion transformers, by OpenAI's API.",
        lifespan=_lifespan(context, on_failed_start),
        middleware=_middleware(context),
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.context = context
    problem.install(app)
    app.include_router(images.router)
    app.include_router(edits.router)
    app.include_router(videos.router)
    app.include_router(job_events.router)
    app.include_router(activity.router)
    app.include_router(service.router)
    app.include_router(metrics.router)
    app.include_router(api_docs.router)
    playground.install(app)
    return app


def _middleware(context: Context) -> list[Middleware]:
    args = context.engine.args
    key = args.client_key()
    limit = Middleware(
        BodyLimit,
        rules=BodyRules.of(args),
        held=context.held,
        retry_after=lambda: context.engine.status().retry_after,
    )
    traced = [Middleware(CallersTrace)] if args.traces_url() else []
    forwarded = Middleware(Forwarded, proxies=Proxies.of(args))
    return [Middleware(AccessLog), forwarded, *_guards(args, key), limit, *traced]


def _guards(args: ServerArgs, key: str | None) -> list[Middleware]:
    """Who may use the server, the outermost first."""
    guards = []
    if key is None or args.allowed_hosts is not None:
        guards.append(Middleware(KnownHosts, names=known_names(args)))
    if args.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=args.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=_EXPOSED,
        )
        guards.append(cors)
    if key is not None:
        return [*guards, Middleware(ApiKey, key=key)]
    public = args.public_origin[1] if args.public_origin else None
    return [*guards, Middleware(OwnPages, allowed=args.cors_origins, public=public)]


def _lifespan(
    context: Context, on_failed_start: Callable[[BaseException], None] | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    def start_ended(task: asyncio.Task[AsyncEngine]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        context.started = error is None
        if error is None or context.closing:  # a start that the end of the server cut short has not failed
            return
        if isinstance(error, DitrelayError):
            logger.error("the engine did not start: %s", error.on_command_line)
        else:
            logger.error("the engine did not start: %s", error, exc_info=error)
        if on_failed_start is not None:
            on_failed_start(error)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(context.start())
        starting.add_done_callback(start_ended)
        try:
            yield
        finally:
            await context.close()
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)

    return lifespan


def serve(args: ServerArgs) -> int:
    """Serve ``args`` until SIGINT, SIGTERM or SIGHUP. To be called in the main thread.

    Returns:
        The exit code: 0 after a signal, 1 where the engine did not start or ended by itself, 2 where a setting is wrong
        (a taken port). Every reason is in the log, one line on stderr.
    """
    logs.configure(args.log_level)
    try:
        connection_limit(args)
        with listening(args) as sockets:
            return asyncio.run(_serve(args, sockets))
    except ConfigError as error:
        logger.error("%s", error.on_command_line)
        return 2


def connection_limit(args: ServerArgs) -> int:
    """Connections that clients may have at a time: each may need two more descriptors, for a file that it is sent.

    Raises:
        ConfigError: there are too few descriptors for the ranks and a few connections.
    """
    free = left_over(raise_limit(), args.num_gpus, at_least=_LEAST_CONNECTIONS * _OF_CONNECTION)
    return min(args.max_connections, free // _OF_CONNECTION)


async def _serve(args: ServerArgs, sockets: list[socket.socket]) -> int:
    # Imported late: it takes seconds, and a taken port is told before.
    from ditrelay.async_engine import AsyncEngine

    server = EngineServer(AsyncEngine(args))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else it was started by nohup
        loop.add_signal_handler(signal.SIGHUP, server.on_hangup)
    for each in sockets:
        logger.info("Listening on %s", name_of(each))
    if args.client_key() is None and (reached := [name_of(each) for each in sockets if is_open_to_others(each)]):
        logger.warning(
            "whoever reaches %s may use this server: set %s to let in only those who have the key",
            " and ".join(reached),
            API_KEY_VARIABLE,
        )
    await server.serve(sockets=sockets)
    if isinstance(server.failure, ConfigError):
        return 2
    return 1 if server.failure else 0


class EngineServer(uvicorn.Server):
    """A uvicorn server that ends with its engine.

    Attributes:
        failure: why the engine did not start, or has ended by itself.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        app = create_app(engine, on_failed_start=self._fail)
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
        super().__init__(config)
        limit = connection_limit(engine.args)
        if limit < engine.args.max_connections:
            logger.info("%d connections at a time, not --max-connections: ulimit -n allows no more", limit)
        # The engine's thread and the loop's take turns at the interpreter: hand it over ten times sooner.
        sys.setswitchinterval(0.0005)
        self.failure: BaseException | None = None
        self._context: Context = app.state.context
        self._connections = Connections(ConnectionRules.of(engine.args, limit), self._context.traffic)
        self._listener: Listener | None = None
        self._drain_timeout = engine.args.drain_timeout
        self._draining: asyncio.Task[None] | None = None

    def on_signal(self) -> None:
        """The first time, end ``serve`` once the requests that run are answered; the second time, at once."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            self.stop()

    def on_hangup(self) -> None:
        """As the first of the other signals; a terminal that is closed sends it more than once."""
        if self._draining is None:
            self.on_signal()

    def stop(self) -> None:
        """End ``serve`` soon; requests that run are answered with 503."""
        self.should_exit = True

    async def _drain(self) -> None:
        limit = self._drain_timeout
        if running := self._context.running:
            logger.info("Shutting down after %d running requests; a second signal ends them at once", running)
        try:
            async with asyncio.timeout(limit):
                await self._context.drain()
        except TimeoutError:
            logger.warning("%d requests did not end within --drain-timeout %g s", self._context.running, limit)
        self.stop()

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.stop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone: uvicorn would raise them again at the end, and the exit code would not be 0."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """With a listener of our own in place of asyncio's."""
        await super().startup(sockets=[])
        self._listener = Listener(sockets or [], self._connect, self._connections.close_oldest)
        self._listener.start()

    def _connect(self, is_spare: bool) -> Connection:
        shared = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
        return Connection(self._connections, is_spare=is_spare, **shared)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % _TICKS == 0 and self._listener is not None:
            self._connections.sweep()
            self._listener.refill()
        if (failure := self._context.engine.status().failure) and self.failure is None:
            logger.error("%s; the server ends, so that whatever watches over it starts it anew", failure)
            self._fail(EngineClosed(failure))
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the engine first, so that requests that run get an answer instead of a broken connection."""
        logger.info("Shutting down")
        await self._context.close()
        if self._listener is not None:
            self._listener.close()
        await super().shutdown(sockets)
