"""The control plane: typed msgspec messages over ZeroMQ, between the head and its workers on one host.

Each worker process listens on two sockets of its own, for commands and for its events (so nothing meant for a dead
process reaches its successor), and the head connects to both. The head never listens: ZeroMQ ends a process that
listens when no file descriptor is left. Every event carries the incarnation of the process that sent it. The sockets
are files in a directory that only the user may enter, and every message carries the token of its launch: what a
stranger's process sends is thrown away unread.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import msgspec
import zmq
from msgspec import structs

from ditrelay.runtime.messages import Alive, Command, LogLine, WorkerEvent
from ditrelay.runtime.payloads import UNREADABLE

logger = logging.getLogger(__name__)

RECONNECT_MS = 20
BEAT_SECONDS = 1.0
MAX_MESSAGE_BYTES = 1 << 30  # a finished clip; ZeroMQ allocates what a peer announces
_ENVELOPE = struct.Struct("<II")


def events_address(run_dir: str, rank: int, incarnation: int) -> str:
    return f"ipc://{run_dir}/events-{rank}.{incarnation}"


def commands_address(run_dir: str, rank: int, incarnation: int) -> str:
    return f"ipc://{run_dir}/commands-{rank}.{incarnation}"


def replica_address(run_dir: str, rank: int, incarnation: int) -> str:
    """Where a replica's leader reaches its peer ``rank``."""
    return f"ipc://{run_dir}/replica-{rank}.{incarnation}"


class HeadSockets:
    """The head's ends. Used by one thread only.

    Args:
        run_dir: where the sockets are.
        token: of this launch.

    Attributes:
        events: the socket to poll for events.
    """

    def __init__(self, run_dir: str, token: str) -> None:
        self._run_dir = run_dir
        self._token = token.encode()
        self._context = zmq.Context()
        self.events = self._context.socket(zmq.PULL)
        self.events.set_hwm(0)
        self.events.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.events.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._commands: dict[int, zmq.Socket[bytes]] = {}
        self._heard: dict[int, str] = {}  # the address of the events of each rank
        self._next_beat = 0.0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(WorkerEvent)

    def open(self, rank: int, incarnation: int) -> None:
        """A new process is about to start as ``rank``; commands to its predecessor are thrown away."""
        self.close_rank(rank)
        socket = self._commands[rank] = self._context.socket(zmq.PUSH)
        socket.set_hwm(0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        # A connecting socket queues what is sent before its peer is there.
        socket.connect(commands_address(self._run_dir, rank, incarnation))
        address = events_address(self._run_dir, rank, incarnation)
        self.events.connect(address)
        self._heard[rank] = address

    def close_rank(self, rank: int) -> None:
        if socket := self._commands.pop(rank, None):
            socket.close()
        if address := self._heard.pop(rank, None):
            with contextlib.suppress(zmq.ZMQError):
                self.events.disconnect(address)

    def send(self, command: Command) -> None:
        """Queue a command; one to a process that is gone vanishes (its end is an event of its own)."""
        if socket := self._commands.get(command.rank):
            socket.send_multipart((self._token, self._encoder.encode(command)), zmq.NOBLOCK)

    def beat(self) -> None:
        """Tell every worker that the head goes on, once in ``BEAT_SECONDS`` however often it is called."""
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_SECONDS
            for rank in self._commands:
                self.send(Alive(rank))

    def receive_all(self) -> Iterator[tuple[int, int, WorkerEvent]]:
        """What has arrived, without waiting: (rank, incarnation, event)."""
        while True:
            try:
                frames = self.events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            body = opened(frames, self._token, _ENVELOPE.size)
            if body is None:
                continue
            rank, incarnation = _ENVELOPE.unpack(frames[0][len(self._token) :])
            try:
                event = self._decoder.decode(body)
            except UNREADABLE as error:
                logger.error("an event of rank %d can not be read: %s", rank, error)
            else:
                yield rank, incarnation, event

    def flush_and_close(self, linger: float) -> None:
        """Let queued commands go out for at most ``linger`` seconds, then close everything."""
        for socket in self._commands.values():
            socket.close(linger=round(linger * 1000))
        self.events.close(linger=0)
        self._context.term()


class WorkerSockets:
    """A worker's ends: ``commands`` belongs to the control thread, ``emit`` may be called by any thread.

    Events wait here until the head has connected; who listens can not queue them in the socket.
    """

    def __init__(self, run_dir: str, rank: int, incarnation: int, token: str) -> None:
        self._token = token.encode()
        self._context = zmq.Context()
        self.commands = self._context.socket(zmq.PULL)
        self.commands.set_hwm(0)
        self.commands.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.commands.bind(commands_address(run_dir, rank, incarnation))
        self._events = self._context.socket(zmq.PUSH)
        self._events.set_hwm(0)
        self._events.bind(events_address(run_dir, rank, incarnation))
        self._unsent: deque[tuple[bytes, bytes]] = deque()
        self._lock = threading.Lock()
        self._envelope = self._token + _ENVELOPE.pack(rank, incarnation)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Command)

    def emit(self, event: WorkerEvent) -> None:
        """Queue an event to the head; thread-safe, does not wait."""
        try:
            body = self._encoder.encode(event)
        except UnicodeEncodeError:  # a reason may name a file whose name is no UTF-8
            body = self._encoder.encode(_escaped(event))
        with self._lock:
            self._unsent.append((self._envelope, body))
            self._send_waiting()

    def flush(self) -> bool:
        """Send what has waited for the head. Whether nothing waits any more."""
        with self._lock:
            self._send_waiting()
            return not self._unsent

    def _send_waiting(self) -> None:
        while self._unsent and not self._events.closed:
            try:
                self._events.send_multipart(self._unsent[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self._unsent.popleft()

    def receive_all(self) -> Iterator[Command]:
        while True:
            try:
                frames = self.commands.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if (body := opened(frames, self._token)) is None:
                continue
            try:
                command = self._decoder.decode(body)
            except UNREADABLE as error:
                logger.error("a command can not be read: %s", error)
            else:
                yield command

    def close(self, linger: float) -> None:
        """Let queued events go out for at most ``linger`` seconds, then close."""
        until = time.monotonic() + linger
        while not self.flush() and time.monotonic() < until:
            time.sleep(RECONNECT_MS / 1000)
        with self._lock:
            self._events.close(linger=round(linger * 1000))
            self.commands.close(linger=0)
        self._context.term()


class HeadLogHandler(logging.Handler):
    """Sends a worker's log records to the head, which logs them again under the same logger."""

    def __init__(self, rank: int, sockets: WorkerSockets) -> None:
        super().__init__()
        self._rank = rank
        self._sockets = sockets
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._sockets.emit(LogLine(self._rank, record.name, record.levelno, self.format(record)))


def _escaped(event: WorkerEvent) -> WorkerEvent:
    """The event with all that is no Unicode in its texts written as escapes."""
    texts = {name: text for name, text in structs.asdict(event).items() if isinstance(text, str)}
    readable = {name: text.encode(errors="backslashreplace").decode() for name, text in texts.items()}
    return structs.replace(event, **readable)


def opened(frames: Sequence[bytes], token: bytes, extra: int = 0) -> bytes | None:
    """The body of a message of this launch: two frames, the first one the token and ``extra`` bytes. Else ``None``."""
    if len(frames) == 2 and len(frames[0]) == len(token) + extra:
        if hmac.compare_digest(frames[0][: len(token)], token):
            return frames[1]
    logger.warning("a message that is not of this launch was thrown away (%d bytes)", sum(map(len, frames)))
    return None
