"""A DiT replica of several ranks: the leader decides, its peers follow command by command.

Only the leader listens to the head. Before each step it sends its peers one command, so that a cancel reaches every
rank at the same step and no collective is left waiting. All collectives of a rank are issued by its lane's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ditrelay.errors import ReplicaBroken
from ditrelay.models.adapter import DenoiseSession, StageAdapter
from ditrelay.runtime.communication.codec import decode_payload, encode_state
from ditrelay.runtime.communication.replica import (
    Begin,
    ReplicaLeader,
    ReplicaPeer,
    Restore,
    Shutdown,
    Step,
    Stop,
    Stopped,
    broadcast_payload,
)
from ditrelay.runtime.payloads import Payload, State
from ditrelay.runtime.pipelines_core.executors.lane import finish_device_work
from ditrelay.runtime.pipelines_core.executors.pipeline_executor import describe
from ditrelay.runtime.pipelines_core.executors.stage_run import free_after
from ditrelay.runtime.request import Request, without_picture

if TYPE_CHECKING:
    from ditrelay.models.adapter import Frames, Give

logger = logging.getLogger(__name__)

# Seconds within which the ranks of a replica must find that all of them failed at the same place.
AGREE_SECONDS = 5.0


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

    def decode(self, requests: Sequence[Request], state: State, give: Give | None = None) -> list[Frames]:
        return self._inner.decode(requests, state, give)

    def begin(self, requests: Sequence[Request], state: State) -> _LedSession:
        request = requests[0]
        ids = [r.request_id for r in requests]
        payload = encode_state(state, batch_id=request.request_id, request_ids=ids)
        self._leader.send(Begin(without_picture(request), payload.header))
        try:
            broadcast_payload(payload, payload.header, self._device)
            return _LedSession(self._inner.begin(requests, state), request.request_id)
        except Exception as error:
            self._agree_on_failure(request.request_id, error)
            raise

    def capture(self, session: DenoiseSession) -> State:
        """That of the leader: all ranks have the same latents between two steps."""
        assert isinstance(session, _LedSession)
        return self._inner.capture(session.inner)

    def preview(self, session: DenoiseSession) -> State:
        """That of the leader."""
        assert isinstance(session, _LedSession)
        return self._inner.preview(session.inner)

    def restore(self, session: DenoiseSession, captured: State) -> None:
        assert isinstance(session, _LedSession)
        request_id = session.request_id
        payload = encode_state(captured, batch_id=request_id, request_ids=[request_id])
        # Off the host: the replica's group moves what is on its devices.
        payload = Payload(payload.header, tuple(tensor.to(self._device) for tensor in payload.tensors))
        self._leader.send(Restore(request_id, payload.header))
        try:
            broadcast_payload(payload, payload.header, self._device)
            self._inner.restore(session.inner, captured)
        except Exception as error:
            session.open = False
            self._agree_on_failure(request_id, error)
            raise

    def step(self, session: DenoiseSession) -> bool:
        assert isinstance(session, _LedSession)
        self._leader.send(Step(session.request_id))
        try:
            return self._inner.step(session.inner)
        except Exception as error:
            session.open = False
            self._agree_on_failure(session.request_id, error)
            raise

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

    def _agree_on_failure(self, request_id: str, error: BaseException) -> None:
        """What fails on every rank alike (a size that does not fit) costs only the request; else the ranks are apart.

        Raises:
            ReplicaBroken: a peer is gone, or waits in a collective that the leader never joined.
        """
        self._leader.send(Stop(request_id, "failed"))
        if not self._leader.all_stopped(request_id, AGREE_SECONDS):
            raise ReplicaBroken(f"the ranks of the replica did not fail alike: {describe(error)}") from error


def follow(peer: ReplicaPeer, adapter: StageAdapter, device: torch.device, stopping: Callable[[], bool]) -> None:
    """A peer's whole life: do what the leader says, in the leader's order, until it (or ``stopping``) ends it."""
    follower = _Follower(peer, adapter, device)
    with torch.no_grad():
        while not stopping():
            command = peer.receive(timeout=1.0)
            if isinstance(command, Shutdown):
                return
            follower.obey(command)


class _Follower:
    """What a peer has of the request that its replica works on: a session, or the error that ended it here."""

    def __init__(self, peer: ReplicaPeer, adapter: StageAdapter, device: torch.device) -> None:
        self._peer = peer
        self._adapter = adapter
        self._device = device
        self._session: DenoiseSession | None = None
        self._error: BaseException | None = None
        self._failed_at = 0.0

    def obey(self, command: Begin | Restore | Step | Stop | None) -> None:
        """Raises ``ReplicaBroken`` where the leader goes on after an error that only this rank had."""
        try:
            match command:
                case Begin(request=request, header=header):
                    payload = broadcast_payload(None, header, self._device)
                    self._session = self._adapter.begin([request], decode_payload(payload))
                case Restore(header=header):
                    payload = broadcast_payload(None, header, self._device)
                    self._adapter.restore(self._running(), decode_payload(payload))
                case Step():
                    self._adapter.step(self._running())
                case Stop(request_id=request_id, reason=reason):
                    self._stop(request_id, answer=reason == "failed")
                case None:
                    self._check_leader_failed_too()
        except ReplicaBroken:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, as on a single rank: its request fails
            logger.debug("the denoise failed on a peer: %s", describe(error))
            self._error, self._failed_at = error, time.monotonic()

    def _running(self) -> DenoiseSession:
        if self._session is None or self._error is not None:
            raise self._broken()
        return self._session

    def _stop(self, request_id: str, *, answer: bool) -> None:
        if self._session is not None:
            self._adapter.abandon(self._session)
        if isinstance(self._error, torch.OutOfMemoryError):
            free_after(self._error)
        self._session = self._error = None
        if answer:
            finish_device_work(self._device)  # no answer while a collective waits on the device
            self._peer.answer(Stopped(request_id))

    def _check_leader_failed_too(self) -> None:
        if self._error is not None and time.monotonic() - self._failed_at > AGREE_SECONDS:
            raise self._broken()

    def _broken(self) -> ReplicaBroken:
        reason = describe(self._error) if self._error is not None else "the leader took a step of no request"
        return ReplicaBroken(f"the ranks of the replica did not fail alike: {reason}")
