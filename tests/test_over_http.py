"""The benchmark of HTTP: its clients against a small server, and what its rows say."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from http_clients import Connection, child, fetch
from over_http import rows


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"path": self.path})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(500 if self.path == "/broken" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *values: object) -> None: ...


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_plain_client_reads_answers_and_says_which_one_failed(address: str) -> None:
    connection = Connection(address)
    assert fetch(connection, "/a") == {"path": "/a"}
    assert fetch(connection, "/b", {"c": 1}) == {"c": 1}
    with pytest.raises(RuntimeError, match="/broken: 500"):
        fetch(connection, "/broken")
    connection.close()


def test_a_client_in_another_process_tells_how_long_each_request_took(address: str) -> None:
    with child("call", address) as client:
        assert all(0 < client.ask(("/a", {"b": 1})) < 10 for _ in range(3))


def test_polling_clients_ask_once_a_second_each_until_they_are_told_to_stop(address: str) -> None:
    with child("poll", address) as clients:
        assert clients.ask([f"/{i}" for i in range(50)]) == "polling"
        threading.Event().wait(1.2)
        polled = clients.ask()
    assert 0 < polled["per_second"] < 100 and 0 < polled["median_ms"] <= polled["p99_ms"]


def test_a_row_says_whether_the_aim_was_reached() -> None:
    added = {"side": 32, "response_format": "url", "direct_ms": 30.0, "http_ms": 32.5, "added_ms": 2.5}
    polling = {
        "clients": 200,
        "slower": {"videos": 0.03},
        "polled": {"videos": {"per_second": 199.0, "median_ms": 3.0}},
    }
    found = rows({"added": [added], "polling": polling, "listing": [{"way": "x", "median_ms": 20.0, "max_ms": 30.0}]})
    assert [(row[2], row[4]) for row in found] == [("2.50 ms", "yes"), ("3.00%", "**no**"), ("20.0 ms", "yes")]
    assert rows({}) == []
