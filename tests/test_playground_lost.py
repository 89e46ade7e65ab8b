"""The playground where its server goes, comes back, keeps still, sits behind a proxy, or has a key of any letters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playground_browser import KEY, ask, card, chromium, setting, until, watched_page
from playground_desk import Desk

# What the browser itself complains of while there is no server.
GONE = ("Failed to load", "ERR_", "net::")
STATE = "(document.querySelector('.card .state')?.textContent ?? '')"
HEALTH = "document.getElementById('health').textContent"
# The page waits for answers a tenth of what it does otherwise.
IMPATIENT = "const real = AbortSignal.timeout; AbortSignal.timeout = (each) => real.call(AbortSignal, each / 10);"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def test_a_lost_server_is_said_on_the_card_and_a_new_one_is_asked_for_what_is_lost(browser):
    with Desk() as desk, watched_page(browser, desk.url, wrong=(*GONE, "404")) as page:
        setting(page, "seed", "7")
        ask(page, "a cat [wait]")
        until(page, f"{STATE}.includes('1 min 58 s left')")
        setting(page, "seed", "8")
        desk.stop()
        until(page, f"{STATE} === 'No answer from the server'")
        until(page, f"{HEALTH} === 'no answer from the server'")
        ask(page, "a dog")
        until(page, f"{STATE} === 'No answer from the server: this is sent when it is back'")
        desk.start()
        page.locator(".card.done", has_text="a dog").wait_for()
        until(page, f"{HEALTH} === 'ready'")
        until(page, "document.querySelector('.card:last-child .state').textContent.includes('left')")
        [again] = desk.asked("a cat [wait]")
        assert again.seed == 7, "it is not the picture that was lost"
        desk.finish()
        page.locator(".card.done", has_text="a cat").wait_for()
        assert page.locator(".card").count() == len(desk.engine.tickets) == 2


def test_a_server_that_has_another_model_now_is_not_asked_for_what_is_lost(browser):
    with Desk() as desk, watched_page(browser, desk.url, wrong=(*GONE, "404")) as page:
        ask(page, "a cat [wait]")
        until(page, f"{STATE}.includes('left')")
        desk.stop()
        until(page, f"{STATE} === 'No answer from the server'")
        desk.start(served_model_name="large")
        page.wait_for_selector(".card.failed")
        assert card(page).locator(".state").inner_text().endswith("with another model; this is lost.")
        until(page, f"{HEALTH} === 'ready, with another model now: reload this page'")
        assert desk.engine.tickets == []


def test_a_server_that_keeps_still_is_said_to_be_lost(browser):
    with Desk() as desk, watched_page(browser, desk.url, wrong=GONE, init=IMPATIENT) as page:
        desk.silence()
        page.wait_for_selector("#health[data-state=lost]")
        desk.speak()
        page.wait_for_selector("#health[data-state=ready]")
        ask(page, "a cat")
        page.wait_for_selector(".card.done")


def test_an_order_of_a_page_that_is_off_line_is_sent_when_it_is_back(browser):
    with Desk() as desk, watched_page(browser, desk.url, wrong=GONE) as page:
        page.context.set_offline(True)
        page.wait_for_selector("#health[data-state=lost]")
        ask(page, "a cat")
        until(page, f"{STATE} === 'No answer from the server: this is sent when it is back'")
        page.context.set_offline(False)
        page.wait_for_selector(".card.done")
        assert len(desk.asked("a cat")) == 1


def test_under_a_path_of_a_proxy_that_the_server_does_not_know_of_everything_works(browser):
    with Desk(prefix="/studio/draw") as desk, watched_page(browser, desk.url) as page:
        ask(page, "a cat")
        page.wait_for_selector(".card.done")
        until(page, "document.querySelector('.card.done .open img').naturalWidth === 64")
        assert page.evaluate("Object.keys(localStorage)") == ["ditrelay-jobs /studio/draw/"]
        page.reload()
        page.wait_for_selector(".card.done")
        for title in ("API", "Topology", "Metrics"):
            page.click(f"footer >> text={title}")
            page.wait_for_selector("#reader-save:not([hidden])")
            page.keyboard.press("Escape")


def test_where_no_key_is_asked_for_the_links_at_the_foot_are_links_beside_the_page(browser):
    with Desk(key=None, prefix="/studio") as desk, watched_page(browser, desk.url, key=None) as page:
        page.wait_for_selector("#health[data-state=ready]")
        links = [page.get_attribute(f"footer a >> nth={place}", "href") for place in range(3)]
        assert links == ["docs", "v1/topology", "metrics"]


def test_with_a_key_what_is_linked_at_the_foot_opens_in_the_page(browser):
    found = {"API": "POST /v1/images/generations", "Topology": '"ranks"', "Metrics": "# HELP"}
    with Desk() as desk, watched_page(browser, desk.url) as page:
        for title, text in found.items():
            page.click(f"footer >> text={title}")
            page.locator("#reader-text", has_text=text).wait_for()
            assert page.inner_text("#reader-title") == title
            page.click("#reader-close")
        assert page.url == desk.url


def test_a_key_of_any_letters_is_sent_and_a_wrong_one_leaves_no_dead_tab(browser):
    with Desk(key="ключ 鍵") as desk, watched_page(browser, desk.url, key=None, wrong=("401",)) as page:
        for wrong in ("пароль", KEY):
            page.wait_for_selector("#key-dialog[open]")
            page.fill("#key", wrong)
            page.keyboard.press("Enter")
            until(page, "document.getElementById('key-error').textContent === 'The server does not take this key.'")
        page.fill("#key", "a\tb")
        page.keyboard.press("Enter")
        until(page, "document.getElementById('key-error').textContent.includes('control characters')")
        page.fill("#key", "ключ 鍵")
        page.keyboard.press("Enter")
        page.wait_for_selector("#health[data-state=ready]")
        page.reload()
        page.wait_for_selector("#health[data-state=ready]")
        page.evaluate("sessionStorage.setItem('ditrelay-key', 'a\\nb')")  # as an older page may have left it
        page.reload()
        page.wait_for_selector("#key-dialog[open]")


def test_the_key_is_asked_for_and_a_wrong_one_is_refused(browser):
    with Desk() as desk, watched_page(browser, desk.url, key=None, wrong=("401",)) as page:
        page.wait_for_selector("#key-dialog[open]")
        for _ in range(3):  # the browser heeds a page that objects only once
            page.keyboard.press("Escape")
            page.wait_for_timeout(50)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "guessed")
        page.keyboard.press("Enter")
        until(page, "document.getElementById('key-error').textContent !== ''")
        assert page.inner_text("#key-error") == "The server does not take this key."
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#health[data-state=ready]")
        ask(page, "a cat")
        page.wait_for_selector(".card.done")
        assert page.evaluate("JSON.stringify({...localStorage})").count(KEY) == 0
        page.reload()
        page.wait_for_selector("#health[data-state=ready]")
