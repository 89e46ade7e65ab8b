"""``serve``: one socket, signals, exit codes, log lines."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from server_fakes import FakeEngine

from ditrelay.errors import ConfigError, StartupError, UnsupportedModel
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.server import app as app_module
from ditrelay.server.app import serve
from ditrelay.server.sockets import is_open_to_others, listen, listen_on, listening

ADDRESS = "/v1/images/generations"


@pytest.fixture(autouse=True)
def restored_loggers(monkeypatch):
    loggers = [logging.getLogger(name) for name in ("ditrelay", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")]
    levels = {logger: logger.level for logger in [logging.root, *loggers]}
    monkeypatch.setattr(logging.root, "handlers", [])
    yield
    for logger, level in levels.items():
        logger.setLevel(level)


@pytest.fixture
def run(monkeypatch):
    """Serve ``engine`` in this thread while ``client`` runs in another; then send ``number`` to end the server."""

    def run(
        engine: FakeEngine, client: Callable[[httpx.Client], None], number: int = signal.SIGTERM, **settings: object
    ) -> int:
        engine.args = ServerArgs(served_model_name="tiny", **settings)
        monkeypatch.setitem(sys.modules, "ditrelay.async_engine", SimpleNamespace(AsyncEngine=lambda args: engine))
        with listen("127.0.0.1", 0) as free:
            port = free.getsockname()[1]

        def act() -> None:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
                wait_until(lambda: is_up(http))
                try:
                    client(http)
                finally:
                    os.kill(os.getpid(), number)

        with ThreadPoolExecutor(1) as pool:
            acting = pool.submit(act)
            code = serve(ServerArgs(port=port, served_model_name="tiny"))
            acting.result(10)
        return code

    return run


def is_up(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx.ConnectError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s in vain"
        time.sleep(0.01)


def loaded_engine() -> FakeEngine:
    engine = FakeEngine()
    engine.loaded.set()
    return engine


def house_lines(capsys) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(re.match(r"\[(INFO|WARNING|ERROR)\] \S", line) for line in lines), err
    return lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_code_0_and_plain_log_lines(run, capsys, number):
    def client(http: httpx.Client) -> None:
        wait_until(lambda: http.get("/ready").status_code == 200)
        assert http.post(ADDRESS, json={"prompt": "a cat"}).status_code == 200

    engine = loaded_engine()
    assert run(engine, client, number) == 0
    assert engine.closed
    lines = house_lines(capsys)
    assert [re.sub(r"[\d.]+ s$|\d+$", "#", line) for line in lines] == [
        "[INFO] Listening on http://127.0.0.1:#",
        "[INFO] POST /v1/images/generations -> 200 in #",
        "[INFO] Shutting down",
    ]


def test_a_signal_while_the_model_loads_ends_it_at_once_and_is_no_failure(run, capsys):
    def client(http: httpx.Client) -> None:
        assert http.get("/ready").status_code == 503

    assert run(FakeEngine(), client) == 0
    assert not [line for line in house_lines(capsys) if line.startswith("[ERROR]")]


class Background:
    """Requests for pictures that run while a test goes on."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.answers: list[Future[httpx.Response]] = []
        self._pool = ThreadPoolExecutor(4)

    def start(self, http: httpx.Client) -> None:
        wait_until(lambda: http.get("/ready").status_code == 200)
        self.answers.append(self._pool.submit(httpx.post, f"{http.base_url}{ADDRESS}", json={"prompt": "[wait]"}))
        wait_until(lambda: bool(self.engine.tickets))

    def answer(self) -> httpx.Response:
        answer = self.answers[0].result(10)
        self._pool.shutdown()
        return answer


def test_the_first_signal_lets_requests_end_and_takes_no_new_ones(run):
    engine = loaded_engine()
    background = Background(engine)

    def client(http: httpx.Client) -> None:
        background.start(http)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: http.get("/ready").status_code == 503)
        assert http.get("/ready").json()["missing"] == {"engine": ["shutting down"]}
        refused = http.post(ADDRESS, json={"prompt": "too late"})
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is shutting down")
        assert http.get("/health").status_code == 200
        assert not engine.closed
        engine.loop.call_soon_threadsafe(engine.tickets[0].finish)
        wait_until(lambda: engine.closed)

    # What ``run`` sends after the client has ended is the second signal: it finds the server at its end.
    assert run(engine, client) == 0
    assert background.answer().status_code == 200


def test_a_second_signal_ends_running_requests_with_503(run):
    engine = loaded_engine()
    background = Background(engine)

    def client(http: httpx.Client) -> None:
        background.start(http)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: http.get("/ready").status_code == 503)

    assert run(engine, client) == 0
    answer = background.answer()
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the server is shutting down")


def test_requests_that_outlast_the_drain_are_ended_with_503(run, capsys):
    engine = loaded_engine()
    background = Background(engine)
    assert run(engine, background.start, drain_timeout=0.2) == 0
    assert background.answer().status_code == 503
    assert "[WARNING] 1 requests did not end within --drain-timeout 0.2 s" in house_lines(capsys)


def test_a_connection_that_is_cut_cancels_its_request(run):
    engine = loaded_engine()

    def client(http: httpx.Client) -> None:
        wait_until(lambda: http.get("/ready").status_code == 200)
        with pytest.raises(httpx.ReadTimeout):
            http.post(ADDRESS, json={"prompt": "[wait]", "n": 2}, timeout=0.1)
        wait_until(lambda: [ticket.cancelled for ticket in engine.tickets] == [True, True])

    assert run(engine, client) == 0


def test_a_client_that_sends_too_much_gets_its_answer_and_not_a_reset(run):
    def client(http: httpx.Client) -> None:
        assert http.post(ADDRESS, content=b" " * (4 << 20)).status_code == 413
        assert http.get("/health").status_code == 200

    assert run(loaded_engine(), client) == 0


@pytest.mark.parametrize(
    ("failure", "code"),
    [(StartupError("rank 2 did not start: no memory"), 1), (ConfigError("--x", "bad"), 2)],
)
def test_an_engine_that_does_not_start_ends_it_with_one_line(monkeypatch, capsys, failure, code):
    engine = FakeEngine(failure=failure)
    engine.loaded.set()
    monkeypatch.setitem(sys.modules, "ditrelay.async_engine", SimpleNamespace(AsyncEngine=lambda args: engine))
    assert serve(ServerArgs(port=0)) == code
    errors = [line for line in house_lines(capsys) if line.startswith("[ERROR]")]
    assert errors == [f"[ERROR] the engine did not start: {failure}"]
    assert engine.closed


def test_a_model_that_is_not_supported_is_one_line_and_code_2(monkeypatch, capsys):
    def refuse(args: ServerArgs) -> FakeEngine:
        raise UnsupportedModel("it has no transformer")

    monkeypatch.setitem(sys.modules, "ditrelay.async_engine", SimpleNamespace(AsyncEngine=refuse))
    assert serve(ServerArgs(port=0)) == 2
    assert house_lines(capsys) == ["[ERROR] --model-path: it has no transformer"]


def test_a_taken_port_is_one_line_and_code_2(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve(ServerArgs(port=port)) == 2
    assert house_lines(capsys) == [f"[ERROR] --port: {port} is taken on 127.0.0.1; choose another, or 0 for a free one"]


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host", "a..b"])
def test_an_address_that_is_not_ours_names_the_flag(host):
    with pytest.raises(ConfigError, match="--host"):
        listen(host, 0)


def test_an_answer_never_waits_for_the_client_to_acknowledge_its_headers() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert client.getpeername() == listener.getsockname()


@pytest.fixture
def heeds_sighup():
    """Where ``nohup`` runs the tests, they would ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeds_sighup")
def test_a_closed_terminal_ends_it_as_sigterm_does_and_its_second_signal_is_none(run):
    engine = loaded_engine()
    background = Background(engine)

    def client(http: httpx.Client) -> None:
        background.start(http)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        wait_until(lambda: http.get("/ready").status_code == 503)
        assert not engine.closed
        engine.loop.call_soon_threadsafe(engine.tickets[0].finish)
        wait_until(lambda: engine.closed)

    assert run(engine, client) == 0
    assert background.answer().status_code == 200


def test_what_nohup_started_outlives_its_terminal(run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def client(http: httpx.Client) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        wait_until(lambda: http.get("/ready").status_code == 200)

    try:
        assert run(loaded_engine(), client) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def serve_at(monkeypatch, capsys):
    """Serve with these settings until the client has ended; returns the log."""

    def serve_at(client: Callable[[], None], **settings: object) -> list[str]:
        engine = loaded_engine()
        engine.args = ServerArgs(served_model_name="tiny", **settings)
        monkeypatch.setitem(sys.modules, "ditrelay.async_engine", SimpleNamespace(AsyncEngine=lambda args: engine))

        def act() -> None:
            try:
                client()
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        with ThreadPoolExecutor(1) as pool:
            acting = pool.submit(act)
            assert serve(engine.args) == 0
            acting.result(10)
        return house_lines(capsys)

    return serve_at


def test_over_a_unix_socket(serve_at, tmp_path):
    path = str(tmp_path / "d.sock")
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(path)  # left behind: nobody listens

    def client() -> None:
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://localhost", timeout=10) as http:
            wait_until(lambda: is_up(http))
            assert os.stat(path).st_mode & 0o777 == 0o666
            forwarded = {"X-Forwarded-Proto": "https"}
            answer = http.post(ADDRESS, json={"prompt": "a", "response_format": "url"}, headers=forwarded)
            assert answer.json()["data"][0]["url"].startswith("https://localhost/v1/images/")
            with pytest.raises(ConfigError, match="--uds: another server listens on"), listening(ServerArgs(uds=path)):
                pass

    assert f"[INFO] Listening on unix:{path}" in serve_at(client, uds=path)
    assert not os.path.exists(path)


def test_a_path_that_is_no_socket_or_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path, reason in (
        (tmp_path / "file", "no socket"),
        (tmp_path / "none" / "d.sock", "cannot listen"),
        (tmp_path / ("x" * 120), "cannot listen"),
    ):
        with pytest.raises(ConfigError, match=f"--uds: .*{reason}"), listening(ServerArgs(uds=str(path))):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_the_next_servers_socket_is_left_alone(tmp_path):
    path = tmp_path / "d.sock"
    with listening(ServerArgs(uds=str(path))):
        path.unlink()
        path.write_text("the next one's")
    assert path.exists()


def test_it_listens_on_several_addresses_and_warns_once_of_those_that_others_reach(serve_at, monkeypatch):
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]

    def client() -> None:
        for host in ("127.0.0.1", "127.0.0.2"):
            wait_until(lambda host=host: is_reached(host, port))

    log = serve_at(client, host="127.0.0.1,127.0.0.2", port=port)
    assert f"[INFO] Listening on http://127.0.0.2:{port}"[:-2] in "\n".join(log).replace("#", str(port))
    assert not [line for line in log if "whoever reaches" in line]
    monkeypatch.setattr(app_module, "is_open_to_others", lambda listener: True)
    log = serve_at(client, host="127.0.0.1,127.0.0.2", port=port)
    [warning] = [line for line in log if "whoever reaches" in line]
    assert "127.0.0.1" in warning and "127.0.0.2" in warning and "DITRELAY_API_KEY" in warning
    log = serve_at(client, host="127.0.0.1,127.0.0.2", port=port, api_key="k")
    assert not [line for line in log if "whoever reaches" in line]


def test_which_addresses_others_reach():
    for host, others in (("127.0.0.1", False), ("127.0.0.2", False), ("0.0.0.0", True)):
        with listen(host, 0) as listener:
            assert is_open_to_others(listener) is others
    with socket.socket(socket.AF_UNIX) as listener:
        assert not is_open_to_others(listener)


def test_several_addresses_share_a_free_port_and_none_stays_open_where_one_is_taken():
    sockets = listen_on(("127.0.0.1", "127.0.0.2", "127.0.0.3"), 0)
    [port] = {each.getsockname()[1] for each in sockets}
    for each in (sockets[0], sockets[2]):
        each.close()
    with sockets[1], pytest.raises(ConfigError, match=f"--port: {port} is taken on 127.0.0.2"):
        listen_on(("127.0.0.1", "127.0.0.2"), port)
    listen("127.0.0.1", port).close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_address_of_all_is_ipv6_and_ipv4_unless_another_is_given():
    with listen("::", 0) as listener:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, listener.getsockname()[1]), 10).close()
    sockets = listen_on(("0.0.0.0", "::"), 0)
    assert len(sockets) == 2
    for each in sockets:
        each.close()


def is_reached(host: str, port: int) -> bool:
    try:
        return httpx.get(f"http://{host}:{port}/health", timeout=10).status_code == 200
    except httpx.ConnectError:
        return False
