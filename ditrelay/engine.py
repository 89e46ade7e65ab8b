"""The engine: submit requests, watch them, get pictures. ``async_engine.py`` has its twin for asyncio."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Unpack, overload

from msgspec.structs import replace

from ditrelay.errors import ConfigError, EngineClosed, InvalidRequest, RequestFailed, StartupError, settings_as_fields
from ditrelay.models.card import ModelCard, check_parallel, load_card
from ditrelay.models.loading import preload
from ditrelay.models.plain import plain
from ditrelay.runtime.activity import Watcher
from ditrelay.runtime.admission import Admission
from ditrelay.runtime.code_caches import check_code_caches
from ditrelay.runtime.launcher import LocalLauncher, no_interrupts, resolve_device
from ditrelay.runtime.messages import CancelRequest, Submit
from ditrelay.runtime.metrics import Span, overlap
from ditrelay.runtime.pictures.decoder import PictureDecoder
from ditrelay.runtime.pictures.pictures import Picture, Pictures
from ditrelay.runtime.placement import Advice, advise, measured
from ditrelay.runtime.request import Request, Sampling, SamplingParams, spread
from ditrelay.runtime.request_log import RequestLog
from ditrelay.runtime.run_dir import check_loopback, check_parent
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.start_messages import Restart
from ditrelay.runtime.status import EngineStatus
from ditrelay.runtime.telemetry import Telemetry
from ditrelay.runtime.tickets import Progress, Result, Ticket, cancelled_on_error
from ditrelay.runtime.topology import Topology
from ditrelay.runtime.trace import TraceFiles, display_name, write_trace
from ditrelay.runtime.warm_up import warm_up

if TYPE_CHECKING:
    from ditrelay.runtime.controller import Controller

__all__ = ["Engine", "EngineStatus", "Progress", "Result", "Ticket"]

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 10.0
ADVICE_REQUESTS = 200  # the newest, which ``Engine.advice`` goes by


class Engine:
    """Runs one model over the ranks that ``args`` asks for. All methods may be called from any thread.

    The constructor checks the settings and the model folder and starts nothing; ``start`` (or ``with``) does.

    Args:
        args: the settings; without them one rank draws with the built-in model.

    Attributes:
        trace_files: the timeline that ``close`` has written, where ``args.trace`` asks for one.
        pictures: those that requests start from.

    Raises:
        ConfigError: a setting is wrong, the model folder is incomplete or its family is not supported.

    Example::

        with ditrelay.Engine(ServerArgs(enable_disagg=True, num_gpus=4)) as engine:
            engine.generate("a red apple").save("apple.png")
    """

    @settings_as_fields()
    def __init__(self, args: ServerArgs | None = None) -> None:
        self.args = args = args or ServerArgs()
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
        self._launcher: LocalLauncher | None = None
        self._controller: Controller | None = None
        url = args.traces_url()
        self._telemetry = Telemetry(url, args.model_name) if url else None
        self.pictures = Pictures(
            self.card,
            PictureDecoder(),
            max_bytes=args.max_total_bytes,
            retry_after=lambda: self.status().retry_after,
        )

    # ------------------------------------------------------------ life

    @settings_as_fields()
    def start(self) -> Engine:
        """Start the workers; returns when every rank is up (and, with ``args.warmup``, has done a first request).

        Raises:
            StartupError: a worker could not start; says which one and why.
        """
        if self._controller is not None:
            raise EngineClosed("the engine was started before; make a new one")
        check_parent()
        check_loopback()
        check_code_caches()
        self._launcher = LocalLauncher(self._device_type, ("ditrelay.runtime.worker", *preload(self.card)))
        # Imported here: it takes the head two seconds (torch), during which the workers' imports are under way.
        with no_interrupts():  # half imported, torch can't be imported again
            from ditrelay.runtime.controller import Controller

        if self._closing.is_set():
            raise EngineClosed("the engine was closed while it started")
        self._controller = Controller(self.args, self.card, self.topology, self._launcher, self._device_type, self._log)
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

    @property
    def failure(self) -> str:
        """Why the engine has ended by itself, or nothing. Another one must be made then."""
        return "" if self._controller is None else self._controller.failure

    def restart(self, rank: int) -> None:
        """Start a new process for ``rank`` (for all ranks of its replica) at once, also where it was given up.

        Its requests go on elsewhere or later. Returns at once; ``status`` shows what comes of it.

        Raises:
            InvalidRequest: there is no such rank.
            EngineClosed: the engine does not run.
        """
        if not 0 <= rank < self.topology.world_size:
            raise InvalidRequest("rank", f"{rank} is no rank; allowed: 0 to {self.topology.world_size - 1}")
        if self._controller is None or self._closing.is_set() or self.failure:
            raise EngineClosed(self.failure or "the engine does not run")
        self._controller.post(Restart(rank))

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
            warm_up(self.submit, self.card, self.topology, self.args)
            self._traced_from = time.monotonic()
        self._warm = True
        if self._telemetry is not None:
            self._log.on_end = self._telemetry.start().record

    def close(self, timeout: float = SHUTDOWN_SECONDS, *, at_once: bool = False) -> None:
        """End all workers; requests that are not done fail. May be called twice.

        Args:
            timeout: seconds to wait for the workers' end.
            at_once: a start that is under way is given up, not waited for, nor are the starts of this process's other
                engines; for a program that ends.
        """
        self._closing.set()
        atexit.unregister(self.close)
        self.pictures.close()
        if at_once and not self._warm:
            self._abandon_start()
        if self._controller is not None:
            self._controller.stop(timeout)
        self._log.close("the engine is shut down")
        if self._telemetry is not None:
            self._telemetry.close()
        due, self._trace_due = self._trace_due, None
        if due and self.spans:
            self._write_due_trace(due)

    def _abandon_start(self) -> None:
        if self._controller is not None:
            self._controller.stop(0.0)  # what fails from here on is no fault to be told of
        if self._launcher is not None:
            self._launcher.abandon()

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

    def submit(self, params: SamplingParams, *, client: str = "", patient: bool = False) -> Ticket:
        """Accept one request. A picture to start from is decoded first, in a process of its own.

        Args:
            client: whose it is; one client's pictures are decoded one after the other.
            patient: it waits for its turn as long as it takes: ``--request-timeout`` counts only while it is computed.

        Raises:
            InvalidRequest: a parameter is wrong, or the size is too large for the ranks' memory; names it.
            QueueFull: too many requests wait, or too many pictures are held.
            EngineClosed: the engine does not run.
        """
        resolved, picture = self.resolve(params)
        pixels = self._pixels(resolved, picture, client) if picture else None
        return self.submit_decoded(resolved, picture, pixels, patient=patient)

    def check_picture(self, params: SamplingParams, *, client: str = "") -> SamplingParams:
        """``params`` resolved, for a later ``submit``, where their picture can be decoded. Needs no start.

        Raises:
            InvalidRequest: as ``submit`` does.
            QueueFull: too many pictures are held.
        """
        resolved, picture = self.resolve(params)
        if picture is not None:
            self._pixels(resolved, picture, client)
        return resolved

    def resolve(self, params: SamplingParams) -> tuple[SamplingParams, Picture | None]:
        """``params`` with their defaults, and the picture that they start from. For ``AsyncEngine``."""
        params = plain(params)
        picture = self.pictures.open(params)
        return self.card.resolve(params, picture.file if picture else None), picture

    def _pixels(self, resolved: SamplingParams, picture: Picture, client: str) -> bytes:
        limit = self.args.request_timeout
        with self.pictures.decoding(picture, resolved, client) as decoded:
            try:
                return decoded.result(limit)
            except TimeoutError:
                raise not_decoded(limit) from None

    def submit_decoded(
        self,
        params: SamplingParams,
        picture: Picture | None = None,
        pixels: bytes | None = None,
        *,
        patient: bool = False,
    ) -> Ticket:
        """Accept resolved ``params``, which start from ``pixels`` of ``picture``. For ``AsyncEngine``."""
        if self._controller is None:
            raise EngineClosed("the engine is not started")
        request = Request(request_id=uuid.uuid4().hex[:16], params=params, patient=patient)
        ticket = Ticket(request, self._cancel, picture)
        self._log.open(request, ticket, limit=self.args.max_queue)
        sent = request if pixels is None else replace(request, params=replace(params, image=pixels))
        self._controller.post(Submit(sent))
        return ticket

    def _cancel(self, request_id: str) -> None:
        if self._controller is not None:
            self._controller.post(CancelRequest(request_id))

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self, prompt: str, *, timeout: float | None = None, **sampling: Unpack[Sampling]
    ) -> Result: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[Result]: ...
    @overload
    def generate(
        self, prompt: Sequence[str], *, timeout: float | None = None, **sampling: Unpack[Sampling]
    ) -> list[Result]: ...
    @settings_as_fields()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int | None = None,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Result | list[Result]:
        """Draw and wait. One prompt gives one ``Result``; several prompts or a ``num_images`` give a list, in order.

        ``sampling`` takes the fields of ``SamplingParams``. With one seed for several pictures, number i uses seed + i.

        Raises:
            what ``submit`` and ``Ticket.result`` raise, for the first picture that fails; the others are cancelled.
        """
        many = not isinstance(prompt, str) or num_images is not None
        tickets: list[Ticket] = []
        with cancelled_on_error(tickets):
            for params in spread(prompt, 1 if num_images is None else num_images, **sampling):
                tickets.append(self.submit(params))
            results = [ticket.result(timeout) for ticket in tickets]
        return results if many else results[0]

    # ------------------------------------------------------------ state

    @property
    def ready(self) -> bool:
        """Every rank is up and warm."""
        controller = self._controller
        return self._warm and controller is not None and controller.status.ready and not controller.trouble

    def status(self) -> EngineStatus:
        """At most a tick (0.1 s) old."""
        if self._controller is None:
            return EngineStatus(ready=False, workers=())
        trouble, failure = self._controller.trouble, self._controller.failure
        return self._controller.status.seen(ready=self.ready, trouble=trouble, failure=failure)

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

    def advice(self) -> Advice | None:
        """Whether disaggregation pays off here, by the newest requests; None before there are enough of them."""
        spans = [span for span in self._log.newest_spans(ADVICE_REQUESTS) if span.began >= self._traced_from]
        seconds = measured(spans)
        if seconds is None:
            return None
        return advise(
            self.topology,
            seconds,
            lock_step=not self.args.use_async_comm,
            ranks=[worker.memory for worker in self.status().workers if worker.memory is not None],
            cores=len(os.sched_getaffinity(0)) if self._device_type == "cpu" else None,
        )

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


def not_decoded(limit: float) -> RequestFailed:
    """A picture's turn did not come within ``limit`` seconds."""
    return RequestFailed("with a picture", f"its picture was not decoded within --request-timeout {limit:g} s")
