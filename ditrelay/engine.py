"""The engine: submit requests, watch them, get pictures. ``Engine`` for threads, ``AsyncEngine`` for asyncio."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import io
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from PIL import Image

from ditrelay.errors import ConfigError, EngineClosed, RequestFailed, StartupError
from ditrelay.models.card import ModelCard, check_parallel, load_card
from ditrelay.models.loading import preload
from ditrelay.runtime.activity import Activity, Watcher, follow
from ditrelay.runtime.admission import Admission
from ditrelay.runtime.event_relay import EventRelay
from ditrelay.runtime.launcher import LocalLauncher, no_interrupts, resolve_device
from ditrelay.runtime.messages import CancelRequest, Submit
from ditrelay.runtime.metrics import Span, overlap
from ditrelay.runtime.request import Request, SamplingParams, spread
from ditrelay.runtime.request_log import RequestLog
from ditrelay.runtime.run_dir import check_parent
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.status import EngineStatus
from ditrelay.runtime.telemetry import Telemetry
from ditrelay.runtime.tickets import Progress, Result, Ticket
from ditrelay.runtime.topology import Topology
from ditrelay.runtime.trace import TraceFiles, display_name, write_trace

if TYPE_CHECKING:
    from ditrelay.runtime.controller import Controller

__all__ = ["Activity", "AsyncEngine", "AsyncTicket", "Engine", "EngineStatus", "Progress", "Result", "Ticket"]

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 10.0


class Engine:
    """Runs one model over the ranks that ``args`` asks for. All methods may be called from any thread.

    The constructor checks the settings and the model folder and starts nothing; ``start`` (or ``with``) does.

    Attributes:
        trace_files: the timeline that ``close`` has written, where ``args.trace`` asks for one.

    Raises:
        ConfigError: a setting is wrong, the model folder is incomplete or its family is not supported.

    Example::

        with ditrelay.Engine(ServerArgs(enable_disagg=True, num_gpus=4)) as engine:
            engine.generate("a red apple").save("apple.png")
    """

    def __init__(self, args: ServerArgs) -> None:
        self.args = args
        self.card: ModelCard = load_card(args.model_path, args.load_format)
        self.topology = Topology.build(args)
        check_parallel(
            self.card,
            sp=args.sp_degree,
            ring=args.sequence_split[1],
            tp=args.tp_size,
            cfg=args.cfg_parallel_degree,
        )
        self._device_type = resolve_device(args)
        self._warm = False
        self._closing = threading.Event()
        self._admission = Admission(self.topology, self.card.size_multiple, self.card.frame_multiple)
        self._log = RequestLog(self.topology, self._admission)
        self.trace_files: TraceFiles | None = None
        self._trace_due = TraceFiles.at(args.trace).check() if args.trace else None
        self._traced_from = 0.0
        self._controller: Controller | None = None
        url = args.traces_url()
        self._telemetry = Telemetry(url, args.model_name) if url else None

    # ------------------------------------------------------------ life

    def start(self) -> Engine:
        """Start the workers; returns when every rank is up (and, with ``args.warmup``, has done a first request).

        Raises:
            StartupError: a worker could not start; says which one and why.
        """
        if self._controller is not None:
            raise EngineClosed("the engine was started before; make a new one")
        check_parent()
        launcher = LocalLauncher(self._device_type, ("ditrelay.runtime.worker", *preload(self.card)))
        # Imported here: it takes the head two seconds (torch), during which the workers' imports are under way.
        with no_interrupts():  # half imported, torch can't be imported again
            from ditrelay.runtime.controller import Controller

        self._controller = Controller(self.args, self.card, self.topology, launcher, self._device_type, self._log)
        try:
            if self._closing.is_set():
                raise EngineClosed("the engine was closed while it started")
            self._controller.start()
            atexit.register(self.close)  # else the interpreter's end would wait for the workers, and they for it
            self._await_start(self._controller)
        except BaseException:
            self.close()
            raise
        return self

    def _await_start(self, controller: Controller) -> None:
        began = time.monotonic()
        try:
            controller.fleet_up.result(self.args.startup_timeout)
        except TimeoutError:
            waiting = ", ".join(f"{w.rank} ({w.role})" for w in controller.status.workers if w.state != "up")
            limit = self.args.startup_timeout
            raise StartupError(f"ranks not up within --startup-timeout {limit:g} s: {waiting or 'edges'}") from None
        logger.info("%d ranks up in %.1f seconds", self.topology.world_size, time.monotonic() - began)
        if self.args.warmup:
            self._warm_up()
        self._warm = True
        if self._telemetry is not None:
            self._log.on_end = self._telemetry.start().record

    def _warm_up(self) -> None:
        """One short request per unit, at once, so that every rank has computed before the first client."""
        count = max(len(self.topology.encoders), len(self.topology.replicas), len(self.topology.decoders))
        image = _grey_picture(self.card) if self.card.needs_image else None
        params = self.card.resolve(SamplingParams(prompt="warm-up", num_inference_steps=2, seed=0, image=image))
        tickets = [self._submit(params) for _ in range(min(count, self.args.max_queue))]
        limit = self.args.startup_timeout
        try:
            for ticket in tickets:
                ticket.result(limit)
        except TimeoutError:
            reason = f"the warm-up was not done within --startup-timeout {limit:g} s; raise it, or set --no-warmup"
            raise StartupError(reason) from None
        except RequestFailed as error:
            raise StartupError(f"the warm-up failed: {error.reason}") from error
        self._traced_from = time.monotonic()

    def close(self, timeout: float = SHUTDOWN_SECONDS) -> None:
        """End all workers; requests that are not done fail. May be called twice."""
        self._closing.set()
        atexit.unregister(self.close)
        if self._controller is not None:
            self._controller.stop(timeout)
        self._log.close("the engine is shut down")
        if self._telemetry is not None:
            self._telemetry.close()
        due, self._trace_due = self._trace_due, None
        if due and self.spans:
            self._write_due_trace(due)

    def _write_due_trace(self, files: TraceFiles) -> None:
        try:
            self.trace_files = self.write_trace(files.perfetto)
        except (ConfigError, OSError) as error:  # what was drawn is not lost for it
            logger.error("the timeline could not be written: %s", error)
        else:
            logger.info("Wrote the timeline: %s", self.trace_files)

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ requests

    def submit(self, params: SamplingParams) -> Ticket:
        """Accept one request.

        Raises:
            InvalidRequest: a parameter is wrong, or the size is too large for the ranks' memory; names it.
            QueueFull: too many requests wait.
            EngineClosed: the engine does not run.
        """
        return self._submit(self.card.resolve(params))

    def _submit(self, params: SamplingParams) -> Ticket:
        if self._controller is None:
            raise EngineClosed("the engine is not started")
        request = Request(request_id=uuid.uuid4().hex[:16], params=params)
        ticket = Ticket(request, self._cancel)
        self._log.open(request, ticket, limit=self.args.max_queue)
        self._controller.post(Submit(request))
        return ticket

    def _cancel(self, request_id: str) -> None:
        if self._controller is not None:
            self._controller.post(CancelRequest(request_id))

    @overload
    def generate(self, prompt: str, *, timeout: float | None = None, **sampling: Any) -> Result: ...
    @overload
    def generate(
        self, prompt: str | Sequence[str], *, num_images: int, timeout: float | None = None, **sampling: Any
    ) -> list[Result]: ...
    @overload
    def generate(self, prompt: Sequence[str], *, timeout: float | None = None, **sampling: Any) -> list[Result]: ...
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int | None = None,
        timeout: float | None = None,
        **sampling: Any,
    ) -> Result | list[Result]:
        """Draw and wait. One prompt gives one ``Result``; several prompts or a ``num_images`` give a list, in order.

        ``sampling`` takes the fields of ``SamplingParams``. With one seed for several pictures, number i uses seed + i.

        Raises:
            what ``submit`` and ``Ticket.result`` raise, for the first picture that fails; the others are cancelled.
        """
        many = not isinstance(prompt, str) or num_images is not None
        tickets: list[Ticket] = []
        with _cancelled_on_error(tickets):
            for params in spread(prompt, 1 if num_images is None else num_images, sampling):
                tickets.append(self.submit(params))
            results = [ticket.result(timeout) for ticket in tickets]
        return results if many else results[0]

    # ------------------------------------------------------------ state

    @property
    def ready(self) -> bool:
        """Every rank is up and warm."""
        return self._warm and self._controller is not None and self._controller.status.ready

    def status(self) -> EngineStatus:
        """At most a tick (0.1 s) old."""
        if self._controller is None:
            return EngineStatus(ready=False, workers=())
        return self._controller.status.with_ready(self.ready)

    @property
    def spans(self) -> list[Span]:
        """The newest pieces of work, for timelines."""
        return self._log.spans()

    def watch(self, callback: Watcher) -> Callable[[], None]:
        """Tell ``callback`` what the ranks do (``ActivityFeed.watch``), until what is returned is called."""
        return self._log.activity.watch(callback)

    def overlap(self) -> float:
        """Share of the working time during which at least two stages computed at once (see ``metrics.overlap``)."""
        return overlap(self.spans)

    def write_trace(self, path: str | Path) -> TraceFiles:
        """Write the timeline of the run so far, the warm-up left out. May be called at any time, also after ``close``.

        Args:
            path: ``.json``, for https://ui.perfetto.dev; a page (``.html``) and a picture (``.png``) go beside it.

        Raises:
            ConfigError: ``path`` has another suffix, or its folder cannot be written to.
            OSError: a file cannot be written.
        """
        model = self.args.served_model_name or display_name(self.args.model_path)
        return write_trace(path, self.spans, self.topology, model=model, since=self._traced_from)


class AsyncTicket:
    """A ``Ticket`` for asyncio."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self.request_id = ticket.request_id
        self.params = ticket.params

    async def result(self, timeout: float | None = None) -> Result:
        """As ``Ticket.result``. Cancelling the awaiting task does not cancel the request; ``cancel`` does."""
        future = asyncio.wrap_future(self._ticket.future)
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


class AsyncEngine:
    """The asyncio twin of ``Engine``: same names, and nothing blocks the event loop."""

    def __init__(self, args: ServerArgs) -> None:
        self._engine = Engine(args)
        self.args = args
        self.card = self._engine.card
        self.topology = self._engine.topology

    async def start(self) -> AsyncEngine:
        """As ``Engine.start``. Where the awaiting task is cancelled, the engine is closed."""
        try:
            await asyncio.to_thread(self._engine.start)
        except asyncio.CancelledError:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.close)

    async def __aenter__(self) -> AsyncEngine:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def submit(self, params: SamplingParams) -> AsyncTicket:
        return AsyncTicket(self._engine.submit(params))

    async def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int | None = None,
        timeout: float | None = None,
        **sampling: Any,
    ) -> Result | list[Result]:
        """As ``Engine.generate``."""
        many = not isinstance(prompt, str) or num_images is not None
        tickets: list[AsyncTicket] = []
        with _cancelled_on_error(tickets):
            for params in spread(prompt, 1 if num_images is None else num_images, sampling):
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

    @property
    def ready(self) -> bool:
        return self._engine.ready

    def status(self) -> EngineStatus:
        return self._engine.status()


@contextlib.contextmanager
def _cancelled_on_error(tickets: Sequence[Ticket | AsyncTicket]) -> Iterator[None]:
    """What raises inside ends all of them: nobody else has them, and they would keep the ranks from other work."""
    try:
        yield
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise


def _grey_picture(card: ModelCard) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (card.default_width, card.default_height), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()
