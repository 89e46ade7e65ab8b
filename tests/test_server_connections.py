"""Connections: how many at a time, without a request, with an unread answer, and without descriptors."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import resource
import socket
import types
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from server_fakes import FakeEngine, running, settle

from ditrelay.errors import ConfigError
from ditrelay.runtime import descriptors
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.server import listener as listening
from ditrelay.server.app import EngineServer, connection_limit
from ditrelay.server.connections import ConnectionRules, Connections, Outgoing
from ditrelay.server.listener import Listener
from ditrelay.server.seldom import Seldom
from ditrelay.server.sockets import listen
from ditrelay.server.traffic import Traffic

SECONDS = 20.0


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[EngineServer, int]]:
    """A server on a free port, and the port."""
    engine = FakeEngine(args=ServerArgs(served_model_name="tiny", **settings))
    engine.loaded.set()
    listener = listen("127.0.0.1", 0)
    server = EngineServer(engine)  # type: ignore[arg-type]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started and server._listener is not None)
    try:
        yield server, listener.getsockname()[1]
    finally:
        server.stop()
        await asyncio.wait_for(task, SECONDS)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


class Client:
    """A connection that reads only what it is told to."""

    def __init__(self, port: int) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)
        self.port = port

    async def open(self) -> Client:
        await asyncio.get_running_loop().sock_connect(self.socket, ("127.0.0.1", self.port))
        return self

    async def ask(self, path: str, method: str = "GET", body: bytes = b"") -> None:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        await asyncio.get_running_loop().sock_sendall(self.socket, request)

    async def read(self, count: int = 1 << 16) -> bytes:
        async with asyncio.timeout(SECONDS):
            return await asyncio.get_running_loop().sock_recv(self.socket, count)

    async def is_closed(self) -> bool:
        """Once all that was sent is read."""
        try:
            while await self.read():
                pass
        except ConnectionError:
            pass
        return True

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of a small answer."""
        text = b""
        while b"\r\n\r\n" not in text or len(text.partition(b"\r\n\r\n")[2]) < _length(text):
            assert (more := await self.read()), text
            text += more
        head, _, body = text.partition(b"\r\n\r\n")
        return int(head.split()[1]), body

    async def status(self, path: str) -> int:
        await self.ask(path)
        return (await self.answer())[0]

    def close(self) -> None:
        self.socket.close()


def _length(text: bytes) -> int:
    head = text.partition(b"\r\n\r\n")[0].lower()
    return int(head.partition(b"content-length:")[2].split(b"\r\n")[0])


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))  # type: ignore[arg-type]


async def opened(port: int, count: int) -> list[Client]:
    return [await Client(port).open() for _ in range(count)]


# ---------------------------------------------------------------- how many


def test_past_the_limit_the_connection_that_was_idle_for_longest_goes_and_requests_are_answered() -> None:
    async def main() -> None:
        async with serving(max_connections=10) as (server, port):
            traffic = server._context.traffic
            clients = await opened(port, 40)
            await until(lambda: traffic.turned_away["idle"] == 30)
            assert traffic.connections == 10
            assert [await each.is_closed() for each in clients[:30]] == [True] * 30
            assert [await each.status("/health") for each in clients[30:]] == [200] * 10
            newcomer = await Client(port).open()
            assert await newcomer.status("/v1/models") == 200
            for each in (*clients, newcomer):
                each.close()

    run(main)


def test_where_all_are_busy_others_are_told_and_what_watches_the_server_is_answered() -> None:
    async def main() -> None:
        async with serving(max_connections=8) as (server, port):
            traffic = server._context.traffic
            busy = await opened(port, 8)
            for each in busy:
                await each.ask("/v1/images/generations", "POST", b'{"prompt": "[wait]"}')
            await until(lambda: traffic.busy == 8)
            for path in ("/health", "/ready", "/metrics"):
                watcher = await Client(port).open()
                assert await watcher.status(path) == 200
                assert await watcher.status(path) == 200
                watcher.close()
            refused = await Client(port).open()
            await refused.ask("/v1/models")
            status, body = await refused.answer()
            assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")
            assert b"--max-connections" in body
            assert await refused.is_closed()
            assert traffic.busy == 8
            busy[0].close()
            await until(lambda: traffic.busy == 7)
            late = await Client(port).open()
            assert await late.status("/v1/models") == 200
            for each in (*busy, late):
                each.close()

    run(main)


def test_a_connection_without_a_request_is_closed_after_its_time() -> None:
    async def main() -> None:
        async with serving(header_timeout=0.2) as (server, port):
            silent, halfway, busy = await opened(port, 3)
            await busy.ask("/v1/images/generations", "POST", b'{"prompt": "[wait]"}')
            await asyncio.get_running_loop().sock_sendall(halfway.socket, b"GET / HTTP/1.1\r\nHost: x\r\n")
            assert await silent.is_closed() and await halfway.is_closed()
            assert server._context.traffic.turned_away["header_timeout"] == 2
            assert server._context.traffic.busy == 1
            for each in (silent, halfway, busy):
                each.close()

    run(main)


# ---------------------------------------------------------------- answers that are not read


PICTURE = b"x" * (8 << 20)


def store(server: EngineServer) -> str:
    return f"/v1/images/{server._context.files.add(PICTURE, 'image/png')}/content"


def test_a_client_that_does_not_read_costs_no_copy_of_its_picture_and_is_cut_off() -> None:
    async def main() -> None:
        async with serving(write_timeout=0.5) as (server, port):
            path, traffic = store(server), server._context.traffic
            clients = await opened(port, 20)
            for each in clients:
                await each.ask(path)
            await until(lambda: traffic.unsent > 10 * len(PICTURE) // 4)
            copied = [each.transport.get_write_buffer_size() for each in server._connections._all]
            assert max(copied) <= 192 << 10
            await until(lambda: traffic.turned_away["write_timeout"] == 20)
            await until(lambda: traffic.connections == 0)
            assert traffic.unsent == 0
            for each in clients:
                each.close()

    run(main)


def test_a_slow_reader_that_reads_gets_all_of_it() -> None:
    async def main() -> None:
        async with serving() as (server, port):
            client = await Client(port).open()
            await client.ask(store(server))
            head, _, body = (await client.read()).partition(b"\r\n\r\n")
            assert f"content-length: {len(PICTURE)}".encode() in head.lower()
            received = len(body)
            while received < len(PICTURE):
                received += len(await client.read(1 << 20))
            assert received == len(PICTURE)
            assert await client.status("/health") == 200  # the same connection goes on
            client.close()

    run(main)


def test_events_that_are_not_read_end_their_stream() -> None:
    async def main() -> None:
        async with serving(write_timeout=0.5) as (server, port):
            client = await Client(port).open()
            body = json.dumps({"prompt": "x" * 900_000, "stream": True}).encode()
            server._context.engine.__class__ = Loud
            await client.ask("/v1/images/generations", "POST", body)
            await until(lambda: server._context.traffic.turned_away["write_timeout"] == 1)
            await until(lambda: server._context.running == 0)
            client.close()

    class Loud(FakeEngine):
        async def submit(self, params: Any, **how: object) -> Any:
            ticket = await super().submit(params)
            ticket._ended.result().__dict__["media"] = PICTURE
            return ticket

    run(main)


class Reader:
    """A connection whose client takes nothing of its answer."""

    def __init__(self, connections: Connections, nbytes: int) -> None:
        self.is_cut = self.is_spare = False
        self.transport = self
        self.outgoing = Outgoing(connections, self)  # type: ignore[arg-type]
        connections.add(self)  # type: ignore[arg-type]
        message = {"type": "http.response.body", "body": b"x" * nbytes}
        self.sending = asyncio.ensure_future(self.outgoing.send(self._send, message))

    async def _send(self, message: object) -> None:
        await asyncio.Event().wait()

    def abort(self) -> None:
        self.is_cut = True
        self.sending.cancel()

    def is_closing(self) -> bool:
        return self.is_cut


def test_past_the_limit_on_unread_answers_the_slowest_readers_go_and_no_more_of_them_than_need_be() -> None:
    async def main() -> None:
        now = 0.0
        connections = Connections(ConnectionRules(max_unsent=300), Traffic(), clock=lambda: now)
        readers = []
        for _ in range(4):
            readers.append(Reader(connections, 90))
            await settle()
            now += 0.3  # none is slow yet
        assert [each.is_cut for each in readers] == [False] * 4
        now = 1.25
        readers.append(Reader(connections, 90))
        await settle()
        assert [each.is_cut for each in readers] == [True, False, False, False, False]
        now = 10.0
        readers.append(Reader(connections, 90))
        await settle()
        assert [each.is_cut for each in readers] == [True, True, True, False, False, False]
        assert connections.traffic.unsent == 270
        for each in readers:
            each.abort()
        await settle()
        assert connections.traffic.unsent == 0

    run(main)


# ---------------------------------------------------------------- descriptors


class Full:
    """A listening socket that has ``free`` descriptors for those who wait."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.asked = 0
        self.given: list[socket.socket] = []

    def accept(self) -> tuple[socket.socket, object]:
        self.asked += 1
        if not self.free:
            raise OSError(errno.EMFILE, "Too many open files")
        self.free -= 1
        mine, theirs = socket.socketpair()
        self.given.append(theirs)
        return mine, None


def accepting(full: Full, *, idle: int, spares: int, rounds: int) -> tuple[list[bool], list[int]]:
    """Which connections were made (as spare?) in so many turns of the loop, and how often it waited for later."""
    made: list[bool] = []
    later: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def connect(is_spare: bool) -> asyncio.Protocol:
            made.append(is_spare)
            return asyncio.Protocol()

        def close_idle() -> bool:
            nonlocal idle
            idle -= 1
            full.free += idle >= 0
            return idle >= 0

        def give() -> bool:
            nonlocal spares
            spares -= 1
            full.free += spares >= 0
            return spares >= 0

        kept = types.SimpleNamespace(give=give, refill=lambda: None, close=lambda: None)
        accepting = Listener([], connect, close_idle, kept)  # type: ignore[arg-type]
        loop.add_reader = lambda *what: None  # type: ignore[assignment]
        loop.remove_reader = lambda *what: later.append(1)  # type: ignore[assignment, return-value, func-returns-value]
        for _ in range(rounds):
            accepting._accept(full)  # type: ignore[arg-type]
            await settle()
        del loop.add_reader, loop.remove_reader
        for each in full.given:
            each.close()

    asyncio.run(main())
    return made, later


def test_without_descriptors_idle_connections_give_theirs_then_spares_then_it_waits(caplog: Any) -> None:
    full = Full(free=1)
    made, later = accepting(full, idle=2, spares=1, rounds=40)
    assert made == [False, False, False, True]
    assert later and full.asked < 100  # and not once for each connection in the backlog
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) == 1
    assert "ulimit -n" in caplog.text and "Traceback" not in caplog.text


def test_a_line_that_could_come_a_thousand_times_comes_once_a_minute(caplog: Any) -> None:
    times = [0, 1, 59, 60, 61, 200]
    seldom = Seldom(logging.getLogger("ditrelay.test"), clock=lambda: times.pop(0))
    while times:
        seldom.warn("no more")
    lines = [each.getMessage() for each in caplog.records]
    again = [f"no more ({count} times more in the last minute)" for count in (2, 1)]
    assert lines == ["no more", *again]


def limited(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> list[tuple[int, int]]:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: raised.append(limits))
    return raised


def test_the_soft_limit_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = limited(monkeypatch, 1024, 4096)
    assert descriptors.raise_limit() == 4096
    assert raised == [(4096, 4096)]
    assert limited(monkeypatch, 1024, 1024) == []
    assert descriptors.raise_limit() == 1024


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_connections_leave_descriptors_for_the_ranks_and_for_files(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    args = ServerArgs(num_gpus=ranks)
    for limit in (300, 1024, 4096):
        limited(monkeypatch, limit, limit)
        assert 8 <= connection_limit(args) <= min(1000, (limit - 64 - 16 * ranks) / 3)
    limited(monkeypatch, 1 << 20, 1 << 20)
    assert connection_limit(args) == 1000


def test_too_few_descriptors_are_one_line_that_says_how_many_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 40, 40)
    with pytest.raises(ConfigError, match=r"ulimit -n: 40 file descriptors are too few for 4 ranks; .* at least 152"):
        connection_limit(ServerArgs(num_gpus=4))


def test_spares_are_given_and_taken_back() -> None:
    left = 3

    def open_one() -> int:
        nonlocal left
        if not left:
            raise OSError(errno.EMFILE, "Too many open files")
        left -= 1
        return os.open(os.devnull, os.O_RDONLY)

    spares = descriptors.Spares(2, open_one)
    assert [spares.give(), spares.give(), spares.give()] == [True, True, False]
    spares.refill()  # one is left
    assert [spares.give(), spares.give()] == [True, False]


def test_a_request_for_which_no_file_can_be_opened_is_503_and_no_traceback(caplog: Any) -> None:
    class Exhausted(FakeEngine):
        async def submit(self, params: Any, **how: object) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

    async def main() -> httpx.Response:
        async with running(Exhausted()) as client:
            return await client.post("/v1/images/generations", json={"prompt": "a"})

    answer = asyncio.run(main())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_descriptors")
    assert "Traceback" not in caplog.text


def test_a_burst_of_connections_is_counted_before_more_are_accepted() -> None:
    made, _ = accepting(Full(free=1000), idle=0, spares=0, rounds=1)
    assert len(made) <= listening._AT_A_TIME
