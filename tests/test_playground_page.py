"""The page in a headless Chromium, on a server of this process whose engine draws nothing: the order and the cards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from playground_browser import (
    COVERED,
    NOTE_BLANKS,
    PHONE,
    ask,
    card,
    chromium,
    is_as_wide_as_the_screen,
    marked,
    number,
    setting,
    until,
    watched_page,
)
from playground_desk import Desk

# The jobs that the browser keeps in mind.
KEPT = "JSON.parse(localStorage.getItem('ditrelay-jobs /') ?? '[]')"

ERROR = "document.getElementById('order-error')"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def desk(browser: Any) -> Iterator[Desk]:
    with Desk() as desk:
        yield desk


@pytest.fixture
def opened(browser: Any, desk: Desk):
    def opened(query: str = "", **how: Any) -> AbstractContextManager[Any]:
        return watched_page(browser, desk.url + query, **how)

    return opened


def test_one_of_several_is_cancelled_and_the_others_are_finished(opened, desk):
    with opened() as page:
        setting(page, "count", "3")
        ask(page, "a cat [wait]")
        until(page, "document.querySelectorAll('.card .state')[1].textContent.length > 0")
        card(page, 1).get_by_role("button", name="Cancel").click()
        page.wait_for_selector(".card.cancelled")
        desk.finish()
        until(page, "document.querySelectorAll('.card.done').length === 2")
        assert page.locator(".card.cancelled").count() == 1
        assert card(page, 1).locator(".state").inner_text() == "Cancelled"


def test_everything_can_be_done_by_keyboard(opened):
    with opened() as page:
        page.focus("#prompt")
        page.keyboard.type("a cat [wait]")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("and a dog")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('.card .state')?.textContent.startsWith('Step')")
        assert card(page).locator(".prompt").evaluate("each => each.textContent") == "a cat [wait]\nand a dog"

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
def test_on_a_phone_nothing_scrolls_sideways(opened, desk, scheme):
    with opened(viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True, device_scale_factor=2) as page:
        assert is_as_wide_as_the_screen(page)
        ask(page, "a word that does not end: " + "snail" * 40 + " [wait]")
        page.wait_for_selector(".card.working")
        assert is_as_wide_as_the_screen(page)
        page.click("#settings summary")
        assert page.is_visible("#seed") and is_as_wide_as_the_screen(page)
        desk.finish()
        page.wait_for_selector(".card.done")
        page.tap(".card .open")
        assert page.is_visible("#viewer-save") and is_as_wide_as_the_screen(page)
        red = int(re.search(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
        assert (red > 200) == (scheme == "light")


def test_with_less_motion_asked_for_nothing_is_animated(opened, desk):
    with opened(reduced_motion="reduce") as page:
        ask(page, "a cat [wait]")
        page.wait_for_selector(".card.working .preview")
        assert page.evaluate("document.getAnimations().length") == 0
        desk.finish()
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
        until(page, "document.getElementById('order-error').textContent.includes('allowed: 1 to 1000')")
        assert marked(page) == ["num_inference_steps"]
        assert page.locator(".card").count() == 0, "a card is left of what was refused"

        setting(page, "num_inference_steps", "")
        ask(page, "a cat")
        page.wait_for_selector(".card.done")
        assert page.inner_text("#order-error") == ""


def test_a_picture_whose_file_does_not_come_at_once_is_asked_for_again(opened):
    with opened(wrong=("Failed to load",)) as page:
        page.route("**/content", lambda route: route.abort(), times=1)
        ask(page, "a cat")
        page.wait_for_selector(".card:not(.working)")
        assert page.is_visible(".card.done"), card(page).locator(".state").inner_text()


def test_again_is_with_the_settings_of_that_picture_not_with_those_for_the_next(opened, desk):
    with opened() as page:
        setting(page, "num_inference_steps", "2")
        ask(page, "the same cat")
        page.wait_for_selector(".card.done")
        setting(page, "num_inference_steps", "3")
        card(page).get_by_role("button", name="again").click()
        until(page, "document.querySelectorAll('.card.done').length === 2")
    assert [params.num_inference_steps for params in desk.asked("the same cat")] == [2, 2]


def test_a_prompt_is_never_taken_for_html(opened):
    with opened() as page:
        prompt = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
        ask(page, prompt)
        page.wait_for_selector(".card.done")
        card(page).locator(".open").click()
        assert card(page).locator(".prompt").inner_text() == prompt == page.inner_text("#viewer-prompt")
        assert page.locator("b", has_text="bold").count() == 0
        assert page.title() != "taken"


def test_a_reload_loses_no_picture_of_this_browser_and_shows_those_of_no_other(opened):
    with opened() as page, opened() as other:
        ask(page, "a cat")
        page.wait_for_selector(".card.done")
        ask(page, "a dog")
        until(page, f"{KEPT}.length === 2")  # the server has it
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


def test_cancel_all_and_clear_finished(opened):
    with opened() as page:
        setting(page, "count", "10")
        ask(page, "a cat [wait]")
        ask(page, "a dog [wait]")
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


def test_a_seed_is_taken_however_it_is_written(opened):
    with opened() as page:
        for typed, meant in (("1e3", 1000), ("1.0", 1), (str(2**63 - 1), 2**63 - 1)):
            setting(page, "seed", typed)
            ask(page, "an apple")
            page.locator(".card.done").get_by_text(f"seed {meant}", exact=True).wait_for()


def test_a_seed_that_is_none_is_refused_at_its_field(opened):
    with opened(wrong=("400",)) as page:
        for typed, reason in (("0.5", "Seed: "), ("-1", "Seed: "), (str(2**63), "seed: ")):
            setting(page, "seed", typed)
            ask(page, "an apple")
            until(page, f"document.getElementById('order-error').textContent.startsWith('{reason}')")
            assert page.get_attribute("#seed", "aria-invalid") == "true"


# ------------------------------------------------------------ keys


def test_enter_on_a_bar_leads_to_its_card_and_cancels_nothing(opened, desk):
    with opened() as page:
        ask(page, "a lasting cat [wait]")
        page.wait_for_selector(".card.working .preview")
        until(page, f"document.getElementById('lanes').ariaLabel.includes('rank 0: request {number(page)}')")
        page.focus("#lanes")
        title = ""
        while not title.startswith(f"{number(page)} "):  # until its bar is drawn, the newest one is another's
            page.keyboard.press("Escape")
            page.keyboard.press("ArrowLeft")
            page.wait_for_selector("#tip:not([hidden])")
            title = page.inner_text("#tip")
        page.keyboard.press("Enter")
        until(page, "document.activeElement.classList.contains('card')")
        page.keyboard.down("Enter")  # and held down
        page.keyboard.down("Enter")
        page.wait_for_timeout(200)
        assert page.is_visible(".card.working")
        desk.finish()
        page.wait_for_selector(".card.done")


def test_a_held_key_orders_once(opened, desk):
    with opened() as page:
        page.fill("#prompt", "a held cat")
        page.focus("#prompt")
        for _ in range(5):
            page.keyboard.down("Enter")
        page.keyboard.up("Enter")
        page.wait_for_selector(".card.done")
        page.focus("#draw")
        for _ in range(5):
            page.keyboard.down("Enter")
        page.keyboard.up("Enter")
        page.wait_for_selector(".card.done >> nth=1")
        assert page.locator(".card").count() == len(desk.asked("a held cat")) == 2


# ------------------------------------------------------------ what is seen


def test_the_hint_is_drawn_over_nothing(opened):
    with opened() as page:
        page.evaluate("document.getElementById('settings').open = true")
        for width in (561, 640, 700, 759, 760, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            for prompt in ("a cat", "\n".join(["a cat"] * 6)):
                page.fill("#prompt", prompt)
                error = "document.getElementById('order-error').textContent"
                for message in ("", "what is wrong is told at length " * 12):
                    page.evaluate(f"{error} = {message!r}")
                    assert page.evaluate(COVERED) == [], f"at {width} px"
                    assert is_as_wide_as_the_screen(page)


def test_from_the_first_preview_to_the_picture_a_card_is_never_blank(opened, desk):
    with opened() as page:
        page.evaluate(NOTE_BLANKS)
        ask(page, "a steady cat [wait]")
        page.wait_for_selector(".card.working .preview")
        desk.finish()
        page.wait_for_selector(".card.done")
        until(page, "document.querySelectorAll('.card .preview').length === 0")
        until(page, "getComputedStyle(document.querySelector('.card .open img')).opacity === '1'")
        assert page.evaluate("seen.frames") > 2
        assert page.evaluate("seen.bare") == []


# ------------------------------------------------------------ what is wrong


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_side_that_is_wrong_is_marked_itself(opened, side):
    with opened(wrong=("400",)) as page:
        page.select_option("#shape", "custom")
        setting(page, side, "33")
        ask(page, "a cat")
        assert marked(page) == [side]
        assert page.evaluate(f"document.getElementById('{side}').closest('.field').contains({ERROR})")
        page.evaluate(f"document.getElementById('{side}').step = 'any'")  # now the server says so
        setting(page, side, "34")
        ask(page, "a cat")
        until(page, f"{ERROR}.textContent.includes('34 is not allowed')")
        assert marked(page) == [side] and page.locator(".card").count() == 0
        setting(page, side, "32")
        assert marked(page) == [] and page.inner_text("#order-error") == ""


def test_what_is_cleared_or_changed_is_red_no_longer(opened):
    with opened() as page:
        setting(page, "num_inference_steps", "0")
        ask(page, "a cat")
        assert marked(page) == ["num_inference_steps"]
        setting(page, "seed", "1")
        assert marked(page) == ["num_inference_steps"], "another field was changed"
        setting(page, "num_inference_steps", "")
        assert marked(page) == [] and page.inner_text("#order-error") == ""


def test_a_refusal_of_what_is_no_longer_in_the_form_stays_on_its_card(opened):
    refusal = {"error": {"message": "seed: no", "param": "seed"}}
    with opened(wrong=("400",)) as page:
        asked: list[Any] = []
        page.route("**/v1/images/generations", lambda route: asked.append(route))
        ask(page, "a cat")
        while not asked:
            page.wait_for_timeout(20)
        page.fill("#prompt", "a dog")
        asked[0].fulfill(status=400, json=refusal)
        page.wait_for_selector(".card.failed")
        assert marked(page) == [] and card(page).locator(".state").inner_text() == "seed: no"


# ------------------------------------------------------------ whose pictures


def test_what_is_cleared_does_not_return_and_others_are_shown_only_where_all_are_asked_for(opened):
    with opened() as page, opened() as other:
        ask(page, "a cat of mine")
        ask(page, "a dog of mine")
        page.wait_for_selector(".card.done >> nth=1")
        ask(other, "a cat of theirs")
        other.wait_for_selector(".card.done")
        page.click("#clear")
        ask(page, "a hare of mine")
        page.wait_for_selector(".card.done")
        until(page, f"{KEPT}.length === 1")
        page.reload()
        page.wait_for_selector(".card.done")
        assert page.locator(".card .prompt").all_inner_texts() == ["a hare of mine"]
    with opened("?all") as page:
        page.wait_for_selector(".card.done >> nth=3")
        prompts = page.locator(".card .prompt").all_inner_texts()
        assert prompts[:2] == ["a hare of mine", "a cat of theirs"]
