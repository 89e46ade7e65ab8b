"""The clients of over_http.py, in a process of their own so that they take no time from the server's event loop.

They are as plain as clients can be (the standard library, connections kept open): what is measured is the server.
``call`` takes one request a line from standard input and answers with its seconds. ``poll`` asks for the status of jobs
until a line comes, then tells how often and how fast.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

POLL_SECONDS = 1.0
TIMEOUT = 120.0


class Child:
    """This file as another process: ``ask`` writes a line and reads one."""

    def __init__(self, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, value: Any = None) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT)
        self._process.stdout.close()


@contextmanager
def child(*words: str) -> Iterator[Child]:
    made = Child(*words)
    try:
        yield made
    finally:
        made.close()


class Connection:
    """One connection, kept open; to a server that answers with a Content-Length."""

    def __init__(self, address: str) -> None:
        """``address``: HOST:PORT."""
        host, port = address.split(":")
        self._address = address
        self._socket = socket.create_connection((host, int(port)), TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def fetch(self, path: str, body: Any = None) -> bytes:
        """The answer of one request. Raises ``RuntimeError`` for one that is an error."""
        content = b"" if body is None else json.dumps(body).encode()
        kind = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {self._address}\r\n{kind}\r\n"
        self._socket.sendall(head.encode() + content)
        status, length = self._file.readline(), 0
        while line := self._file.readline().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        answer = self._file.read(length)
        if status.split()[1] != b"200":
            raise RuntimeError(f"{path}: {status.split()[1].decode()}: {answer[:200]!r}")
        return answer

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def fetch(connection: Connection, path: str, body: Any = None) -> Any:
    """The JSON answer of one request."""
    return json.loads(connection.fetch(path, body))


def call(address: str) -> None:
    """Seconds from the first byte sent to the last one received, for each (path, body) that is asked for."""
    connection = Connection(address)
    for line in sys.stdin:
        path, body = json.loads(line)
        began = time.perf_counter()
        connection.fetch(path, body)
        print(json.dumps(time.perf_counter() - began), flush=True)


async def _poll(address: str, path: str, delay: float, seconds: list[float]) -> None:
    host, port = address.split(":")
    await asyncio.sleep(delay)
    reader, writer = await asyncio.open_connection(host, int(port))
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode()
    while True:
        began = time.perf_counter()
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(f"{path}: {head[:100]!r}")
        await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
        seconds.append(time.perf_counter() - began)
        await asyncio.sleep(max(0.0, POLL_SECONDS - seconds[-1]))


async def poll(address: str, paths: Sequence[str]) -> dict[str, float]:
    """Every path by a client of its own, once in ``POLL_SECONDS``, spread over that time."""
    seconds: list[float] = []
    delays = [i * POLL_SECONDS / len(paths) for i in range(len(paths))]
    tasks = [asyncio.create_task(_poll(address, path, d, seconds)) for path, d in zip(paths, delays, strict=True)]
    stop = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    began = time.perf_counter()
    await asyncio.wait((stop, *tasks), return_when=asyncio.FIRST_COMPLETED)
    took = time.perf_counter() - began
    for task in tasks:
        if task.done():
            task.result()  # a client that failed: raises
        task.cancel()
    percentiles = statistics.quantiles(seconds, n=100)
    return {"per_second": len(seconds) / took, "median_ms": percentiles[49] * 1e3, "p99_ms": percentiles[98] * 1e3}


def main(mode: str, address: str) -> None:
    if mode == "call":
        call(address)
        return
    paths = json.loads(sys.stdin.readline())
    print(json.dumps("polling"), flush=True)
    print(json.dumps(asyncio.run(poll(address, paths))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
