"""The head's record of live requests: their tickets, their moments, and the counts since the start."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Literal

from ditrelay.errors import EngineClosed, InvalidRequest, QueueFull, RequestCancelled, RequestFailed
from ditrelay.runtime.activity import ActivityFeed
from ditrelay.runtime.admission import Admission
from ditrelay.runtime.messages import (
    Decoded,
    Denoised,
    Encoded,
    Received,
    Sent,
    Stage,
    StageFailed,
    Started,
    StepDone,
    WorkerEvent,
    WorkerUp,
)
from ditrelay.runtime.meters import Meters, Readings
from ditrelay.runtime.metrics import RequestClock, Span, SpanKind
from ditrelay.runtime.preview_messages import Previewed
from ditrelay.runtime.request import Request, RequestState
from ditrelay.runtime.telemetry import Carrier, EndedRequest, caller
from ditrelay.runtime.tickets import Progress, Result, Ticket
from ditrelay.runtime.topology import Topology

logger = logging.getLogger(__name__)

_FAILED = RequestState.FAILED
KEPT_REQUESTS = 2000  # whose spans are kept, in a few MB: what a head holds does not grow with the time that it runs
RATE_SAMPLE = 20  # finished requests that the service rate is taken from
_STAGE_OF: dict[type, Stage] = {Encoded: "encode", Denoised: "denoise", Decoded: "decode"}


@dataclass
class _Entry:
    request: Request
    ticket: Ticket
    clock: RequestClock
    caller: Carrier | None
    state: RequestState = RequestState.QUEUED
    media: Decoded | None = None
    steps: list[float] = field(default_factory=list)
    overtook: list[Sent | Received] = field(default_factory=list)  # came before the end of the encode was reported


class KeptSpans:
    """The spans of the newest requests, ``limit`` of them; the oldest request goes with all of its spans."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._of: dict[str, list[tuple[int, Span]]] = {}

    def add(self, span: Span) -> None:
        self._of.setdefault(span.request_id, []).append((self._count, span))
        self._count += 1
        if len(self._of) > self._limit:
            del self._of[next(iter(self._of))]

    def of(self, request_id: str) -> tuple[Span, ...]:
        return tuple(span for _, span in self._of.get(request_id, ()))

    def newest(self, requests: int) -> list[Span]:
        """Those of the newest requests, request by request."""
        return [span for spans in list(self._of.values())[-requests:] for _, span in spans]

    def all(self) -> list[Span]:
        """In the order in which they were added."""
        numbered = [each for spans in self._of.values() for each in spans]
        return [span for _, span in sorted(numbered, key=itemgetter(0))]


class RequestLog:
    """Owned by the controller's thread, but for ``open``, ``counts`` and ``spans``, which any thread may call.

    Args:
        topology: tells which rank denoises, whose free time decides what transfer time is exposed.
        admission: learns from what is observed, and is asked before a request is recorded.

    Attributes:
        activity: what every rank does at the moment.
        on_end: is told of every request that ends.
    """

    def __init__(self, topology: Topology, admission: Admission | None = None) -> None:
        self.activity = ActivityFeed()
        self.on_end: Callable[[EndedRequest], None] | None = None
        self._topology = topology
        self._admission = admission or Admission(topology)
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()
        self._closed: str | None = None
        self._ended: Counter[str] = Counter()
        self._spans = KeptSpans(KEPT_REQUESTS)
        self._decode_ends: deque[float] = deque(maxlen=RATE_SAMPLE)
        self._free_since: dict[int, float] = {}
        self._queued = 0
        self._meters = Meters()

    def open(self, request: Request, ticket: Ticket, *, limit: int) -> None:
        """Record a request before it is submitted.

        Raises:
            EngineClosed: the engine has ended.
            InvalidRequest: it is too large for the ranks' memory.
            QueueFull: ``limit`` requests wait already.
        """
        self._admission.check(request.params)
        now = time.monotonic()
        ticket.report(Progress(request.request_id, RequestState.QUEUED, at=now))  # before anybody could end it
        with self._lock:
            if self._closed is not None:
                raise EngineClosed(self._closed)
            if self._queued >= limit:
                raise QueueFull(limit, self._retry_after())
            self._queued += 1
            self._entries[request.request_id] = _Entry(request, ticket, RequestClock(now), caller())

    def spans(self) -> list[Span]:
        """The spans of the newest ``KEPT_REQUESTS`` requests, in the order in which they were reported."""
        with self._lock:
            return self._spans.all()

    def newest_spans(self, requests: int) -> list[Span]:
        """The spans of the newest ``requests`` requests, request by request."""
        with self._lock:
            return self._spans.newest(requests)

    def counts(self) -> dict[str, int]:
        with self._lock:
            ended = self._ended
            return {
                "queued": self._queued,
                "running": len(self._entries) - self._queued,
                "done": ended["done"],
                "failed": ended["failed"],
                "cancelled": ended["cancelled"],
                "retry_after": self._retry_after(),
            }

    # ------------------------------------------------------------ called by the controller

    def readings(self) -> Readings:
        return self._meters.read()

    def state_changed(self, request_id: str, state: RequestState) -> None:
        entry = self._entries.get(request_id)
        if entry and not state.ended:  # the end is reported with its result, by ``finish``
            with self._lock:
                self._queued += (state is RequestState.QUEUED) - (entry.state is RequestState.QUEUED)
            self._meters.moved(entry.state, state)
            entry.state = state
            now = time.monotonic()
            self.activity.moved(request_id, state, now)
            entry.ticket.report(Progress(request_id, state, at=now))

    def observe(self, event: WorkerEvent) -> None:
        """Record the moments that a worker reports, and what memory its stages took."""
        self._learn(event)
        self._meters.observe(event)
        if not isinstance(event, Started) or event.request_id in self._entries:  # else nothing would end it
            self.activity.observe(event, time.monotonic())
        match event:
            case Encoded(request_id=request_id, rank=rank, began=began, at=at):
                self._span(request_id, rank, "encode", began, at)
                self._catch_up(request_id)
            case Denoised(request_id=request_id, rank=rank, began=began, at=at):
                self._free_since[rank] = at
                self._span(request_id, rank, "denoise", began, at)
            case Decoded(request_id=request_id, rank=rank, began=began, at=at):
                self._span(request_id, rank, "decode", began, at)
                with self._lock:
                    self._decode_ends.append(at)
                if entry := self._entries.get(request_id):
                    entry.media = event
            case Sent() | Received():
                self._transferred(event)
            case StageFailed(rank=rank, stage="denoise", at=at):
                self._free_since[rank] = at
            case Started() | StepDone():
                self._observe_denoise(event)
            case Previewed():
                self._show(event)

    def _learn(self, event: WorkerEvent) -> None:
        match event:
            case WorkerUp(rank=rank, capacity=capacity):
                self._admission.set_capacity(rank, capacity)
            case Encoded() | Denoised() | Decoded():
                entry = self._entries.get(event.request_id)
                if entry and event.memory:
                    self._admission.learn(event.rank, _STAGE_OF[type(event)], entry.request.params, event.memory)

    def _observe_denoise(self, event: Started | StepDone) -> None:
        entry = self._entries.get(event.request_id)
        if entry is None:
            return
        if isinstance(event, StepDone):
            state = RequestState.DENOISING
            entry.steps.append(event.at)
            entry.ticket.report(Progress(event.request_id, state, event.step, event.total, event.at))
        elif event.stage == "denoise":
            entry.clock.replica_free_since = self._free_since.get(event.rank, 0.0)
            entry.steps.clear()

    def _show(self, event: Previewed) -> None:
        """One that comes after the denoise is late: what is shown next is the picture itself."""
        entry = self._entries.get(event.request_id)
        if entry is not None and event.jpeg is not None and entry.state is RequestState.DENOISING:
            place = (event.step, event.total, event.at)
            entry.ticket.report(Progress(event.request_id, RequestState.DENOISING, *place, preview=event.jpeg))

    def finish(
        self, request_id: str, outcome: Literal["done", "failed", "cancelled"], reason: str | None, param: str | None
    ) -> None:
        entry = self._pop(request_id, outcome)
        now = time.monotonic()
        try:
            self._end_ticket(entry, now, outcome, reason, param)
        except Exception as error:  # a defect of ours: the client must not wait for ever
            logger.exception("the result of request %s could not be told", request_id)
            entry.ticket.fail(RequestFailed(request_id, f"its result could not be told: {error}"), _FAILED, now)
        self.activity.finished(request_id, now)
        if self.on_end is not None:
            spans = self._spans.of(request_id)
            try:
                self.on_end(EndedRequest(entry.request, outcome, reason, entry.clock, now, spans, entry.caller))
            except Exception:  # an observer's own fault ends nothing else
                logger.exception("the end of request %s could not be recorded", request_id)

    def _end_ticket(
        self,
        entry: _Entry,
        now: float,
        outcome: Literal["done", "failed", "cancelled"],
        reason: str | None,
        param: str | None,
    ) -> None:
        request_id = entry.request.request_id
        if outcome == "done":
            result = _result(entry, now)
            self._meters.finished(result.timings)
            logger.info("Request completed in %.2f seconds", result.timings.total)
            entry.ticket.succeed(result, now)
        elif outcome == "cancelled":
            logger.info("Request %s cancelled", request_id)
            entry.ticket.fail(RequestCancelled(request_id), RequestState.CANCELLED, now)
        elif param is not None:
            entry.ticket.fail(InvalidRequest(param, reason or "not allowed"), RequestState.FAILED, now)
        else:
            logger.warning("Request %s failed: %s", request_id, reason)
            entry.ticket.fail(RequestFailed(request_id, reason or "no reason given"), RequestState.FAILED, now)

    def reject(self, request_id: str, limit: int) -> None:
        entry = self._pop(request_id, "rejected")
        with self._lock:
            error = QueueFull(limit, self._retry_after())
        entry.ticket.fail(error, RequestState.FAILED, time.monotonic())

    def close(self, reason: str) -> None:
        """End every request that is still open; none may be opened after."""
        with self._lock:
            self._closed = self._closed or reason
            entries, self._entries = list(self._entries.values()), {}
            self._queued = 0
        for entry in entries:
            entry.ticket.fail(EngineClosed(reason), RequestState.FAILED, time.monotonic())
        for entry in entries:
            self.activity.finished(entry.request.request_id, time.monotonic())

    # ------------------------------------------------------------ inside

    def _pop(self, request_id: str, outcome: str) -> _Entry:
        with self._lock:
            self._ended[outcome] += 1
            entry = self._entries.pop(request_id)
            self._queued -= entry.state is RequestState.QUEUED
            return entry

    def _span(self, request_id: str, rank: int, kind: SpanKind, began: float, ended: float) -> None:
        if entry := self._entries.get(request_id):
            entry.clock.span(kind, began, ended)
            steps = tuple(entry.steps) if kind == "denoise" else ()
            self._keep(Span(request_id, rank, kind, began, ended, steps))

    def _keep(self, span: Span) -> None:
        with self._lock:
            self._spans.add(span)
        self.activity.done(span)

    def _transferred(self, event: Sent | Received) -> None:
        entry = self._entries.get(event.request_id)
        if entry is None:
            self._keep(Span(event.request_id, event.rank, _kind(event), event.began, event.at))
        elif entry.state is RequestState.ENCODING:
            entry.overtook.append(event)
        else:
            self._span_transfer(entry, event)

    def _catch_up(self, request_id: str) -> None:
        """The end of an encode is known: what was already done with its product can be told from it."""
        if entry := self._entries.get(request_id):
            overtook, entry.overtook = entry.overtook, []
            for event in overtook:
                if event.at >= entry.clock.began["encode"]:  # else of an attempt before
                    self._span_transfer(entry, event)

    def _span_transfer(self, entry: _Entry, event: Sent | Received) -> None:
        """A hand-off counts from the end of the stage that made the tensors until they are usable.

        A transfer that was asked for before that end did nothing until then.
        """
        kind, request_id = _kind(event), event.request_id
        to_dit = "denoise" in self._topology.roles_of(event.rank if isinstance(event, Received) else event.dst)
        ready = entry.clock.ended.get("encode" if to_dit else "denoise", event.began)
        ended = max(ready, event.at)
        self._keep(Span(request_id, event.rank, kind, max(event.began, ready), ended))
        if kind == "receive":
            self._span(request_id, event.rank, "to_dit" if to_dit else "to_decoder", ready, ended)

    def _retry_after(self) -> int:
        """Seconds until about a tenth of the queue is worked off, by the rate of the newest finished requests.

        Call with the lock held.
        """
        ends, waiting = self._decode_ends, len(self._entries)
        if len(ends) < 2 or ends[-1] <= ends[0]:
            return 1
        rate = (len(ends) - 1) / (ends[-1] - ends[0])
        return max(1, min(60, round(waiting / 10 / rate)))


def _kind(event: Sent | Received) -> SpanKind:
    return "send" if isinstance(event, Sent) else "receive"


def _result(entry: _Entry, now: float) -> Result:
    media = entry.media
    assert media is not None, "a request is done when its media is here"
    return Result(
        request_id=entry.request.request_id,
        params=entry.request.params,
        media=media.media,
        media_type=media.media_type,
        width=media.width,
        height=media.height,
        num_frames=media.num_frames,
        timings=entry.clock.timings(now),
    )
