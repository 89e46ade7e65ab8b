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
    assert fetch(locked(), "GET", "/ready", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    assert fetch(locked(), "GET", "/ready", headers=[right, right]).status_code == 401


def test_health_and_the_secret_addresses_of_files_need_no_key():
    assert fetch(locked(), "GET", "/health").status_code == 200
    assert fetch(locked(), "GET", "/v1/images/nothing/content").status_code == 404
    for closed in ("content", "a/b/content", "nothing/content/", "generations"):
        assert fetch(locked(), "GET", f"/v1/images/{closed}").status_code == 401
    assert fetch(locked(), "GET", "/healthy").status_code == 401


def test_the_key_may_come_from_the_environment_and_the_setting_goes_first(monkeypatch):
    monkeypatch.setenv("DITRELAY_API_KEY", "from outside")
    assert ServerArgs().client_key() == "from outside"
    assert ServerArgs(api_key=KEY).client_key() == KEY
    assert fetch(FakeEngine(), "GET", "/ready").status_code == 401
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
    for site in (None, "same-origin", "same-site", "none"):
        assert sent(engine, "POST", "/v1/videos", site).json()["error"]["code"] == "unsupported_model"
    assert (
        fetch(engine, "POST", ADDRESS, headers={"Sec-Fetch-Site": "cross-site"}, json={"prompt": "a"}).status_code
        == 403
    )
    assert not engine.tickets


def test_with_the_key_a_page_of_another_web_site_draws():
    headers = {"Authorization": f"Bearer {KEY}", "Sec-Fetch-Site": "cross-site"}
    assert fetch(locked(), "POST", ADDRESS, headers=headers, json={"prompt": "a cat"}).status_code == 200


def from_host(engine: FakeEngine, host: str, base: str = "http://127.0.0.1:30000") -> httpx.Response:
    return fetch(engine, "GET", f"{base}/v1/models", headers={"Host": host})


@pytest.mark.parametrize(
    "base", ["http://127.0.0.1:30000", "http://127.1.2.3:1", "http://[::1]:30000", "http://[::ffff:127.0.0.1]:80"]
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


def test_elsewhere_and_with_a_key_a_server_has_whatever_name_its_owner_gives_it():
    assert from_host(FakeEngine(), "pictures.example", "http://192.0.2.7:30000").status_code == 200
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
