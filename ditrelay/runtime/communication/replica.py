"""Inside one DiT replica: the leader's commands to its peers, and the broadcast of a payload to all members.

A replica's ranks share the default torch.distributed group. Each rank issues its collectives from one thread, in the
order of the leader's commands; so all members always agree on the next collective, also when a request is cancelled.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import msgspec
import torch
import torch.distributed as dist
import zmq

from ditrelay.errors import TransferError
from ditrelay.runtime.communication.codec import allocate, wire_view
from ditrelay.runtime.payloads import Payload, PayloadHeader
from ditrelay.runtime.request import Request

# Commands that a peer has not taken yet; one that is this far behind is dead.
_MAX_BEHIND = 10_000
# How long close() may spend on delivering the last commands.
_LINGER_MS = 1000

StopReason = Literal["done", "cancelled", "failed"]


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Take part in the broadcast of ``request``'s conditioning, then begin its denoise."""

    request: Request
    header: PayloadHeader


class Step(msgspec.Struct, frozen=True, tag=True):
    """Run the next step of ``request_id``."""

    request_id: str


class Restore(msgspec.Struct, frozen=True, tag=True):
    """Take part in the broadcast of how far ``request_id`` came in another process, and go on from there."""

    request_id: str
    header: PayloadHeader


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Free what is kept of ``request_id``. After ``failed`` the peer answers ``Stopped`` once its device is idle."""

    request_id: str
    reason: StopReason


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the process."""


class Stopped(msgspec.Struct, frozen=True, tag=True):
    """A peer's answer: nothing of ``request_id`` runs or waits on it any more."""

    request_id: str


ReplicaCommand = Begin | Restore | Step | Stop | Shutdown


class ReplicaLeader:
    """Sends every command to every peer. Belongs to the leader's compute thread.

    Args:
        addresses: where the peers listen (``ipc://...`` or ``tcp://...``), one each; they need not be up yet.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        for address in addresses:
            socket = self._context.socket(zmq.PAIR)
            socket.sndhwm = _MAX_BEHIND
            socket.linger = _LINGER_MS
            socket.connect(address)
            self._sockets[address] = socket

    def send(self, command: ReplicaCommand) -> None:
        """Queue ``command`` for every peer; does not wait.

        Raises:
            TransferError: a peer takes no commands any more.
        """
        encoded = msgspec.msgpack.encode(command)
        for address, socket in self._sockets.items():
            try:
                socket.send(encoded, zmq.NOBLOCK)
            except zmq.Again as error:
                reason = f"the replica's peer takes no commands ({_MAX_BEHIND} are waiting)"
                raise TransferError(address, reason) from error

    def all_stopped(self, request_id: str, timeout: float) -> bool:
        """Whether every peer answers ``Stopped`` for the request within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        return all(self._stopped(socket, request_id, deadline) for socket in self._sockets.values())

    @staticmethod
    def _stopped(socket: zmq.Socket[bytes], request_id: str, deadline: float) -> bool:
        while socket.poll(max(0, round((deadline - time.monotonic()) * 1000))):
            if msgspec.msgpack.decode(socket.recv(), type=Stopped).request_id == request_id:
                return True
        return False

    def close(self) -> None:
        """Deliver what is queued (for a second at most) and close."""
        self._context.destroy()


class ReplicaPeer:
    """Receives the leader's commands. Belongs to the peer's compute thread.

    Args:
        address: where to listen.
    """

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.rcvhwm = _MAX_BEHIND
        self._socket.linger = _LINGER_MS
        self._socket.bind(address)
        self._decoder = msgspec.msgpack.Decoder(ReplicaCommand)

    def receive(self, timeout: float) -> ReplicaCommand | None:
        """The next command; ``None`` if none comes within ``timeout`` seconds."""
        if not self._socket.poll(int(timeout * 1000)):
            return None
        command: ReplicaCommand = self._decoder.decode(self._socket.recv())
        return command

    def answer(self, stopped: Stopped) -> None:
        """Tell the leader; does not wait."""
        self._socket.send(msgspec.msgpack.encode(stopped), zmq.NOBLOCK)

    def close(self) -> None:
        self._context.destroy(linger=0)


def broadcast_payload(payload: Payload | None, header: PayloadHeader, device: torch.device) -> Payload:
    """Give every member of the replica the leader's payload. A collective of the default group: all call it.

    Args:
        payload: the payload, on the leader (rank 0 of the group); ``None`` on its peers.
        header: the payload's header, on all (it travels in ``Begin``).
        device: where the peers want the tensors.

    Returns:
        The leader's own payload there; on the peers one with new tensors.
    """
    if payload is None:
        payload = Payload(header, allocate(header, device))
    for tensor in payload.tensors:
        if tensor.numel():
            dist.broadcast(wire_view(tensor), src=0)
    return payload
