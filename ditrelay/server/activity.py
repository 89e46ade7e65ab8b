"""``GET /v1/activity``: what every rank does, as it happens."""

from __future__ import annotations

import time
from contextlib import aclosing

from fastapi import Response

from ditrelay.runtime.status import ROLES
from ditrelay.runtime.timeline import lanes_of
from ditrelay.runtime.topology import role_name
from ditrelay.server.context import Context, ContextDep
from ditrelay.server.job_schemas import ActivityEvent, Lane, Rank, TopologyEvent
from ditrelay.server.problem import RESPONSES
from ditrelay.server.router import Router
from ditrelay.server.streaming import Emit, EventStream

router = Router(prefix="/v1", tags=["service"], responses=RESPONSES)

_PAST_SECONDS = 30.0
_EVENTS = """The events, by name:

- `topology` {now, model, ranks, lanes}: the first one
- `activity` {now, rank, kind, request_id, job_id, began, ended, step, total_steps}: a piece of work began (`ended` is
  null), came a step further, or ended; at first those of the last seconds

All moments are seconds on one clock; `now` is what it shows when the event is sent.
"""


@router.get(
    "/activity",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}, "description": _EVENTS}},
)
async def follow_activity(context: ContextDep) -> Response:
    """What every rank does, as server-sent events without an end; a slow client may miss some."""
    return EventStream(lambda emit: _tell(context, emit), until=context.closed)


async def _tell(context: Context, emit: Emit) -> None:
    await emit("topology", _topology(context))
    began = time.monotonic()
    async with aclosing(context.engine.activity()) as activities:
        async for each in activities:
            if each.ended is not None and each.ended < began - _PAST_SECONDS:
                continue
            event = ActivityEvent(
                now=time.monotonic(),
                rank=each.rank,
                kind=each.kind,
                request_id=each.request_id,
                job_id=context.board.job_of(each.request_id),
                began=each.began,
                ended=each.ended,
                step=each.step,
                total_steps=each.total_steps,
            )
            await emit("activity", event)


def _topology(context: Context) -> TopologyEvent:
    topology = context.engine.topology
    ranks = []
    for rank in range(topology.world_size):
        roles, leader = topology.roles_of(rank), topology.unit_of(rank).leader
        ranks.append(
            Rank(
                rank=rank,
                role=role_name(roles),
                roles=[role for role in ROLES if role in roles],
                replica=topology.replicas.index(leader) if "denoise" in roles else None,
            )
        )
    lanes = [Lane(rank=rank, kind=kind, title=title, role=role) for rank, kind, title, role in lanes_of(topology)]
    return TopologyEvent(now=time.monotonic(), model=context.model_name, ranks=ranks, lanes=lanes)
