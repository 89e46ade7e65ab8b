"""Three requests on three DiT ranks and one for encode and decode, as the engine would have recorded them."""

from __future__ import annotations

from ditrelay.runtime.metrics import Span, SpanKind
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.timeline import Timeline, build_timeline
from ditrelay.runtime.topology import Topology


def topology(**changes: object) -> Topology:
    return Topology.build(ServerArgs(**{"enable_disagg": True, "num_gpus": 4, **changes}))


def span(request_id: str, rank: int, kind: SpanKind, began: float, ended: float, *steps: float) -> Span:
    return Span(request_id, rank, kind, began, ended, steps)


def one_request(request_id: str, replica: int, at: float = 100.0) -> list[Span]:
    """One second of a request: all that rank 3 and a replica do for it."""
    return [
        span(request_id, 3, "encode", at, at + 0.2),
        span(request_id, replica, "to_dit", at + 0.2, at + 0.25),
        span(request_id, 3, "send", at + 0.2, at + 0.25),
        span(request_id, replica, "receive", at + 0.21, at + 0.25),
        span(request_id, replica, "denoise", at + 0.25, at + 0.75, at + 0.4, at + 0.6, at + 0.75),
        span(request_id, replica, "send", at + 0.75, at + 0.8),
        span(request_id, 3, "receive", at + 0.76, at + 0.8),
        span(request_id, 3, "to_decoder", at + 0.75, at + 0.8),
        span(request_id, 3, "decode", at + 0.8, at + 1.0),
    ]


RUN = [*one_request("a", 0), *one_request("b", 1, 100.2), *one_request("c", 0, 100.5)]


def timeline(spans: list[Span] | None = None, **changes: object) -> Timeline:
    return build_timeline(RUN if spans is None else spans, topology(), model="flux", **changes)  # type: ignore[arg-type]
