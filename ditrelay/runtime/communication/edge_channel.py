"""The messages between the two ends of an edge between GPUs: "ready" one way, over shared memory "taken" the other.

A Unix socket in a folder that only this user may enter. Messages keep their bounds; a peer's death closes it at once.
"""

from __future__ import annotations

import socket
import tempfile
import time
from datetime import timedelta
from typing import TypeVar

import msgspec
from torch._C._distributed_c10d import Store

from ditrelay.runtime.communication.endpoint import Job, LinkDown
from ditrelay.runtime.payloads import UNREADABLE

_KEY = "channel"
_MAX_MESSAGE = 1 << 17
# A receive is asked for when its send is under way, and to fall asleep and wake again costs 0.1 ms of the hand-off.
_AWAKE_SECONDS = 500e-6


class SlotHandle(msgspec.Struct, frozen=True, array_like=True):
    """Where another process finds a slot: ``nbytes`` bytes at ``offset`` in the allocation of ``handle``."""

    handle: bytes
    offset: int
    nbytes: int


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Transfer ``seq`` can be taken: tensors of ``sizes`` bytes. ``slot``: where, if not in the one before."""

    seq: int
    sizes: tuple[int, ...]
    slot: SlotHandle | None = None


class Taken(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The receiver's copy of transfer ``seq`` is complete: the slot may be written again."""

    seq: int


Message = TypeVar("Message", Ready, Taken)


class Channel:
    """One end. ``send`` and ``receive`` belong to one thread; ``shut`` may come from any."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: Ready | Taken, deadline: float) -> None:
        """Raises ``LinkDown``: the peer is gone, or does not read until ``deadline``."""
        try:
            self._connection.settimeout(_remaining(deadline))
            self._connection.send(msgspec.msgpack.encode(message))
        except OSError as error:
            raise _down(error) from error

    def receive(self, kind: type[Message], deadline: float, *, awake: float = 0.0) -> Message:
        """The next message. For ``awake`` seconds it is waited for without going to sleep.

        Raises ``LinkDown``: the peer is gone, or nothing comes until ``deadline``.
        """
        try:
            data = self._receive_awake(time.monotonic() + awake) if awake else None
            if data is None:
                self._connection.settimeout(_remaining(deadline))
                data = self._connection.recv(_MAX_MESSAGE)
        except OSError as error:
            raise _down(error) from error
        if not data:
            raise LinkDown("the other end closed the edge, or its process ended")
        try:
            return msgspec.msgpack.decode(data, type=kind)
        except UNREADABLE as error:
            raise LinkDown(f"the other end says what does not belong here: {error}") from error

    def _receive_awake(self, until: float) -> bytes | None:
        self._connection.setblocking(False)
        while time.monotonic() < until:
            try:
                return self._connection.recv(_MAX_MESSAGE)
            except BlockingIOError:
                time.sleep(0)  # lets other threads run
        return None

    def expect(self, job: Job, deadline: float) -> Ready:
        """The sender's word that ``job`` can be taken.

        Raises ``LinkDown``: as ``receive``, or another transfer was sent.
        """
        sizes = tuple(view.numel() for view in job.views)
        ready = self.receive(Ready, deadline, awake=0.0 if job.wait else _AWAKE_SECONDS)
        if (ready.seq, ready.sizes) != (job.work.seq, sizes):
            sent = f"#{ready.seq} of {ready.sizes} bytes"
            raise LinkDown(f"transfer {sent} was sent, the receiver expects #{job.work.seq} of {sizes} bytes")
        return ready

    def shut(self) -> None:
        """Wake both ends: neither sends or receives any more."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is closed already

    def close(self) -> None:
        self.shut()
        self._connection.close()


def listen(meeting: Store, timeout: float, run_dir: str | None = None) -> Channel:
    """The first end: waits for the second.

    Args:
        meeting: where the second end finds the socket's name.
        timeout: seconds that the second end has.
        run_dir: where the socket's folder is made, so that it goes with that where this process is killed meanwhile;
            the system's temporary folder where there is none.

    Raises:
        TimeoutError: it did not come within ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="edge-", dir=run_dir) as folder, _new_socket(timeout) as listener:
        listener.bind(f"{folder}/{_KEY}")
        listener.listen(1)
        meeting.set(_KEY, f"{folder}/{_KEY}")
        return Channel(listener.accept()[0])


def dial(meeting: Store, timeout: float) -> Channel:
    """The second end: waits for the first.

    Raises:
        RuntimeError: it did not come within ``timeout`` seconds.
        OSError: it is not on this host, or gone again.
    """
    meeting.wait([_KEY], timedelta(seconds=timeout))
    connection = _new_socket(timeout)
    try:
        connection.connect(meeting.get(_KEY).decode())
    except OSError:
        connection.close()
        raise
    return Channel(connection)


def _new_socket(timeout: float) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(timeout)
    return made


def _remaining(deadline: float) -> float:
    """Time left, at least 1 ms: a socket takes zero for "do not wait"."""
    return max(deadline - time.monotonic(), 0.001)


def _down(error: OSError) -> LinkDown:
    if isinstance(error, TimeoutError):
        return LinkDown("the deadline passed", timed_out=True)
    return LinkDown(f"the other end closed the edge, or its process ended ({error.strerror})")
