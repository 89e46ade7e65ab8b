"""The head's and the workers' sockets: what they carry, and what a stranger or a damaged message does to them."""

from __future__ import annotations

import logging
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditrelay.runtime import control_plane
from ditrelay.runtime.control_plane import HeadSockets, WorkerSockets, commands_address, events_address, opened
from ditrelay.runtime.messages import (
    Alive,
    Command,
    Drop,
    Encode,
    Heartbeat,
    LogLine,
    Received,
    StepDone,
    WorkerEvent,
    WorkerFailed,
)
from ditrelay.runtime.payloads import UNREADABLE
from ditrelay.runtime.request import Request, SamplingParams

TOKEN = "0123456789abcdef" * 2
REQUEST = Request(request_id="r1", params=SamplingParams(prompt="a cat", seed=1, num_inference_steps=3))


class Pair:
    """A head and its worker of rank 3, second process."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = str(run_dir)
        self.head = HeadSockets(self.run_dir, TOKEN)
        self.head.open(3, 1)
        self.worker = WorkerSockets(self.run_dir, 3, 1, TOKEN)
        self._context = zmq.Context()

    def stranger(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        socket.connect(address)
        return socket

    def stranger_to_head(self) -> zmq.Socket[bytes]:
        """One that took the place of another rank's worker."""
        self.head.open(4, 0)
        socket = self._context.socket(zmq.PUSH)
        socket.bind(events_address(self.run_dir, 4, 0))
        return socket

    def at_head(self, count: int) -> list[object]:
        def receive_all() -> list[object]:
            self.worker.flush()
            return [event for _, _, event in self.head.receive_all()]

        return self._take(self.head.events, receive_all, count)

    def at_worker(self, count: int) -> list[object]:
        return self._take(self.worker.commands, lambda: list(self.worker.receive_all()), count)

    def _take(self, socket, receive_all, count):
        taken, until = [], time.monotonic() + 5
        while len(taken) < count and time.monotonic() < until:
            socket.poll(50)
            taken += receive_all()
        return taken

    def close(self) -> None:
        self._context.destroy(linger=0)
        self.worker.close(0.0)
        self.head.flush_and_close(0.0)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


def test_commands_and_events_arrive_in_order_with_their_sender(pair: Pair) -> None:
    commands = [Encode(3, REQUEST), Drop(3, "r1")]
    for command in commands:
        pair.head.send(command)
    assert pair.at_worker(2) == commands
    events = [StepDone(3, "r1", 1, 3, 0.5), Heartbeat(3, 1.0, rss=7)]
    for event in events:
        pair.worker.emit(event)
    assert pair.at_head(2) == events


def test_the_head_says_that_it_lives_once_a_second_however_often_its_loop_turns(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tenths in range(25):
        monkeypatch.setattr(control_plane, "time", SimpleNamespace(monotonic=lambda now=tenths / 10: 7.0 + now))
        pair.head.beat()
    pair.head.send(Drop(3, "last"))
    assert pair.at_worker(4) == [Alive(3), Alive(3), Alive(3), Drop(3, "last")]


def test_a_text_that_is_no_unicode_arrives_with_escapes(pair: Pair) -> None:
    """Python hands bytes of a file's name that are no UTF-8 on like this."""
    pair.worker.emit(WorkerFailed(3, "/models/caf\udce9 é is damaged"))
    pair.worker.emit(LogLine(3, "ditrelay", logging.WARNING, "\ud800"))
    assert pair.at_head(2) == [
        WorkerFailed(3, "/models/caf\\udce9 é is damaged"),
        LogLine(3, "ditrelay", logging.WARNING, "\\ud800"),
    ]


def test_what_a_stranger_sends_is_thrown_away_and_the_rest_goes_on(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    envelope = b"\x03\x00\x00\x00\x01\x00\x00\x00"
    event, command = msgspec.msgpack.encode(Heartbeat(3, 1.0)), msgspec.msgpack.encode(Drop(3, "r1"))
    to_head = pair.stranger_to_head()
    to_worker = pair.stranger(commands_address(pair.run_dir, 3, 1))
    wrong = TOKEN[:-1].encode() + b"x"
    for frames in ([envelope, event], [wrong + envelope, event], [b""], [event] * 3, [TOKEN.encode(), event]):
        to_head.send_multipart(frames)
    for frames in ([command], [wrong, command], [b"", command], [TOKEN.encode(), command, command]):
        to_worker.send_multipart(frames)
    time.sleep(0.1)
    with caplog.at_level(logging.WARNING, "ditrelay.runtime.control_plane"):
        pair.worker.emit(StepDone(3, "r1", 1, 3, 0.5))
        pair.head.send(Drop(3, "mine"))
        assert pair.at_head(1) == [StepDone(3, "r1", 1, 3, 0.5)]
        assert pair.at_worker(1) == [Drop(3, "mine")]
        pair.at_head(0), pair.at_worker(0)
    assert "not of this launch" in caplog.text


def test_a_message_that_cannot_be_read_is_told_and_the_next_one_is_read(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    to_head = pair.stranger_to_head()
    to_worker = pair.stranger(commands_address(pair.run_dir, 3, 1))
    to_head.send_multipart([TOKEN.encode() + b"\x03\x00\x00\x00\x01\x00\x00\x00", b"\xc1"])
    to_worker.send_multipart([TOKEN.encode(), b"\xc1"])
    time.sleep(0.1)
    with caplog.at_level(logging.ERROR, "ditrelay.runtime.control_plane"):
        pair.worker.emit(StepDone(3, "r1", 1, 3, 0.5))
        pair.head.send(Drop(3, "r1"))
        assert len(pair.at_head(1)) == len(pair.at_worker(1)) == 1
    assert "an event of rank 3 can not be read" in caplog.text
    assert "a command can not be read" in caplog.text


# ---------------------------------------------------------------- decoding

SAMPLES = [
    msgspec.msgpack.encode(message)
    for message in (Encode(3, REQUEST), Heartbeat(3, 1.0), Received(0, "r1", 3, 1, 7, 0.1, 0.2), Drop(3, "r1"))
]
# Containers and texts that announce more than any memory holds.
GREEDY = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
LIMIT = 4 << 20


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message with some bytes replaced, cut out or put in."""
    body = bytearray(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body)))
        cut = draw(st.integers(0, 3))
        body[at : at + cut] = draw(st.one_of(st.binary(max_size=4), st.sampled_from(GREEDY)))
    return bytes(body)


@pytest.mark.parametrize("kind", [Command, WorkerEvent], ids=["command", "event"])
@settings(max_examples=500, deadline=None)
@given(body=st.one_of(damaged(), st.binary(max_size=200), st.sampled_from(GREEDY)))
def test_any_bytes_are_a_message_or_an_error_and_take_little_memory(kind: object, body: bytes) -> None:
    tracemalloc.start()
    try:
        msgspec.msgpack.decode(body, type=kind)
    except UNREADABLE:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < LIMIT


@pytest.mark.parametrize("nested", [b"\x91" * 100_000, b"\x81\xa1x" * 100_000], ids=["arrays", "maps"])
def test_endless_nesting_is_an_error_and_not_a_crash(nested: bytes) -> None:
    for kind in (Command, WorkerEvent):
        with pytest.raises(UNREADABLE):
            msgspec.msgpack.decode(nested, type=kind)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(frames=st.lists(st.binary(max_size=60), max_size=4))
def test_only_two_frames_that_begin_with_the_token_are_opened(frames: list[bytes]) -> None:
    token = TOKEN.encode()
    mine = len(frames) == 2 and len(frames[0]) == len(token) + 8 and frames[0].startswith(token)
    assert (opened(frames, token, 8) is not None) == mine
    assert opened([token + bytes(8), b"body"], token, 8) == b"body"
