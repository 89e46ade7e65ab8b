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
    PHONE,
    KeyedServer,
    ask,
    card,
    chromium,
    colour_of,
    is_as_wide_as_the_screen,
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


def test_one_of_several_is_cancelled_and_the_others_are_finished(opened):
    with opened() as page:
        setting(page, "count", "3")
        ask(page, "a cat")
        until(page, "document.querySelectorAll('.card .state')[1].textContent.length > 0")
        card(page, 1).get_by_role("button", name="Cancel").click()
        until(page, "document.querySelectorAll('.card.done').length === 2")
        assert page.locator(".card.cancelled").count() == 1
        assert card(page, 1).locator(".state").inner_text() == "Cancelled"


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


def test_everything_can_be_done_by_keyboard(opened):
    with opened() as page:
        setting(page, "num_inference_steps", "900")
        page.focus("#prompt")
        page.keyboard.type("a cat")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("and a dog")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('.card .state')?.textContent.startsWith('Step')")
        assert card(page).locator(".prompt").evaluate("each => each.textContent") == "a cat\nand a dog"

        reached = []
        for _ in range(25):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))
            ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert ring != "none", f"{reached[-1]} has the focus, and nobody can see it"
            if reached[-1] == "lanes":
                page.keyboard.press("ArrowLeft")  # to the newest bar
                page.wait_for_selector("#tip:not([hidden])")
                assert "a cat" in page.inner_text("#tip") and "rank" in page.inner_text("#said")
                assert "lit" in (card(page).get_attribute("class") or "")
            if (reached[-1] or "").startswith("Cancel Picture"):
                break
        assert {"draw", "shape", "count", "num_inference_steps", "seed", "lanes", "window"} <= set(reached)
        page.keyboard.press("Enter")
        page.wait_for_selector(".card.cancelled")
        # The button is gone: the focus stays on the card.
        assert page.evaluate("document.querySelector('.card').contains(document.activeElement)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_scrolls_sideways(opened, scheme):
    with opened(viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True, device_scale_factor=2) as page:
        assert is_as_wide_as_the_screen(page)
        ask(page, "a word that does not end: " + "snail" * 40)
        page.wait_for_selector(".card.working")
        assert is_as_wide_as_the_screen(page)
        page.click("#settings summary")
        assert page.is_visible("#seed") and is_as_wide_as_the_screen(page)
        page.wait_for_selector(".card.done")
        page.tap(".card .open")
        assert page.is_visible("#viewer-save") and is_as_wide_as_the_screen(page)
        red = int(re.search(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
        assert (red > 200) == (scheme == "light")


def test_with_less_motion_asked_for_nothing_is_animated(opened):
    with opened(reduced_motion="reduce") as page:
        ask(page, "a cat")
        page.wait_for_selector(".card.working")
        assert page.evaluate("document.getAnimations().length") == 0
        page.wait_for_selector(".card.done")
        assert page.evaluate("document.getAnimations().length") == 0


def test_the_picture_opens_large_with_where_its_time_went_and_escape_closes_it(opened):
    with opened() as page:
        setting(page, "seed", "3")
        ask(page, "a cat")
        page.wait_for_selector(".card.done")
        card(page).locator(".open").click()
        assert page.inner_text("#viewer-prompt") == "a cat"
        assert page.inner_text("#viewer-facts").split("\n")[:2] == ["Seed", "3"]
        assert {"encode", "denoise", "decode"} <= set(page.inner_text("#viewer-times").split("\n"))
        page.keyboard.press("Escape")
        assert page.is_hidden("#viewer")


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


def test_what_is_wrong_is_said_in_words_at_its_field(opened):
    with opened(wrong=("400",)) as page:
        ask(page, "   ")
        assert page.inner_text("#order-error") == "Say what to draw."
        setting(page, "num_inference_steps", "0")
        ask(page, "a cat")
        assert page.inner_text("#order-error").startswith("Steps: ")
        assert page.locator(".card").count() == 0

        page.evaluate("document.getElementById('num_inference_steps').max = ''")  # the server has the last word
        setting(page, "num_inference_steps", "5000")
        ask(page, "a cat")
        page.wait_for_selector(".card.failed")
        assert "allowed: 1 to 1000" in page.inner_text("#order-error")
        assert "allowed: 1 to 1000" in card(page).locator(".state").inner_text()
        assert page.get_attribute("#num_inference_steps", "aria-invalid") == "true"

        setting(page, "num_inference_steps", "")
        ask(page, "a cat")
        page.wait_for_selector(".card.done")
        assert page.inner_text("#order-error") == ""


def test_the_key_is_asked_for_and_a_wrong_one_is_refused(opened):
    with opened(key=None, wrong=("401",)) as page:
        page.wait_for_selector("#key-dialog[open]")
        for _ in range(3):  # the browser heeds a page that objects only once
            page.keyboard.press("Escape")
            page.wait_for_timeout(50)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "guessed")
        page.keyboard.press("Enter")
        until(page, "document.getElementById('key-error').textContent !== ''")
        assert page.inner_text("#key-error") == "The server does not take this key."
        page.fill("#key", BEARER["Authorization"].removeprefix("Bearer "))
        page.keyboard.press("Enter")
        page.wait_for_selector("#health[data-state=ready]")
        ask(page, "a cat")
        page.wait_for_selector(".card.done")
        assert page.evaluate("Object.keys(localStorage).length") == 0
        page.reload()
        page.wait_for_selector("#health[data-state=ready]")


def test_a_broken_connection_is_said_and_made_again(opened):
    with opened(wrong=("ERR_INTERNET_DISCONNECTED", "ERR_NETWORK", "Failed to load")) as page:
        page.context.set_offline(True)
        page.wait_for_selector("#health[data-state=lost]")
        ask(page, "a cat")
        page.wait_for_selector(".card.failed")
        assert card(page).locator(".state").inner_text() == "The server cannot be reached."
        page.context.set_offline(False)
        page.wait_for_selector("#health[data-state=ready]")
        card(page).get_by_role("button", name="again").click()
        page.wait_for_selector(".card.done")


def test_a_picture_whose_file_does_not_come_at_once_is_asked_for_again(opened):
    with opened(wrong=("Failed to load",)) as page:
        page.route("**/content", lambda route: route.abort(), times=1)
        ask(page, "a cat")
        page.wait_for_selector(".card:not(.working)")
        assert page.is_visible(".card.done"), card(page).locator(".state").inner_text()


def test_again_is_with_the_settings_of_that_picture_not_with_those_for_the_next(opened, server):
    with opened() as page:
        setting(page, "num_inference_steps", "2")
        ask(page, "a cat")
        page.wait_for_selector(".card.done")
        setting(page, "num_inference_steps", "3")
        card(page).get_by_role("button", name="again").click()
        until(page, "document.querySelectorAll('.card.done').length === 2")
        newest, first = httpx.get(f"{server.url}/v1/jobs?limit=2", headers=BEARER, timeout=10).json()["data"]
        assert (newest["total_steps"], first["total_steps"]) == (2, 2)


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


def test_a_prompt_is_never_taken_for_html(opened):
    with opened() as page:
        prompt = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
        ask(page, prompt)
        page.wait_for_selector(".card.done")
        card(page).locator(".open").click()
        assert card(page).locator(".prompt").inner_text() == prompt == page.inner_text("#viewer-prompt")
        assert page.locator("b", has_text="bold").count() == 0
        assert page.title() != "taken"


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


def test_a_reload_loses_no_picture_of_the_tab_and_shows_those_of_no_other(opened):
    with opened() as page, opened() as other:
        ask(page, "a cat")
        page.wait_for_selector(".card.done")
        ask(page, "a dog")
        until(page, "JSON.parse(sessionStorage.getItem('ditrelay-jobs')).length === 2")  # the server has it
        page.reload()
        page.wait_for_selector(".card.done >> nth=1")
        assert page.locator(".card .prompt").all_inner_texts() == ["a dog", "a cat"]
        other.reload()
        other.wait_for_selector("#health[data-state=ready]")
        assert other.locator(".card").count() == 0


def test_where_the_queue_is_full_the_page_says_so_and_tries_again(opened):
    refusal = {"error": {"message": "the queue is full (2 requests wait, --max-queue); try again in 1 s"}}
    with opened(wrong=("429",)) as page:
        answered = []

        def refuse_once(route: Any) -> None:
            answered.append(route)
            if len(answered) > 1:
                return route.continue_()
            return route.fulfill(status=429, headers={"Retry-After": "1"}, json=refusal)

        page.route("**/v1/images/generations", refuse_once)
        ask(page, "a cat")
        until(page, "document.querySelector('.card .state').textContent.startsWith('the queue is full')")
        page.wait_for_selector(".card.done")
        assert len(answered) == 2


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


def test_cancel_all_and_clear_finished(opened):
    with opened() as page:
        setting(page, "num_inference_steps", "900")
        setting(page, "count", "10")
        ask(page, "a cat")
        ask(page, "a dog")
        until(page, "document.querySelector('.card:last-child .state').textContent.startsWith('Step')")
        page.click("#cancel-all")
        until(page, "document.querySelectorAll('.card.cancelled').length === 20")
        page.click("#clear")
        assert page.locator(".card").count() == 0
        assert page.is_visible("#examples")


def test_seeds_that_no_number_of_javascript_holds_are_sent_and_shown_as_they_are(opened):
    with opened() as page:
        setting(page, "seed", str(2**53 + 1))
        setting(page, "count", "2")
        ask(page, 'a "seed":7 of an apple')
        until(page, "document.querySelectorAll('.card.done').length === 2")
        shown = [card(page, place).locator(".numbers button").inner_text() for place in (1, 0)]
        assert shown == ["seed 9007199254740993", "seed 9007199254740994"]
        assert card(page).locator(".prompt").inner_text() == 'a "seed":7 of an apple'
        setting(page, "seed", "1")
        card(page).locator(".numbers button").click()
        assert page.input_value("#seed") == "9007199254740994"
        assert page.input_value("#prompt") == 'a "seed":7 of an apple'


@pytest.mark.parametrize(("typed", "meant"), [("1e3", 1000), ("1.0", 1), (str(2**63 - 1), 2**63 - 1)])
def test_a_seed_is_taken_however_it_is_written(opened, typed, meant):
    with opened() as page:
        setting(page, "seed", typed)
        ask(page, "an apple")
        page.wait_for_selector(".card.done")
        assert card(page).locator(".numbers button").inner_text() == f"seed {meant}"


def test_a_seed_that_is_none_is_refused_at_its_field(opened):
    with opened(wrong=("400",)) as page:
        for typed, reason in (("0.5", "Seed: "), ("-1", "Seed: "), (str(2**63), "seed: ")):
            setting(page, "seed", typed)
            ask(page, "an apple")
            until(page, f"document.getElementById('order-error').textContent.startsWith('{reason}')")
            assert page.get_attribute("#seed", "aria-invalid") == "true"
