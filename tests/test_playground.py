"""The playground in a headless Chromium, on a real server: three ranks of a model whose stages only sleep."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from playground_browser import (
    ALL_STAGES_AT_WORK,
    BEARER,
    HAS_COLOUR,
    NOTE_PROGRESS,
    KeyedServer,
    ask,
    card,
    chromium,
    colour_of,
    number,
    setting,
    until,
    watched_page,
)

from ditrelay.runtime.timeline import PALETTE

MODEL = "builtin:timed?encode=0.3&denoise=0.9&decode=0.03&steps=6&conditioning_mb=0.1&latents_mb=0.1"
RANKS = ("--device", "cpu", "--enable-disagg", "--num-gpus", "3", "--num-non-dit-ranks", "1")
STEPS = 6


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser: Any) -> Iterator[KeyedServer]:
    with KeyedServer("--model-path", MODEL, *RANKS) as server:
        yield server


@pytest.fixture
def opened(browser: Any, server: KeyedServer):
    def opened(**how: Any) -> AbstractContextManager[Any]:
        return watched_page(browser, server.url, **how)

    return opened


def test_a_prompt_becomes_the_picture_that_the_api_draws_with_that_seed(opened, server):
    with opened() as page:
        setting(page, "seed", "7")
        ask(page, "a red apple")
        page.wait_for_selector(".card.done img")
        assert page.locator(".card").count() == 1
        assert card(page).locator(".prompt").inner_text() == "a red apple"
        assert re.fullmatch(r"seed 7 · \d.*s", card(page).locator(".numbers").inner_text())
        assert page.evaluate("document.querySelector('.card.done img').naturalWidth") == 32
        assert page.evaluate("document.querySelector('.card.done img').naturalHeight") == 32

        with page.expect_download() as saving:
            card(page).locator("a[download]").click()
        assert saving.value.suggested_filename == "a-red-apple-7.png"
        saved = saving.value.path().read_bytes()
    body = {"prompt": "a red apple", "seed": 7, "response_format": "url"}
    drawn = httpx.post(f"{server.url}/v1/images/generations", headers=BEARER, json=body, timeout=60).json()
    assert saved == httpx.get(drawn["data"][0]["url"], timeout=10).content


def test_the_page_says_what_is_served_and_shows_a_lane_for_each_rank_and_stage(opened):
    with opened() as page:
        assert page.inner_text("#ranks") == "2 DiT + 1 non-DiT ranks"
        assert page.inner_text("#model").startswith("builtin:timed")
        until(page, "document.getElementById('lanes').ariaLabel.includes('decode on rank 2: nothing')")
        words = page.get_attribute("#lanes", "aria-label")
        for lane in ("encode on rank 2", "denoise on rank 0", "denoise on rank 1", "decode on rank 2"):
            assert lane in words
        # What the model doesn't take is not asked for.
        assert page.is_hidden("#guidance_scale") and page.is_hidden("#negative_prompt") and page.is_hidden("#seconds")


def test_stages_of_different_requests_are_seen_at_work_at_once_in_the_colours_of_their_cards(opened):
    with opened(wrong=("willReadFrequently",)) as page:  # the test itself reads the canvas
        setting(page, "count", "3")
        ask(page, "three cats")
        ask(page, "three dogs")
        # Six requests on two DiT ranks: at some moment each stage has another one.
        until(page, ALL_STAGES_AT_WORK)
        before = page.evaluate("document.getElementById('lanes').toDataURL()")
        for place in range(4, 6):  # the first two are on their way
            assert page.evaluate(HAS_COLOUR, colour_of(page, place))
        page.wait_for_timeout(300)
        assert page.evaluate("document.getElementById('lanes').toDataURL()") != before, "the lanes stand still"
        until(page, "document.querySelectorAll('.card.done').length === 6")
        assert len({colour_of(page, place) for place in range(6)}) == 6
        numbers = [int(text) for text in page.locator(".badge").all_inner_texts()]
        assert numbers == list(range(numbers[0], numbers[0] - 6, -1))
        assert "overlapped for" in page.inner_text("#load")
        until(page, "document.getElementById('placement').textContent.includes('to denoise and')")


def test_progress_is_told_by_step_with_previews_before_the_picture(opened):
    with opened() as page:
        page.evaluate(NOTE_PROGRESS)
        ask(page, "a slow snail")
        page.wait_for_selector(".card.done")
        seen = json.loads(page.evaluate("JSON.stringify({...seen, previews: seen.previews.size})"))
        steps = [text for text in seen["states"] if text.startswith("Step")]
        assert steps == [f"Step {step} of {STEPS}" for step in range(1, STEPS + 1)]
        assert seen["values"] == sorted(seen["values"])
        assert seen["previews"] >= 1
        assert page.inner_text("#said") == f"Picture {number(page)} is finished: a slow snail"


def test_the_server_stops_drawing_what_is_cancelled(opened, server):
    with opened() as page:
        setting(page, "num_inference_steps", "900")  # three minutes
        ask(page, "a very slow snail")
        until(page, "document.querySelector('.card .state').textContent.startsWith('Step')")
        page.get_by_role("button", name="Cancel Picture").click()
        page.wait_for_selector(".card.cancelled")
        until(page, "document.getElementById('load').textContent.startsWith('At rest')")
    jobs = httpx.get(f"{server.url}/v1/jobs", headers=BEARER, timeout=10).json()["data"]
    assert [job["status"] for job in jobs if job["prompt"] == "a very slow snail"] == ["cancelled"]


def test_a_card_and_its_bars_point_at_each_other(opened):
    with opened() as page:
        ask(page, "a cat")
        page.wait_for_selector(".card.done")
        until(page, "document.getElementById('load').textContent.startsWith('At rest')")
        page.wait_for_timeout(1500)  # until time stands still
        box = page.locator("#lanes").bounding_box()
        for x in range(int(box["width"]) - 60, 160, -6):  # along the denoise lanes, to the first bar from the right
            page.mouse.move(box["x"] + x, box["y"] + 65)
            if page.is_visible("#tip"):
                break
            page.mouse.move(box["x"] + x, box["y"] + 122)
            if page.is_visible("#tip"):
                break
        assert re.match(
            rf"{number(page)} · a cat\s*denoise on rank \d, step {STEPS} of {STEPS}: ", page.inner_text("#tip")
        )
        assert "lit" in card(page).get_attribute("class")
        page.mouse.move(1, 1)
        assert page.is_hidden("#tip")


def test_a_cancel_that_does_not_get_through_is_said_until_there_is_other_news(opened):
    with opened(wrong=("Failed to load",)) as page:
        page.route("**/cancel", lambda route: route.abort())
        setting(page, "num_inference_steps", "200")
        ask(page, "a cat")
        until(page, "document.querySelector('.card .state').textContent.startsWith('Step')")
        page.evaluate(NOTE_PROGRESS)
        card(page).get_by_role("button", name="Cancel").click()
        until(page, "window.seen.states.includes('The server cannot be reached.')")
        until(page, "document.querySelector('.card .state').textContent.startsWith('Step')")
        page.unroute("**/cancel")
        card(page).get_by_role("button", name="Cancel").click()
        page.wait_for_selector(".card.cancelled")


def test_requests_of_others_are_shown_too(opened, server):
    with opened() as page:
        httpx.post(f"{server.url}/v1/images/generations", headers=BEARER, json={"prompt": "a cat"}, timeout=60)
        until(page, "document.getElementById('load').textContent.startsWith('At rest')")
        assert page.locator(".card").count() == 0
        ask(page, "a dog")
        page.wait_for_selector(".card.done")
        assert page.evaluate(HAS_COLOUR, PALETTE[(number(page) - 2) % len(PALETTE)])


def test_more_requests_are_at_the_server_at_once_than_a_browser_has_connections(opened, server):
    with opened() as page:
        setting(page, "num_inference_steps", "900")
        for place in range(9):
            ask(page, f"a cat, number {place}")
        until(page, "document.querySelectorAll('.card .numbers').length === 9")
        until(page, "[...document.querySelectorAll('.card .state')].every((each) => each.textContent !== '')")
        until(page, "document.querySelector('.card .state').textContent.startsWith('Waiting, ')")
        jobs = httpx.get(f"{server.url}/v1/jobs", headers=BEARER, timeout=10).json()["data"]
        assert sum(job["prompt"].startswith("a cat, number") for job in jobs) == 9
        page.click("#cancel-all")
        until(page, "document.querySelectorAll('.card.cancelled').length === 9")


def test_a_lost_rank_is_named_until_it_is_back_and_what_it_drew_is_drawn(opened, server):
    with opened(wrong=("503",)) as page:
        setting(page, "num_inference_steps", "40")
        setting(page, "count", "2")
        ask(page, "a cat")
        until(page, "document.querySelectorAll('.card .preview').length > 0")
        ranks = httpx.get(f"{server.url}/v1/topology", headers=BEARER, timeout=10).json()["ranks"]
        os.kill(ranks[1]["pid"], signal.SIGKILL)
        until(page, "/rank 1 is (down|starting|replaced)/.test(document.getElementById('health').textContent)")
        until(page, "document.querySelectorAll('.card.done').length === 2")
        until(page, "document.getElementById('health').textContent === 'ready'")
