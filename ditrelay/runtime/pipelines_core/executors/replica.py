"""A DiT replica of several ranks: the leader decides, its peers follow command by command.

Only the leader listens to the head. Before each step it sends its peers one command, so that a cancel reaches every
rank at the same step and no collective is left waiting. All collectives of a rank are issued by its lane's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ditrelay.models.adapter import DenoiseSession, StageAdapter
from ditrelay.runtime.communication.codec import decode_payload, encode_state
from ditrelay.runtime.communication.replica import (
    Begin,
    ReplicaLeader,
    ReplicaPeer,
    Shutdown,
    Step,
    Stop,
    broadcast_payload,
)
from ditrelay.runtime.payloads import State
from ditrelay.runtime.pipelines_core.executors.pipeline_executor import STAGE_ERRORS, describe
from ditrelay.runtime.request import Request

if TYPE_CHECKING:
    from ditrelay.models.adapter import Frames

logger = logging.getLogger(__name__)


@dataclass
class _LedSession:
    inner: DenoiseSession
    request_id: str
    open: bool = True

    @property
    def total_steps(self) -> int:
        return self.inner.total_steps

    @property
    def steps_done(self) -> int:
        return self.inner.steps_done


class LedAdapter:
    """The leader's adapter: the model's own, with every denoise mirrored on the peers."""

    def __init__(self, inner: StageAdapter, leader: ReplicaLeader, device: torch.device) -> None:
        self._inner = inner
        self._leader = leader
        self._device = device
        self.conditioning_names = inner.conditioning_names
        self.latents_names = inner.latents_names

    def encode(self, requests: Sequence[Request]) -> State:
        return self._inner.encode(requests)

    def decode(self, requests: Sequence[Request], state: State) -> list[Frames]:
        return self._inner.decode(requests, state)

    def begin(self, requests: Sequence[Request], state: State) -> _LedSession:
        request = requests[0]
        ids = [r.request_id for r in requests]
        payload = encode_state(state, batch_id=request.request_id, request_ids=ids)
        self._leader.send(Begin(request, payload.header))
        broadcast_payload(payload, payload.header, self._device)
        try:
            return _LedSession(self._inner.begin(requests, state), request.request_id)
        except BaseException:
            self._leader.send(Stop(request.request_id, "cancelled"))
            raise

    def step(self, session: DenoiseSession) -> bool:
        assert isinstance(session, _LedSession)
        self._leader.send(Step(session.request_id))
        return self._inner.step(session.inner)

    def finish(self, session: DenoiseSession) -> State:
        assert isinstance(session, _LedSession)
        self._stop(session, "done")
        return self._inner.finish(session.inner)

    def abandon(self, session: DenoiseSession) -> None:
        assert isinstance(session, _LedSession)
        self._stop(session, "cancelled")
        self._inner.abandon(session.inner)

    def _stop(self, session: _LedSession, reason: Literal["done", "cancelled"]) -> None:
        if session.open:
            session.open = False
            self._leader.send(Stop(session.request_id, reason))


def follow(peer: ReplicaPeer, adapter: StageAdapter, device: torch.device, stopping: Callable[[], bool]) -> None:
    """A peer's whole life: do what the leader says, in the leader's order, until it (or ``stopping``) ends it."""
    session: DenoiseSession | None = None
    with torch.no_grad():
        while not stopping():
            command = peer.receive(timeout=1.0)
            match command:
                case None:
                    continue
                case Begin(request=request, header=header):
                    payload = broadcast_payload(None, header, device)
                    session = _begin(adapter, request, decode_payload(payload))
                case Step():
                    assert session is not None
                    adapter.step(session)
                case Stop():
                    if session is not None:
                        adapter.abandon(session)
                    session = None
                case Shutdown():
                    return


def _begin(adapter: StageAdapter, request: Request, state: State) -> DenoiseSession | None:
    """A request that the model refuses is refused by every rank alike; its leader says so and sends ``Stop`` next."""
    try:
        return adapter.begin([request], state)
    except STAGE_ERRORS as error:
        logger.debug("request %s could not begin: %s", request.request_id, describe(error))
        return None
