"""The files of the playground and how they are served. Needs no browser."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from server_fakes import FakeEngine, running

import ditrelay
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.timeline import PALETTE

FOLDER = Path(ditrelay.__file__).parent / "assets" / "playground"
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
KEY = "secret"


def get(address: str, *, key: str | None = None, method: str = "GET", **headers: str) -> httpx.Response:
    async def main() -> httpx.Response:
        engine = FakeEngine(args=ServerArgs(served_model_name="tiny", api_key=key))
        async with running(engine) as client:
            return await client.request(method, address, headers=headers)

    return asyncio.run(main())


def test_browsers_get_the_page_and_programs_json_at_the_same_address():
    page = get("/", **BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>ditrelay playground</title>" in page.text
    assert page.headers["vary"] == "Accept"
    assert get("/").json()["model"] == "tiny"
    assert get("/", Accept="application/json").json()["name"] == "ditrelay"


def test_the_policy_lets_nothing_in_from_elsewhere_and_no_inline_code():
    for address in ("/", "/playground/main.js", "/playground/style.css"):
        headers = get(address, **BROWSER).headers
        policy = dict(each.strip().split(" ", 1) for each in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-cache"


def test_with_a_key_the_page_can_be_had_without_it_and_nothing_else_can():
    assert get("/", key=KEY, **BROWSER).status_code == 200
    assert get("/playground/main.js", key=KEY).status_code == 200
    assert get("/", key=KEY).status_code == 401
    for closed in ("/playground", "/playgrounds/main.js", "/v1/models", "/playground/../v1/models"):
        assert get(closed, key=KEY, **BROWSER).status_code == 401


def test_there_is_nothing_to_find_beside_the_files_of_the_page():
    for absent in (
        "nothing.js",
        "",
        "../emoji/model_index.json",
        "%2e%2e/emoji/model_index.json",
        "..%2ftimeline.html",
    ):
        answer = get(f"/playground/{absent}")
        assert answer.status_code == 404, absent
        assert answer.json()["error"]["code"] == "unknown_url"
    assert get("/playground/main.js", method="POST").status_code == 405


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_each_file_is_served_as_it_is_with_its_type(path):
    answer = get(f"/playground/{path.name}")
    kinds = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
    assert answer.content == path.read_bytes()
    assert answer.headers["content-type"] == f"{kinds[path.suffix]}; charset=utf-8"


def test_a_file_that_has_not_changed_is_not_sent_again():
    tag = get("/playground/main.js").headers["etag"]
    assert get("/playground/main.js", **{"If-None-Match": tag}).status_code == 304


def test_what_a_file_names_is_there_and_nothing_is_asked_of_other_servers():
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r'(?:from|import) "\./([^"]+)"', text) + re.findall(r'"playground/([^"]+)"', text):
            assert (FOLDER / name).is_file(), f"{path.name} names {name}"
        assert re.findall(r"https?://(?!www\.w3\.org/)\S+", text) == [], path.name


def test_no_file_has_inline_code_or_makes_html_of_text():
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|<script(?![^>]*src=)|\son[a-z]+=", page)
    for path in FOLDER.glob("*.js"):
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
        assert not re.search(forbidden, path.read_text(encoding="utf-8")), path.name


def test_the_page_names_no_path_of_its_server_from_the_root():
    """So that it works under any path of a proxy."""
    for path in FOLDER.iterdir():
        rooted = r"""(?:href|src|action)=["']/[^"']*|["']/(?:v1|playground|docs|ready|metrics)\b|`/v1/[^`]*\$\{"""
        assert re.findall(rooted, path.read_text(encoding="utf-8")) == [], path.name


def luminance(colour: str) -> float:
    """Of ``#rrggbb``, relative (WCAG 2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lower, higher = sorted((luminance(one), luminance(other)))
    return (higher + 0.05) / (lower + 0.05)


@pytest.mark.parametrize("colour", PALETTE)
def test_white_text_is_readable_on_each_colour(colour):
    assert contrast(colour, "#ffffff") >= 4.5


def test_every_colour_of_text_is_readable_on_what_it_is_written_on_light_and_dark():
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", part)) for part in style.split("@media", 2)[:2])
    for scheme in (light, dark):
        for text in ("ink", "grey", "pale", "bad"):
            for ground in ("paper", "surface", "raised", "lane"):
                found = contrast(scheme[text], scheme[ground])
                assert found >= 4.5, f"{text} {scheme[text]} on {ground} {scheme[ground]}: {found:.2f}"
        assert contrast(scheme["accent-ink"], scheme["accent"]) >= 4.5


def test_the_page_has_the_colours_of_the_written_timelines():
    text = (FOLDER / "numbers.js").read_text(encoding="utf-8")
    assert tuple(re.findall(r'"(#[0-9a-f]{6})"', text.split("];")[0])) == PALETTE


def test_no_file_is_more_than_one_room():
    for path in FOLDER.iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name


def test_models_say_what_a_request_may_ask_for():
    [model] = get("/v1/models").json()["data"]
    limits = model["limits"]
    assert (limits["media"], limits["clip"], limits["default_steps"]) == ("image", None, 8)
    assert (limits["min_steps"], limits["max_steps"], limits["max_guidance_scale"]) == (1, 1000, 1000.0)
    assert limits["size"] == {
        "multiple": 16,
        "max_side": 1024,
        "max_pixels": 262144,
        "default_width": 128,
        "default_height": 128,
    }
