"""Pictures fetched from addresses: from named hosts only, never from a private network, and never without end."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from picture_samples import picture
from server_fakes import CardEngine, running

from ditrelay.errors import ConfigError, InvalidRequest
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.server import remote_media
from ditrelay.server.problem import ApiError
from ditrelay.server.public_addresses import is_public
from ditrelay.server.remote_media import Fetched, RemoteMedia, look_up

HOST = "pictures.test"
PNG = picture()
MAX_BYTES = 20_000

Answer = Callable[[str], bytes | None]


def answer(content: bytes = PNG, status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


class Site:
    """An HTTP server on this machine, under the name ``HOST``; ``None`` as an answer: it says nothing.

    Attributes:
        asked: the heads of the requests that came.
    """

    def __init__(self, answers: Answer) -> None:
        self.asked: list[str] = []
        self.port = 0
        self._answers = answers

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head)
        content = self._answers(head.split()[1])
        if content is None:
            await reader.read()
        else:
            writer.write(content)
        writer.close()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Site]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self

    def address(self, path: str = "/cat.png", host: str = HOST) -> str:
        return f"http://{host}:{self.port}{path}"


def ignore(nbytes: int) -> None:
    """For fetches whose bytes nobody counts."""


def resolver(*numbers: str) -> Callable[[str, int], Awaitable[list[str]]]:
    async def resolve(host: str, port: int) -> list[str]:
        return list(numbers)

    return resolve


def fetch(answers: Answer, path: str = "/cat.png", **how: Any) -> tuple[Fetched, Site]:
    """What is fetched from ``HOST``, which is on this machine and may be reached for once."""

    async def main() -> tuple[Fetched, Site]:
        async with Site(answers).open() as site:
            options = {"resolve": resolver("127.0.0.1"), "may_reach": lambda number: True, "timeout": 5.0} | how
            remote = RemoteMedia([f"{HOST}:{site.port}"], max_bytes=MAX_BYTES, **options)
            async with asyncio.timeout(10):
                return await remote.fetch(path if "://" in path else site.address(path), count=ignore), site

    return asyncio.run(main())


def refusal(answers: Answer, path: str = "/cat.png", **how: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        fetch(answers, path, **how)
    assert caught.value.param == "image"
    return caught.value.reason


def test_a_file_is_fetched_and_nothing_is_said_of_the_client() -> None:
    found, site = fetch(lambda path: answer(Content_Type="image/png"), "/a/cat.png?size=2")
    assert found == Fetched(PNG, "image/png")
    [head] = site.asked
    assert head.startswith("GET /a/cat.png?size=2 HTTP/1.1\r\n")
    assert f"\r\nhost: {HOST}:{site.port}\r\n" in head.lower()
    assert "cookie" not in head.lower() and "authorization" not in head.lower()


def test_a_file_sent_in_pieces_is_fetched_whole() -> None:
    pieces = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (PNG[:100], PNG[100:]))
    found, _ = fetch(lambda path: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")
    assert found.content == PNG


@pytest.mark.parametrize(
    "number",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.3.4",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
        "2001:0:4136:e378:8000:63bf:f5ff:fffe",
        "no number",
    ],
)
def test_a_name_that_leads_into_a_private_network_is_refused_before_anything_is_sent(number: str) -> None:
    assert not is_public(number)
    for numbers in ([number], ["93.184.215.14", number]):
        assert "network" in refusal(lambda path: answer(), resolve=resolver(*numbers), may_reach=is_public)


@pytest.mark.parametrize("number", ["93.184.215.14", "1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1"])
def test_public_addresses_may_be_reached(number: str) -> None:
    assert is_public(number)


def test_a_name_is_resolved_once_and_what_was_checked_is_what_is_connected_to() -> None:
    """Else a name could mean a public address when it is checked, and a private one right after."""
    looked_up: list[tuple[str, int]] = []
    checked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        looked_up.append((host, port))
        return ["127.0.0.1"] if len(looked_up) == 1 else ["10.0.0.1"]

    def may_reach(number: str) -> bool:
        checked.append(number)
        return True

    _, site = fetch(lambda path: answer(), resolve=resolve, may_reach=may_reach)
    assert looked_up == [(HOST, site.port)] and checked == ["127.0.0.1"]


def test_the_machines_resolver_gives_numbers() -> None:
    numbers = asyncio.run(look_up("localhost", 80))
    assert numbers and not any(is_public(number) for number in numbers)


def test_a_host_that_nobody_knows_is_refused() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert "could not be read" in refusal(lambda path: answer(), resolve=resolve)


@pytest.mark.parametrize(
    "address",
    [
        "http://else.test/x.png",
        f"http://{HOST}/x.png",
        f"https://{HOST}/x.png",
        f"http://{HOST}.else.test/x.png",
        f"http://else.test@{HOST}:1/x.png",
        f"http://{HOST}:1@else.test/x.png",
        f"ftp://{HOST}/x.png",
        "http://[::1/x.png",
        f"http://{HOST}:99999/x.png",
        "http:///x.png",
    ],
)
def test_other_hosts_ports_and_schemes_are_refused(address: str) -> None:
    assert "address is" in refusal(lambda path: answer(), address)


def test_a_redirect_is_followed_on_the_hosts_that_are_allowed_only() -> None:
    found, site = fetch(lambda path: answer() if path == "/b" else answer(b"", "302 Found", Location="/b"))
    assert found.content == PNG and len(site.asked) == 2
    for target in ("http://else.test/", "http://127.0.0.1/", "file:///etc/passwd", "//else.test/x"):
        away = answer(b"", "302 Found", Location=target)
        assert "not allowed" in refusal(lambda path, away=away: away)


def test_redirects_without_end_are_refused() -> None:
    assert "on and on" in refusal(lambda path: answer(b"", "301 Moved", Location=path + "x"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (answer(b"no", "404 Not Found"), "answered 404"),
        (answer(b"", "500 Oh"), "answered 500"),
        (answer(b"", "302 Found", Location="http://[x/"), "leads to none"),
        (answer(bytes(MAX_BYTES + 1)), "too large"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n", "too large"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(MAX_BYTES + 1), "too large"),
        (answer(PNG, Content_Encoding="gzip"), "packed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nshort", "could not be read"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "could not be read"),
        (b"", "could not be read"),
    ],
)
def test_what_is_no_good_answer_is_refused(content: bytes, reason: str) -> None:
    assert reason in refusal(lambda path: content)


def test_a_host_that_says_nothing_is_given_up() -> None:
    assert "within 0.2 s" in refusal(lambda path: None, timeout=0.2)


def test_an_encrypted_address_is_not_read_unencrypted() -> None:
    async def main() -> None:
        async with Site(lambda path: answer()).open() as site:
            remote = RemoteMedia(
                [f"{HOST}:{site.port}"],
                max_bytes=MAX_BYTES,
                timeout=2.0,
                resolve=resolver("127.0.0.1"),
                may_reach=lambda number: True,
            )
            with pytest.raises(InvalidRequest) as caught:
                await remote.fetch(site.address().replace("http:", "https:"), count=ignore)
            assert isinstance(caught.value.__cause__, (ssl.SSLError, OSError, type(None)))
            assert site.asked == []

    asyncio.run(main())


# ---------------------------------------------------------------- through the server


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (answer(Content_Type="image/png"), 200),
        (answer(Content_Type="image/png; charset=binary"), 200),
        (answer(), 200),
        (answer(b"<html>", Content_Type="text/html"), 400),
        (answer(Content_Type="text/html"), 200),
        (answer(PNG[:-9], Content_Type="image/png"), 400),
    ],
)
def test_what_is_fetched_is_under_the_rules_of_uploads(
    monkeypatch: pytest.MonkeyPatch, content: bytes, status: int
) -> None:
    async def main() -> None:
        async with Site(lambda path: content).open() as site:
            engine = CardEngine(ServerArgs(served_model_name="tiny", allow_remote_media=f"{HOST}:{site.port}"))
            monkeypatch.setattr(remote_media, "look_up", resolver("127.0.0.1"))
            monkeypatch.setattr(remote_media, "is_public", lambda number: True)
            async with running(engine) as client:
                body = {"prompt": "a cat", "image": site.address()}
                response = await client.post("/v1/images/edits", json=body)
        assert response.status_code == status, response.text
        if status == 200:
            assert engine.tickets[0].params.image == PNG
        else:
            assert response.json()["error"]["param"] == "image"

    asyncio.run(main())


class SlowSite(Site):
    """Sends ``PNG`` but for its last byte, and that when it is told to."""

    def __init__(self) -> None:
        super().__init__(lambda path: None)
        self.go_on = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(answer()[:-1])
        await self.go_on.wait()
        writer.write(PNG[-1:])
        writer.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def test_pictures_that_trickle_in_count_in_the_bytes_of_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """One and a half of them fit: the second is turned away while the first is on its way, and not after."""

    async def main() -> None:
        site = SlowSite()
        async with asyncio.timeout(30), site.open():
            limits = {"max_request_bytes": 1000, "max_total_bytes": len(PNG) * 3 // 2}
            args = ServerArgs(served_model_name="tiny", allow_remote_media=f"{HOST}:{site.port}", **limits)
            monkeypatch.setattr(remote_media, "look_up", resolver("127.0.0.1"))
            monkeypatch.setattr(remote_media, "is_public", lambda number: True)
            async with running(CardEngine(args)) as client:
                held = client._transport.app.state.context.held
                body = {"prompt": "a cat", "image": site.address()}
                first = asyncio.create_task(client.post("/v1/images/edits", json=body))
                await until(lambda: held.nbytes >= len(PNG) - 1)
                refused = await client.post("/v1/images/edits", json=body)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "9"), refused.text
                assert "--max-total-bytes" in refused.json()["error"]["message"]
                site.go_on.set()
                assert (await first).status_code == 200
                assert held.nbytes == 0
                assert (await client.post("/v1/images/edits", json=body)).status_code == 200
                assert held.nbytes == 0

    asyncio.run(main())


def test_no_more_pictures_are_fetched_at_a_time_than_are_allowed() -> None:
    async def main() -> None:
        site = SlowSite()
        async with asyncio.timeout(30), site.open():
            options = {"resolve": resolver("127.0.0.1"), "may_reach": lambda number: True, "timeout": 4.5}
            remote = RemoteMedia([f"{HOST}:{site.port}"], max_bytes=MAX_BYTES, max_fetches=2, **options)
            fetches = [asyncio.create_task(remote.fetch(site.address(), count=ignore)) for _ in range(2)]
            await until(lambda: len(site.asked) == 2)
            with pytest.raises(ApiError, match="2 pictures are fetched") as caught:
                await remote.fetch(site.address(), count=ignore)
            assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "5"})
            fetches[0].cancel()
            await asyncio.wait(fetches[:1])
            site.go_on.set()
            assert [(await fetch).content for fetch in fetches[1:]] == [PNG]
            for _ in range(3):  # each gives its place back
                assert (await remote.fetch(site.address(), count=ignore)).content == PNG
            assert len(site.asked) == 5

    asyncio.run(main())


def test_an_allowed_name_that_means_this_machine_is_refused_by_the_server() -> None:
    async def main() -> None:
        async with Site(lambda path: answer()).open() as site:
            engine = CardEngine(ServerArgs(served_model_name="tiny", allow_remote_media=f"localhost:{site.port}"))
            async with running(engine) as client:
                body = {"prompt": "a cat", "image": site.address(host="localhost")}
                response = await client.post("/v1/images/edits", json=body)
            assert response.status_code == 400 and "network" in json.loads(response.content)["error"]["message"]
            assert site.asked == []

    asyncio.run(main())


@pytest.mark.parametrize("hosts", ["http://a.test", "a.test/x", "a test", "[::1]", "*.a.test"])
def test_a_setting_that_names_no_host_is_refused(hosts: str) -> None:
    with pytest.raises(ConfigError, match="allow_remote_media"):
        ServerArgs(allow_remote_media=hosts)


def test_hosts_are_read_from_a_list_with_commas() -> None:
    assert ServerArgs(allow_remote_media="A.test, b.test:8080").media_hosts == ("a.test", "b.test:8080")
    assert ServerArgs().media_hosts == ()
