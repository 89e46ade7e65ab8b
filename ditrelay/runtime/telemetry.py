"""A trace of every request, sent to an OpenTelemetry collector, where an address of one is given.

Needs the packages of the extra ``ditrelay[otel]``; nothing of them is imported where no address is given.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditrelay._version import __version__
from ditrelay.errors import ConfigError
from ditrelay.runtime.metrics import RequestClock, Span
from ditrelay.runtime.request import Request

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer
    from opentelemetry.util.types import AttributeValue

logger = logging.getLogger(__name__)

Carrier = Mapping[str, str]
"""The headers by which a caller's trace is handed on: ``traceparent`` and ``tracestate``."""

CARRIER_HEADERS = ("traceparent", "tracestate")
_UNSENT_REQUESTS = 1000
_MAX_EVENTS = 2000  # a span's steps; the SDK keeps 128 where it isn't told
_EXPORT_SECONDS = 5.0
_CLOSE_SECONDS = 5.0

# What is shown of a request, in order. Transfers are the hand-offs between two stages; send and receive lie in them.
_STAGES = ("encode", "to_dit", "denoise", "to_decoder", "decode")

_caller: ContextVar[Carrier | None] = ContextVar("ditrelay_caller", default=None)


def caller() -> Carrier | None:
    """The trace that what is submitted here and now belongs to."""
    return _caller.get()


@contextlib.contextmanager
def called_by(carrier: Carrier | None) -> Iterator[None]:
    """What is submitted inside belongs to the trace in ``carrier``."""
    token = _caller.set(carrier)
    try:
        yield
    finally:
        _caller.reset(token)


@dataclass(frozen=True)
class EndedRequest:
    """A request that has ended, with all that was done for it; times are monotonic seconds.

    Attributes:
        outcome: ``done``, ``failed`` or ``cancelled``; ``reason`` says why it failed.
        spans: the pieces of work, those of attempts that came to nothing too.
        caller: the trace that it belongs to.
    """

    request: Request
    outcome: str
    reason: str | None
    clock: RequestClock
    ended: float
    spans: tuple[Span, ...]
    caller: Carrier | None


class Telemetry:
    """Sends traces from a thread of its own; what a collector is too slow for is lost, never waited for.

    Args:
        url: where traces are posted, in OTLP over HTTP.
        model: the model's name.

    Raises:
        ConfigError: the packages that it needs are not installed.
    """

    def __init__(self, url: str, model: str) -> None:
        try:
            import opentelemetry.exporter.otlp.proto.http.trace_exporter
            import opentelemetry.sdk.trace  # noqa: F401
        except ImportError as error:
            reason = f"{error}: install the packages with pip install 'ditrelay[otel]', or set no address for traces"
            raise ConfigError("--otlp-endpoint", reason) from None
        self._url = url
        self._model = model
        self._ended: queue.Queue[EndedRequest | None] = queue.Queue(_UNSENT_REQUESTS)
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> Telemetry:
        self._thread.start()
        return self

    def record(self, ended: EndedRequest) -> None:
        """Returns at once; any thread may call it."""
        with contextlib.suppress(queue.Full):
            self._ended.put_nowait(ended)

    def close(self) -> None:
        """Send what is left, within ``_CLOSE_SECONDS``. Without effect where it was never started."""
        if self._thread.ident is None:
            return
        with contextlib.suppress(queue.Full):
            self._ended.put(None, timeout=_CLOSE_SECONDS)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("--otlp-endpoint: %s did not take the last traces within %g s", self._url, _CLOSE_SECONDS)

    # ------------------------------------------------------------ on its thread

    def _run(self) -> None:
        provider = self._provider()
        tracer = provider.get_tracer("ditrelay", __version__)
        while (ended := self._ended.get()) is not None:
            self._send(tracer, ended)
        provider.shutdown()

    def _provider(self) -> TracerProvider:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES count for more than our own name.
        resource = Resource.create({"service.name": "ditrelay", "service.version": __version__})
        resource = resource.merge(OTELResourceDetector().detect())
        provider = TracerProvider(
            resource=resource, shutdown_on_exit=False, span_limits=SpanLimits(max_events=_MAX_EVENTS)
        )
        exporter = OTLPSpanExporter(endpoint=self._url, timeout=_EXPORT_SECONDS)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return provider

    def _send(self, tracer: Tracer, ended: EndedRequest) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        epoch = time.time_ns() - time.monotonic_ns()
        context = TraceContextTextMapPropagator().extract(dict(ended.caller or {}))
        attributes = self._attributes(ended)
        whole = tracer.start_span(
            "request",
            context,
            SpanKind.SERVER,
            attributes | {"ditrelay.outcome": ended.outcome},
            start_time=_nanoseconds(ended.clock.submitted, epoch),
        )
        if ended.outcome == "failed":
            whole.set_status(Status(StatusCode.ERROR, ended.reason))
        inside = set_span_in_context(whole)
        for part in _parts(ended):
            attributes = {} if part.rank is None else {"ditrelay.rank": part.rank}
            span = tracer.start_span(
                part.name, inside, attributes=attributes, start_time=_nanoseconds(part.began, epoch)
            )
            for step, at in enumerate(part.steps, 1):
                span.add_event("step", {"ditrelay.step": step}, _nanoseconds(at, epoch))
            span.end(_nanoseconds(part.ended, epoch))
        whole.end(_nanoseconds(ended.ended, epoch))

    def _attributes(self, ended: EndedRequest) -> dict[str, AttributeValue]:
        """What was asked for; never the prompt, which may be private."""
        params = ended.request.params
        return {
            "ditrelay.request_id": ended.request.request_id,
            "ditrelay.model": self._model,
            "ditrelay.size": f"{params.width}x{params.height}",
            "ditrelay.frames": params.num_frames or 1,
            "ditrelay.steps": params.num_inference_steps or 0,
        }


@dataclass(frozen=True)
class _Part:
    name: str
    rank: int | None
    began: float
    ended: float
    steps: tuple[float, ...] = ()


def _parts(ended: EndedRequest) -> list[_Part]:
    """The stages and hand-offs of a request, and the waiting between them, in order of time."""
    parts = [
        _Part(span.kind, span.rank, span.began, span.ended, span.steps) for span in ended.spans if span.kind in _STAGES
    ]
    began, done = ended.clock.began, ended.clock.ended
    waits = (
        ("queued", ended.clock.submitted, began.get("encode")),
        ("wait_dit", done.get("to_dit", done.get("encode")), began.get("denoise")),
        ("wait_decoder", done.get("to_decoder", done.get("denoise")), began.get("decode")),
    )
    for name, since, until in waits:
        if since is not None and until is not None and until > since:
            parts.append(_Part(name, None, since, until))
    return sorted(parts, key=lambda part: part.began)


def _nanoseconds(at: float, epoch: int) -> int:
    """Monotonic seconds as Unix time."""
    return epoch + round(at * 1e9)
