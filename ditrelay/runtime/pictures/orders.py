"""What the head and a process that decodes tell each other: a header of fixed size, then bytes; nothing pickled."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

_ANSWER = struct.Struct("<?IIQ")
_PIECE = 1 << 20


@dataclass(frozen=True)
class Order:
    """One picture to decode.

    Attributes:
        content: the file.
        width: of the pixels that are wanted; ``height`` likewise. 0x0: as they are.
        most: pixels that a picture wanted as it is may have; a larger one is made smaller.
        claimed: pixels that the file's header tells.
    """

    content: bytes
    width: int
    height: int
    most: int
    claimed: int

    @property
    def cpu_seconds(self) -> float:
        """Computing time that it may take: a slow file of 100 megapixels has a fifth to a half of it."""
        return 2.0 + 8e-8 * self.claimed

    @property
    def memory(self) -> int:
        """Bytes that it may take: several copies, with four bytes a pixel each."""
        return (256 << 20) + 4 * len(self.content) + 32 * self.claimed


@dataclass(frozen=True)
class Heading:
    """An order without its content, as it arrives."""

    width: int
    height: int
    most: int
    claimed: int
    cpu_seconds: float
    memory: int
    nbytes: int


@dataclass(frozen=True)
class Answer:
    """Pixels, RGB row by row; or where ``is_refused``, the reason as text."""

    is_refused: bool
    width: int
    height: int
    content: bytes


_HEADING = struct.Struct("<IIQQdQQ")


def send_order(connection: socket.socket, order: Order) -> None:
    heading = (order.width, order.height, order.most, order.claimed, order.cpu_seconds, order.memory)
    connection.sendall(_HEADING.pack(*heading, len(order.content)))
    connection.sendall(order.content)


def receive_order(connection: socket.socket) -> tuple[Heading, bytes] | None:
    """``None``: there will be no more."""
    begin = _receive(connection, _HEADING.size)
    if begin is None:
        return None
    heading = Heading(*_HEADING.unpack(begin))
    content = _receive(connection, heading.nbytes)
    return None if content is None else (heading, bytes(content))


def send_answer(connection: socket.socket, answer: Answer) -> None:
    connection.sendall(_ANSWER.pack(answer.is_refused, answer.width, answer.height, len(answer.content)))
    connection.sendall(answer.content)


def receive_answer(connection: socket.socket, most: int) -> Answer | None:
    """``None``: the other side has ended, or says what no answer says; ``most``: bytes that it may have."""
    begin = _receive(connection, _ANSWER.size)
    if begin is None:
        return None
    is_refused, width, height, nbytes = _ANSWER.unpack(begin)
    if nbytes > most or (not is_refused and nbytes != width * height * 3):
        return None
    content = _receive(connection, nbytes)
    return None if content is None else Answer(is_refused, width, height, bytes(content))


def _receive(connection: socket.socket, nbytes: int) -> bytearray | None:
    """``None``: the connection ended first."""
    received = bytearray(nbytes)
    view, place = memoryview(received), 0
    while place < nbytes:
        count = connection.recv_into(view[place : place + _PIECE])
        if not count:
            return None
        place += count
    return received
