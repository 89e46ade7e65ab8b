"""The API key and the limits on bytes."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest
from server_fakes import FakeEngine, running, settle

from ditrelay.errors import ConfigError
from ditrelay.runtime.server_args import ServerArgs

ADDRESS = "/v1/images/generations"
KEY = "correct horse battery staple"


def locked() -> FakeEngine:
    return FakeEngine(args=ServerArgs(api_key=KEY, served_model_name="tiny"))


def fetch(engine: FakeEngine, method: str, address: str, **how: object) -> httpx.Response:
    async def main() -> httpx.Response:
        async with running(engine) as client:
            return await client.request(method, address, **how)

    return asyncio.run(main())


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Bearer {KEY.upper()}",
        "Bearer \xe9",
    ],
)
@pytest.mark.parametrize(("method", "address"), [("POST", ADDRESS), ("GET", "/v1/topology"), ("GET", "/nothing")])
def test_without_the_right_key_every_address_is_401(value, method, address):
    headers = {} if value is None else {"authorization": value.encode("latin-1")}
    engine = locked()
    response = fetch(engine, method, address, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert KEY not in response.text
    assert not engine.tickets


def test_the_key_opens_and_two_of_them_do_not():
    right = ("authorization", f"Bearer {KEY}")
    assert fetch(locked(), "POST", ADDRESS, headers=[right], json={"prompt": "a cat"}).status_code == 200
    assert fetch(locked(), "GET", "/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    assert fetch(locked(), "GET", "/v1/models", headers=[right, right]).status_code == 401


@pytest.mark.parametrize("name", ["x-api-key", "api-key", "X-API-Key"])
def test_the_key_may_come_in_the_headers_of_other_vendors(name):
    def status(*headers: tuple[str, str]) -> int:
        return fetch(locked(), "GET", "/v1/models", headers=list(headers)).status_code

    assert status((name, KEY)) == 200
    assert status((name, KEY), ("Authorization", "Bearer none")) == 200
    assert status((name, f"Bearer {KEY}")) == status((name, "")) == status((name, KEY), (name, KEY)) == 401


def test_health_and_the_secret_addresses_of_files_need_no_key():
    assert fetch(locked(), "GET", "/health").status_code == fetch(locked(), "GET", "/ready").status_code == 200
    assert fetch(locked(), "GET", "/v1/images/nothing/content").status_code == 404
    for closed in ("content", "a/b/content", "nothing/content/", "generations"):
        assert fetch(locked(), "GET", f"/v1/images/{closed}").status_code == 401
    assert fetch(locked(), "GET", "/healthy").status_code == 401


def test_the_key_may_come_from_the_environment_and_the_setting_goes_first(monkeypatch):
    monkeypatch.setenv("DITRELAY_API_KEY", "from outside")
    assert ServerArgs().client_key() == "from outside"
    assert ServerArgs(api_key=KEY).client_key() == KEY
    assert fetch(FakeEngine(), "GET", "/v1/models").status_code == 401
    monkeypatch.delenv("DITRELAY_API_KEY")
    assert ServerArgs().client_key() is None


def test_a_page_of_another_web_site_draws_nothing_and_may_only_link_here():
    def sent(engine: FakeEngine, method: str, address: str, site: str | None) -> httpx.Response:
        headers = {} if site is None else {"Sec-Fetch-Site": site}
        return fetch(
            engine, method, address, headers=headers, files={"prompt": (None, "a cat")} if method == "POST" else None
        )

    engine = FakeEngine()
    refused = sent(engine, "POST", "/v1/videos", "cross-site")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "cross_site_request")
    assert sent(engine, "DELETE", "/v1/videos/a", "cross-site").status_code == 403
    assert sent(engine, "GET", "/v1/models", "cross-site").status_code == 200
    assert sent(engine, "POST", "/v1/videos", "same-site").status_code == 403  # another port of this machine, say
    for site in (None, "same-origin", "none"):
        assert sent(engine, "POST", "/v1/videos", site).json()["error"]["code"] == "unsupported_model"
    assert (
        fetch(engine, "POST", ADDRESS, headers={"Sec-Fetch-Site": "cross-site"}, json={"prompt": "a"}).status_code
        == 403
    )
    assert not engine.tickets


def test_with_the_key_a_page_of_another_web_site_draws():
    headers = {"Authorization": f"Bearer {KEY}", "Sec-Fetch-Site": "cross-site"}
    assert fetch(locked(), "POST", ADDRESS, headers=headers, json={"prompt": "a cat"}).status_code == 200


LAN, HERE = "http://192.0.2.7:30000", "http://127.0.0.1:30000"


def status_of(base: str, method: str = "POST", args: ServerArgs | None = None, **headers: str) -> int:
    """Of a request with these headers to a server at ``base``."""
    engine = FakeEngine(args=args) if args else FakeEngine()
    how = {"json": {"prompt": "a"}} if method == "POST" else {}
    address = ADDRESS if method == "POST" else "/v1/models"
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = fetch(engine, method, base + address, headers=sent, **how)
    assert answer.status_code == 200 or not engine.tickets
    return answer.status_code


@pytest.mark.parametrize("base", [LAN, HERE])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_an_origin_of_another_site_alone_is_refused_wherever_the_server_listens(base, method):
    """Browsers send no ``Sec-Fetch-Site`` to plain http at another machine."""
    host = base.removeprefix("http://")
    for strange in (
        "http://evil.example",
        "null",
        f"http://{host.partition(':')[0]}",
        f"https://{host}.evil.example",
        f"http://{host}1",
        f"http://evil.example@{host}",
        host,
        "chrome-extension://abc",
    ):
        assert status_of(base, method, Origin=strange) == 403, strange
    assert status_of(base, method, Origin=base) == status_of(base, method) == 200


def test_the_refusal_of_another_sites_page_says_what_is_allowed():
    error = fetch(FakeEngine(), "POST", LAN + ADDRESS, headers={"Origin": "http://evil.example"}, json={}).json()
    assert "http://evil.example" in error["error"]["message"] and "--cors-origin" in error["error"]["message"]


def test_what_the_browser_says_goes_before_the_origin():
    assert status_of(HERE, Origin="https://draw.example", Sec_Fetch_Site="same-origin") == 200  # a proxy hides the name
    assert status_of(HERE, Origin=HERE, Sec_Fetch_Site="cross-site") == 403
    assert status_of(HERE, "GET", Sec_Fetch_Site="same-site") == 200  # a link, a picture


def test_behind_a_proxy_the_page_has_the_name_that_the_proxy_forwards():
    ours = ServerArgs(served_model_name="tiny", allowed_hosts="draw.example")
    assert status_of(HERE, args=ours, Origin="https://draw.example", Host="draw.example") == 200
    assert status_of(HERE, args=ours, Origin="https://draw.example", X_Forwarded_Host="draw.example") == 200
    assert status_of(HERE, args=ours, Origin="https://draw.example") == 403
    public = ServerArgs(served_model_name="tiny", public_url="https://draw.example/x")
    assert status_of(HERE, args=public, Origin="https://draw.example") == 200
    assert status_of(HERE, args=public, Origin=HERE) == 200
    assert status_of(HERE, args=public, Origin="https://evil.example") == 403


def test_pages_of_the_sites_that_are_named_use_the_server_and_no_others():
    site = "http://localhost:3000"
    for key in (None, KEY):
        args = ServerArgs(api_key=key, served_model_name="tiny", cors_origin=f"{site},https://a.example")
        right = {"Authorization": f"Bearer {KEY}"} if key else {}
        asked = {"Origin": site, "Access-Control-Request-Method": "POST"}
        before = fetch(FakeEngine(args=args), "OPTIONS", HERE + ADDRESS, headers=asked)
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, site)
        sent = {"Origin": site, "Sec-Fetch-Site": "same-site", **right}
        answer = fetch(FakeEngine(args=args), "POST", HERE + ADDRESS, headers=sent, json={"prompt": "a"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, site)
        other = {"Origin": "http://localhost:3001", **right}
        refused = fetch(FakeEngine(args=args), "POST", HERE + ADDRESS, headers=other, json={"prompt": "a"})
        assert "access-control-allow-origin" not in refused.headers
        assert refused.status_code == (200 if key else 403)
    wide = ServerArgs(served_model_name="tiny", cors_origin="*")
    assert status_of(HERE, args=wide, Origin="https://any.example", Sec_Fetch_Site="cross-site") == 200


def from_host(engine: FakeEngine, host: str, base: str = "http://127.0.0.1:30000") -> httpx.Response:
    return fetch(engine, "GET", f"{base}/v1/models", headers={"Host": host})


@pytest.mark.parametrize(
    "base", [LAN, HERE, "http://127.1.2.3:1", "http://[::1]:30000", "http://[::ffff:127.0.0.1]:80", "http://[fd00::1]"]
)
def test_a_site_whose_name_points_to_this_machine_reads_nothing(base):
    for host in (
        "evil.example",
        "evil.example:30000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[",
        "x:y:z",
    ):
        refused = from_host(FakeEngine(), host, base)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "strange_host"), host
    assert "'evil.example'" in from_host(FakeEngine(), "evil.example", base).json()["error"]["message"]


def test_the_machines_own_names_and_any_address_read():
    for host in (
        "localhost",
        "LOCALHOST:30000",
        "127.0.0.1:30000",
        "[::1]:30000",
        "192.0.2.7",
        "a.localhost",
        "box.local",
    ):
        assert from_host(FakeEngine(), host).status_code == 200, host
    assert from_host(FakeEngine(), socket.gethostname()).status_code == 200


def test_a_name_without_a_dot_is_a_machine_of_the_network_but_none_that_calls_itself():
    assert from_host(FakeEngine(), "ditrelay:30000", LAN).status_code == 200
    assert from_host(FakeEngine(), "ditrelay:30000", HERE).status_code == 403


def test_further_names_are_allowed_by_name():
    args = ServerArgs(served_model_name="tiny", allowed_hosts="draw.example,*.b.example", public_url="http://c.example")
    for host, status in {
        "draw.example": 200,
        "DRAW.example.:30000": 200,
        "x.draw.example": 403,
        "a.b.example": 200,
        "b.example": 403,
        "evilb.example": 403,
        "c.example": 200,
        "localhost": 200,
    }.items():
        assert from_host(FakeEngine(args=args), host, LAN).status_code == status, host
    anything = ServerArgs(served_model_name="tiny", allowed_hosts="*")
    assert from_host(FakeEngine(args=anything), "evil.example", LAN).status_code == 200


def test_with_a_key_a_server_has_whatever_name_its_owner_gives_it():
    headers = {"Authorization": f"Bearer {KEY}", "Host": "pictures.example"}
    assert fetch(locked(), "GET", "http://127.0.0.1:30000/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_key_does_not_leave_the_server_open(monkeypatch, blank):
    with pytest.raises(ConfigError, match="api_key"):
        ServerArgs(api_key=blank)
    monkeypatch.setenv("DITRELAY_API_KEY", blank)
    with pytest.raises(ConfigError, match="DITRELAY_API_KEY: it is set and empty"):
        ServerArgs().client_key()


def test_the_key_is_in_no_text_about_the_settings():
    assert KEY not in repr(locked().args)


def test_a_body_larger_than_the_setting_is_413():
    engine = FakeEngine(args=ServerArgs(max_request_bytes=100))
    assert fetch(engine, "POST", ADDRESS, json={"prompt": "x" * 50}).status_code == 200
    response = fetch(engine, "POST", ADDRESS, json={"prompt": "x" * 100})
    assert response.status_code == 413
    assert "--max-request-bytes" in response.json()["error"]["message"]


def test_bodies_that_are_too_much_together_are_429_until_one_is_answered():
    async def main() -> None:
        engine = FakeEngine(args=ServerArgs(max_request_bytes=1000, max_total_bytes=1500))
        async with running(engine) as client:
            body = {"prompt": "[wait]" + "x" * 900}
            first = asyncio.create_task(client.post(ADDRESS, json=body))
            await settle()
            refused = await client.post(ADDRESS, json=body)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "9"  # the engine's, by its measured rate
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_bytes")
            assert "--max-total-bytes" in error["message"]
            assert (await client.post(ADDRESS, json={"prompt": "small"})).status_code == 200
            engine.tickets[0].finish()
            assert (await first).status_code == 200
            assert (await client.post(ADDRESS, json={"prompt": "x" * 900})).status_code == 200

    asyncio.run(main())


def test_the_total_must_hold_one_request():
    with pytest.raises(ConfigError, match="max_total_bytes"):
        ServerArgs(max_request_bytes=2000, max_total_bytes=1999)
