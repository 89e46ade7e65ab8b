"""Behind a reverse proxy: whose headers count, and the addresses that answers name."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from server_fakes import FakeEngine, settle

from ditrelay.errors import ConfigError
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.server.app import create_app
from ditrelay.server.proxies import Forwarded, Proxies, hosts_of, route_of

ADDRESS = "/v1/images/generations"
PROXY, STRANGER = ("127.0.0.1", 4711), ("203.0.113.9", 4711)
PUBLIC = {"Host": "draw.example", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "draw.example"}
OURS = {"allowed_hosts": "draw.example"}


def seen(headers: dict[str, str], client: Any = PROXY, path: str = "/v1/models", **settings: Any) -> dict[str, Any]:
    """The scope of a request as the application gets it."""
    found: dict[str, Any] = {}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        found.update(scope)

    pairs = [(name.lower().encode(), value.encode()) for name, value in ({"Host": "127.0.0.1:1"} | headers).items()]
    scope = {"type": "http", "scheme": "http", "path": path, "headers": pairs, "client": client}
    proxies = Proxies.of(ServerArgs(**settings))
    asyncio.run(Forwarded(application, proxies=proxies)(scope, None, None))  # type: ignore[arg-type]
    return found


def ask(*requests: tuple[str, str, dict[str, Any]], client: Any = PROXY, **settings: Any) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        engine = FakeEngine(args=ServerArgs(served_model_name="tiny", **settings))
        engine.loaded.set()
        app = create_app(engine)
        transport = httpx.ASGITransport(app, client=client)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:30000") as http,
        ):
            await settle()
            return [await http.request(method, path, **how) for method, path, how in requests]

    return asyncio.run(main())


def drawn(headers: dict[str, str], path: str = ADDRESS, **settings: Any) -> str:
    [answer] = ask(("POST", path, {"headers": headers, "json": {"prompt": "a", "response_format": "url"}}), **settings)
    assert answer.status_code == 200, answer.text
    return re.sub(r"images/[^/]+/", "images/ID/", answer.json()["data"][0]["url"])


@pytest.mark.parametrize(
    ("headers", "settings", "url"),
    [
        ({}, {}, "http://127.0.0.1:30000/v1/images/ID/content"),
        (PUBLIC, OURS, "https://draw.example/v1/images/ID/content"),
        ({"X-Forwarded-Host": "draw.example:8443"}, OURS, "http://draw.example:8443/v1/images/ID/content"),
        (PUBLIC | {"X-Forwarded-Prefix": "/draw/"}, OURS, "https://draw.example/draw/v1/images/ID/content"),
        (PUBLIC, {**OURS, "root_path": "/draw"}, "https://draw.example/draw/v1/images/ID/content"),
        ({}, {"public_url": "https://a.example:8443/x/y/"}, "https://a.example:8443/x/y/v1/images/ID/content"),
        (PUBLIC, {**OURS, "public_url": "https://a.example"}, "https://a.example/v1/images/ID/content"),
        ({"X-Forwarded-Prefix": "//evil.example"}, {}, "http://127.0.0.1:30000/v1/images/ID/content"),
        ({"X-Forwarded-Proto": "javascript"}, {}, "http://127.0.0.1:30000/v1/images/ID/content"),
    ],
)
def test_a_picture_has_the_address_by_which_its_client_reaches_the_server(headers, settings, url):
    assert drawn(headers, **settings) == url


def test_headers_of_others_than_trusted_proxies_change_nothing():
    assert drawn(PUBLIC | {"Host": "127.0.0.1"}, client=STRANGER).startswith("http://127.0.0.1/v1/")
    assert seen({"X-Forwarded-For": "10.1.1.1"}, STRANGER)["client"] == STRANGER
    prefixed = seen({"X-Forwarded-Prefix": "/draw"}, STRANGER)
    assert (prefixed["path"], prefixed.get("root_path", "")) == ("/v1/models", "")


@pytest.mark.parametrize("cut_off", [True, False])
@pytest.mark.parametrize("how", [{"headers": {"X-Forwarded-Prefix": "/draw"}}, {"root_path": "/draw"}])
def test_everything_works_under_a_path_whether_the_proxy_cuts_it_off_or_not(how, cut_off):
    headers = how.get("headers", {}) | {"Accept": "text/html"}
    settings = {name: value for name, value in how.items() if name != "headers"}
    before = "" if cut_off else "/draw"
    paths = ["/", "/playground/main.js", "/docs", "/docs/start.js", "/openapi.json", "/ready", "/v1/jobs"]
    made = ("POST", before + ADDRESS, {"headers": headers, "json": {"prompt": "a"}})
    asked = [("GET", before + path, {"headers": headers}) for path in paths]
    answers = ask(made, *asked, **settings)
    assert [answer.status_code for answer in answers] == [200] * 8
    assert answers[5].json()["servers"] == [{"url": "/draw"}]
    assert "/draw/v1/images/" in answers[7].json()["data"][0]["url"]


def test_events_name_the_file_under_the_path_too():
    made = ("POST", ADDRESS, {"headers": PUBLIC, "json": {"prompt": "a"}})

    async def main() -> str:
        engine = FakeEngine(args=ServerArgs(served_model_name="tiny", root_path="/draw", **OURS))
        engine.loaded.set()
        app = create_app(engine)
        transport = httpx.ASGITransport(app, client=PROXY)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:30000") as http,
        ):
            await settle()
            await http.request(made[0], made[1], **made[2])
            job = (await http.get("/v1/jobs", headers=PUBLIC)).json()["data"][0]["id"]
            return (await http.get(f"/v1/jobs/{job}/events", headers=PUBLIC)).text

    last = [line for line in asyncio.run(main()).splitlines() if line.startswith("data:")][-1]
    assert json.loads(last[5:])["url"].startswith("https://draw.example/draw/v1/images/")


def test_the_path_without_its_slash_leads_to_the_page():
    [answer] = ask(("GET", "/draw?a=1", {}), root_path="/draw")
    assert (answer.status_code, answer.headers["location"]) == (307, "/draw/?a=1")


def test_a_key_opens_the_same_addresses_under_a_path():
    asked = [("GET", f"/draw{path}", {}) for path in ("/health", "/ready", "/playground/main.js", "/v1/models")]
    assert [each.status_code for each in ask(*asked, root_path="/draw", api_key="k")] == [200, 200, 200, 401]


@pytest.mark.parametrize(
    ("forwarded", "trusted", "client"),
    [
        ("198.51.100.1", "127.0.0.1", "198.51.100.1"),
        ("6.6.6.6, 198.51.100.1", "127.0.0.1", "198.51.100.1"),  # the first was made up
        ("198.51.100.1, 10.0.0.2", "127.0.0.1,10.0.0.0/8", "198.51.100.1"),
        ("198.51.100.1:4711", "127.0.0.1", "198.51.100.1"),
        ("[2001:db8::7]:4711", "127.0.0.1", "2001:db8::7"),
        ("2001:db8::7", "127.0.0.1", "2001:db8::7"),
        ("10.0.0.3, 10.0.0.2", "127.0.0.1,10.0.0.0/8", "10.0.0.3"),
        ("198.51.100.1, 7.7.7.7", "*", "198.51.100.1"),
    ],
)
def test_the_client_is_the_address_nearest_to_the_server_that_is_no_proxy(forwarded, trusted, client):
    assert seen({"X-Forwarded-For": forwarded}, forwarded_allow_ips=trusted)["client"][0] == client


def test_who_is_a_proxy():
    believed = {"X-Forwarded-For": "198.51.100.1"}

    def counts(client: Any, **settings: Any) -> bool:
        return bool(seen(believed, client, **settings)["client"] != client)

    assert counts(("127.0.0.1", 1)) and counts(("::1", 1)) and counts(("::ffff:127.0.0.1", 1)) and counts(None)
    assert not counts(("192.0.2.1", 1))
    assert counts(("192.0.2.1", 1), forwarded_allow_ips="192.0.2.0/24")
    assert counts(("192.0.2.1", 1), forwarded_allow_ips="*")
    assert not counts(("127.0.0.1", 1), forwarded_allow_ips="none")
    assert not counts(None, forwarded_allow_ips="none")


def test_the_proxys_own_name_for_the_server_is_checked_beside_the_clients():
    scope = seen({"Host": "upstream", "X-Forwarded-Host": "draw.example"}, root_path="/draw", path="/draw/v1/models")
    assert hosts_of(scope) == ("upstream", "draw.example")
    assert route_of(scope) == "/v1/models"
    # A page whose site points to this machine can write any header but Host.
    rebound = {"Host": "evil.example", "X-Forwarded-Host": "localhost"}
    assert ask(("GET", "/v1/models", {"headers": rebound}))[0].status_code == 403


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"root_path": "draw"}, "root_path"),
        ({"root_path": "/a b"}, "root_path"),
        ({"root_path": "/a", "public_url": "https://x.example/b"}, "root_path"),
        ({"public_url": "draw.example"}, "public_url"),
        ({"public_url": "ftp://draw.example"}, "public_url"),
        ({"public_url": "https://draw.example/?a"}, "public_url"),
        ({"public_url": "https://draw.example:x"}, "public_url"),
        ({"public_url": "https://me@draw.example"}, "public_url"),
        ({"allowed_hosts": "https://draw.example"}, "allowed_hosts"),
        ({"allowed_hosts": "draw.example:80"}, "allowed_hosts"),
        ({"cors_origin": "draw.example"}, "cors_origin"),
        ({"cors_origin": "https://draw.example/path"}, "cors_origin"),
        ({"forwarded_allow_ips": "10.0.0.0/99"}, "forwarded_allow_ips"),
        ({"forwarded_allow_ips": "proxy.example"}, "forwarded_allow_ips"),
        ({"host": ","}, "host"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(settings, flag):
    with pytest.raises(ConfigError, match=f"^{flag}: "):
        ServerArgs(**settings)


def test_settings_with_several_values():
    args = ServerArgs(
        host="127.0.0.1, [::1]",
        root_path="/",
        public_url="https://A.example",
        cors_origin="HTTPS://a.example:443/,http://localhost:3000,null",
        allowed_hosts="A.example,*.b.example",
    )
    assert (args.hosts, args.prefix, args.public_origin) == (("127.0.0.1", "::1"), "", ("https", "a.example"))
    assert args.cors_origins == ("https://a.example", "http://localhost:3000", "null")
    assert args.allowed_names == ("a.example", "*.b.example")
