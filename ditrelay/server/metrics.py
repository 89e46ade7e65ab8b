"""``GET /metrics``: the engine's state and its meters, for Prometheus. ``deploy/grafana-dashboard.json`` draws them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastapi import Response

from ditrelay._version import __version__
from ditrelay.runtime.meters import HistogramReading
from ditrelay.server.context import ContextDep
from ditrelay.server.exposition import CONTENT_TYPE, Family, render
from ditrelay.server.held_bytes import HeldBytes
from ditrelay.server.problem import RESPONSES
from ditrelay.server.router import Router
from ditrelay.server.traffic import TURNED_AWAY, Traffic

if TYPE_CHECKING:
    from ditrelay.runtime.status import EngineStatus

router = Router(tags=["service"], responses=RESPONSES)

# Fields of Timings that are one part of a request's way.
STAGES = ("queued", "encode", "to_dit", "wait_dit", "denoise", "to_decoder", "wait_decoder", "decode")
_NONE = HistogramReading()


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(context: ContextDep) -> Response:
    """Counts, gauges and histograms in Prometheus' text format."""
    state = context.engine.status()
    text = render(families(state, model=context.model_name, traffic=context.traffic, held=context.held))
    return Response(text, media_type=CONTENT_TYPE)


def families(
    status: EngineStatus, *, model: str, traffic: Traffic | None = None, held: HeldBytes | None = None
) -> Iterator[Family]:
    """Every metric, also those that have no sample yet. Times in seconds, sizes in bytes, totals since the start."""
    info = Family("ditrelay_info", "gauge", "The version and the served model; always 1.")
    yield info.add(1, version=__version__, model=model)
    yield Family("ditrelay_ready", "gauge", "1: every rank is up and warm and every edge open.").add(status.ready)
    yield from _requests(status)
    yield from _times(status)
    yield from _credits(status)
    yield from _edges(status)
    yield from _ranks(status)
    yield from _clients(traffic or Traffic(), held or HeldBytes())


def _requests(status: EngineStatus) -> Iterator[Family]:
    yield Family("ditrelay_requests_queued", "gauge", "Requests that wait for an encoder.").add(status.queued)
    yield Family("ditrelay_requests_running", "gauge", "Requests between encode and end.").add(status.running)
    ended = Family("ditrelay_requests_total", "counter", "Requests that ended, the warm-up's among them.")
    for outcome, count in (("done", status.done), ("failed", status.failed), ("cancelled", status.cancelled)):
        ended.add(count, outcome=outcome)
    yield ended
    retries = Family("ditrelay_retries_total", "counter", "Requests set back by a lost rank or transfer, by state.")
    for state, count in status.readings.retries.items():
        retries.add(count, state=state.value)
    yield retries


def _times(status: EngineStatus) -> Iterator[Family]:
    read = status.readings.seconds
    stages = Family("ditrelay_stage_seconds", "histogram", "Of done requests, the seconds in each part of their way.")
    for stage in STAGES:
        stages.add_histogram(read.get(stage, _NONE), stage=stage)
    yield stages
    whole = Family("ditrelay_request_seconds", "histogram", "Of done requests, from submission to end.")
    yield whole.add_histogram(read.get("total", _NONE))
    exposed = "Of done requests, the seconds in which a free replica only waited for the transfer."
    family = Family("ditrelay_exposed_transfer_seconds", "histogram", exposed)
    yield family.add_histogram(read.get("exposed_transfer", _NONE))
    busy = Family("ditrelay_busy_seconds_total", "counter", "Seconds that a stage computed (a replica: at its leader).")
    for (rank, stage), seconds in status.readings.busy.items():
        busy.add(seconds, rank=rank, stage=stage)
    yield busy


def _credits(status: EngineStatus) -> Iterator[Family]:
    stalled = Family("ditrelay_credits_stalled", "gauge", "1: there is work, but no credit for what it would make.")
    held = Family("ditrelay_held_payloads", "gauge", "Products that wait at their rank for an edge.")
    for unit in status.units:
        held.add(unit.held, rank=unit.unit.leader)
        for stage in sorted(unit.unit.roles - {"decode"}):  # what a decode makes takes no edge
            stalled.add(stage in unit.stalled, rank=unit.unit.leader, stage=stage)
    yield stalled
    yield held


def _edges(status: EngineStatus) -> Iterator[Family]:
    up = Family("ditrelay_edge_up", "gauge", "1: the edge is open.")
    used = Family("ditrelay_edge_transfers", "gauge", "Payloads on the way over the edge or waiting at its receiver.")
    nbytes = Family("ditrelay_edge_bytes", "gauge", "Bytes of these payloads.")
    window = Family("ditrelay_edge_window", "gauge", "Payloads that there may be at most.")
    for edge in status.edges:
        ends = {"source": edge.edge.src, "target": edge.edge.dst}
        up.add(edge.up, **ends)
        used.add(edge.used, **ends)
        nbytes.add(edge.nbytes, **ends)
        window.add(edge.window, **ends)
    yield from (up, used, nbytes, window)


def _ranks(status: EngineStatus) -> Iterator[Family]:
    up = Family("ditrelay_rank_up", "gauge", "1: the rank is up.")
    restarts = Family("ditrelay_rank_restarts_total", "counter", "Times that the rank's process was replaced.")
    sends = Family("ditrelay_rank_pending_sends", "gauge", "Sends in flight.")
    receives = Family("ditrelay_rank_pending_receives", "gauge", "Receives in flight.")
    memory = Family(
        "ditrelay_rank_memory_bytes", "gauge", "Memory: of the process, of its device, of payloads kept for recovery."
    )
    for worker in status.workers:
        rank, beat = worker.rank, worker.memory
        up.add(worker.state == "up", rank=rank, role=worker.role)
        restarts.add(worker.restarts, rank=rank)
        if beat is None:
            continue
        sends.add(beat.pending_sends, rank=rank)
        receives.add(beat.pending_recvs, rank=rank)
        device = {"device": beat.device_allocated, "device_peak": beat.device_peak, "device_total": beat.device_total}
        for kind, size in {"resident": beat.rss, **device, "kept": beat.kept}.items():
            memory.add(size, rank=rank, kind=kind)
    yield from (up, restarts, sends, receives, memory)


def _clients(traffic: Traffic, held: HeldBytes) -> Iterator[Family]:
    connections = Family("ditrelay_connections", "gauge", "Clients' connections: with a request, or without.")
    yield connections.add(traffic.busy, state="busy").add(traffic.connections - traffic.busy, state="idle")
    yield Family("ditrelay_connections_limit", "gauge", "Connections that there may be at a time.").add(traffic.limit)
    away = Family("ditrelay_connections_turned_away_total", "counter", "Connections cut off or refused, by reason.")
    for reason in TURNED_AWAY:
        away.add(traffic.turned_away[reason], reason=reason)
    yield away
    yield Family("ditrelay_request_bytes", "gauge", "Bytes of requests that are under way.").add(held.nbytes)
    given_up = "Bodies that came slowly and were turned away for others."
    yield Family("ditrelay_bodies_given_up_total", "counter", given_up).add(held.given_up)
    yield Family("ditrelay_unsent_bytes", "gauge", "Bytes of answers that wait for their readers.").add(traffic.unsent)
