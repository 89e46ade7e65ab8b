"""The playground on models that take more than a prompt: clips, and pictures that start from a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import tiny_models
from picture_samples import picture
from playground_browser import BEARER, KeyedServer, ask, chromium, setting, until, watched_page
from playground_desk import Desk

from ditrelay.models.card import load_card
from ditrelay.runtime.pipelines_core.media import encode_clip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def clips(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedServer]:
    folder: Path = tmp_path_factory.mktemp("clips")
    model = str(tiny_models.build("wan", folder / "model"))
    flags = ("--model-path", model, "--served-model-name", "tiny-wan", "--output-dir", str(folder / "out"))
    with KeyedServer(*flags, "--device", "cpu", "--no-warmup") as server:
        yield server


def small(page: Any, steps: str) -> None:
    page.select_option("#shape", "custom")
    for name, value in (("width", "32"), ("height", "32"), ("seconds", "0.3"), ("num_inference_steps", steps)):
        setting(page, name, value)


def test_a_clip_is_made_plays_and_is_still_there_after_a_reload_until_it_is_cleared(browser, clips):
    with watched_page(browser, clips.url, wrong=("503",)) as page:
        assert page.inner_text("#draw") == "Make"
        small(page, steps="3")
        setting(page, "seed", "5")
        ask(page, "a fox runs")
        page.wait_for_selector(".card.done video")
        until(page, "document.querySelector('.card.done video').videoWidth > 0")
        assert page.inner_text(".card .numbers").startswith("seed 5")
        with page.expect_download() as saving:
            page.click(".card a[download]")
        assert saving.value.suggested_filename == "a-fox-runs-5.mp4"
        [video] = httpx.get(f"{clips.url}/v1/videos", headers=BEARER, timeout=10).json()["data"]
        address = f"{clips.url}/v1/videos/{video['id']}/content"
        assert saving.value.path().read_bytes() == httpx.get(address, headers=BEARER, timeout=10).content
        begins = {"status": 503, "headers": {"Retry-After": "1"}, "json": {"error": {"message": "it begins"}}}
        page.route("**/v1/videos?*", lambda route: route.fulfill(**begins), times=1)
        page.reload()
        page.wait_for_selector(".card.done video")
        assert page.inner_text(".card .prompt") == "a fox runs"
        page.click("#clear")
        page.reload()
        page.wait_for_selector("#health[data-state=ready]")
        assert page.locator(".card").count() == 0
    with watched_page(browser, f"{clips.url}/?all") as other:
        other.wait_for_selector(".card.done video")
        assert other.inner_text(".card .prompt") == "a fox runs"
        other.goto(clips.url)
        other.wait_for_selector("#health[data-state=ready]")
        assert other.locator(".card").count() == 0


def test_a_clip_is_cancelled_in_the_middle_and_the_next_one_is_made(browser, clips):
    with watched_page(browser, clips.url) as page:
        small(page, steps="900")
        ask(page, "a snail")
        until(page, "document.querySelector('.card .state').textContent.startsWith('Step')")
        setting(page, "num_inference_steps", "3")
        ask(page, "a hare")
        page.locator(".card", has_text="a snail").get_by_role("button", name="Cancel").click()
        page.wait_for_selector(".card.cancelled")
        page.locator(".card.done", has_text="a hare").wait_for()
    videos = httpx.get(f"{clips.url}/v1/videos", headers=BEARER, timeout=10).json()["data"]
    assert {video["prompt"]: video["status"] for video in videos[:2]} == {"a hare": "completed", "a snail": "cancelled"}


def test_a_clip_of_a_seed_that_no_number_of_javascript_holds_is_shown_with_it(browser, clips):
    with watched_page(browser, clips.url) as page:
        small(page, steps="2")
        setting(page, "seed", str(2**62 + 1))
        ask(page, "a whale")
        page.locator(".card.done", has_text="a whale").wait_for()
        assert page.locator(".card", has_text="a whale").get_by_text(f"seed {2**62 + 1}").is_visible()
        page.reload()
        page.locator(".card.done", has_text="a whale").get_by_text(f"seed {2**62 + 1}").wait_for()
    videos = httpx.get(f"{clips.url}/v1/videos", headers=BEARER, timeout=10).json()["data"]
    assert [video["seed"] for video in videos if video["prompt"] == "a whale"] == [2**62 + 1]


def test_the_built_in_model_makes_a_clip_of_its_only_size_from_a_prompt(browser, tmp_path):
    clip = encode_clip([np.zeros((4, 96, 96, 3), np.uint8)], fps=8).data
    how = {"card": load_card("builtin:emoji-video"), "file": clip, "output_dir": str(tmp_path)}
    with Desk(**how) as desk, watched_page(browser, desk.url) as page:
        assert page.locator("#shape option").all_inner_texts() == ["Square (96 × 96)"]
        assert page.get_attribute("#seconds", "placeholder") == "1.5"
        ask(page, "a cat moving to the left")
        page.wait_for_selector(".card.done video")
        until(page, "document.querySelector('.card.done video').videoWidth === 96")
        [params] = desk.asked("a cat moving to the left")
        assert (params.width, params.height) == (96, 96)


def test_a_picture_starts_from_one_of_the_gallery(browser):
    with Desk() as desk, watched_page(browser, desk.url, wrong=("400",)) as page:
        ask(page, "a red apple")
        page.wait_for_selector(".card.done")
        assert page.is_hidden("#strength")
        page.get_by_role("button", name="Start from Picture").click()
        setting(page, "strength", "0.7")
        ask(page, "a green apple")
        until(page, "document.querySelectorAll('.card.done').length === 2")
        [params] = desk.asked("a green apple")
        assert params.image is not None and params.strength == 0.7

        page.set_input_files("#image", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
        ask(page, "a blue apple")
        until(page, "document.getElementById('order-error').textContent.startsWith('image: ')")
        assert page.get_attribute("#image", "aria-invalid") == "true"
        assert page.locator(".card").count() == 2
        page.click("#image-clear")
        assert page.is_hidden("#strength")
        assert page.get_attribute("#image", "aria-invalid") is None


def test_a_model_that_looks_at_the_picture_is_not_asked_for_a_strength(browser):
    card = msgspec.structs.replace(load_card("builtin:emoji"), default_strength=0.0)
    with Desk(card=card) as desk, watched_page(browser, desk.url) as page:
        page.set_input_files("#image", {"name": "a.png", "mimeType": "image/png", "buffer": picture(64, 64)})
        assert page.is_hidden("#strength")
        ask(page, "a green apple")
        page.wait_for_selector(".card:not(.working)")
        assert page.is_visible(".card.done"), page.inner_text(".card .state")
        [params] = desk.asked("a green apple")
        assert params.image is not None and params.strength is None
