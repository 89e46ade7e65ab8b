"""What the tests of the playground share: a headless Chromium, a page that is watched, and a server with a key."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from chaos_server import Server

KEY = "a key of the tests"
SECONDS = 60.0
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}

# No request of its own, no profile of somebody's. Playwright gives it a fresh folder for its data.
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


# Whether a pixel of that colour (#rrggbb) is on the lanes.
HAS_COLOUR = """colour => {
  const canvas = document.getElementById("lanes");
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  for (let i = 0; i < data.length; i += 4)
    if (data[i] === red && data[i + 1] === green && data[i + 2] === blue && data[i + 3] === 255) return true;
  return false;
}"""

# Both replicas are busy, and at least one of encode and decode with a third request.
ALL_STAGES_AT_WORK = r"""() => {
  const words = document.getElementById("lanes").ariaLabel ?? "";
  const at = (stage) => {
    const lane = new RegExp(`${stage} on rank [0-9]: request ([0-9]+)`, "g");
    return [...words.matchAll(lane)].map((match) => match[1]);
  };
  return new Set([...at("denoise"), ...at("encode"), ...at("decode")]).size >= 3 && at("denoise").length === 2;
}"""

# Notes in window.seen whatever the newest card shows while it is worked on.
NOTE_PROGRESS = """() => {
  const seen = (window.seen = {states: [], previews: new Set(), values: []});
  const note = () => {
    const card = document.querySelector(".card.working");
    if (!card) return;
    const text = card.querySelector(".state").textContent;
    if (seen.states.at(-1) !== text) seen.states.push(text);
    seen.values.push(Number(card.querySelector(".bar").ariaValueNow));
    const preview = card.querySelector(".preview");
    if (preview) seen.previews.add(preview.src);
  };
  const all = {subtree: true, childList: true, characterData: true, attributes: true};
  new MutationObserver(note).observe(document.getElementById("cards"), all);
}"""

# Which of the order's parts the hint below the prompt is drawn over.
COVERED = """() => {
  const box = (each) => each.getBoundingClientRect();
  const hint = box(document.getElementById("prompt-hint"));
  const parts = [...document.querySelectorAll("#ask > *:not(.hidden), #order-error, #settings")];
  const meets = ({left, right, top, bottom}) =>
    hint.left < right && left < hint.right && hint.top < bottom && top < hint.bottom;
  return parts.filter((part) => box(part).height && meets(box(part))).map((part) => part.id);
}"""

# Notes in window.seen.bare each frame in which a card that has shown a preview shows nothing.
NOTE_BLANKS = """() => {
  const seen = (window.seen = {frames: 0, bare: []});
  let hasPreview = false;
  const isSeen = (picture) =>
    picture.complete && picture.naturalWidth > 0 && Number(getComputedStyle(picture).opacity) === 1;
  const look = () => {
    const pictures = [...document.querySelectorAll(".card .frame img")];
    hasPreview ||= pictures.length > 0;
    if (hasPreview) seen.frames += 1;
    if (hasPreview && !pictures.some(isSeen)) seen.bare.push(document.querySelector(".card .frame").innerHTML);
    requestAnimationFrame(look);
  };
  look();
}"""


class KeyedServer(Server):
    """A server that asks for ``KEY``."""

    def __init__(self, *flags: str) -> None:
        super().__init__([*flags, "--api-key", KEY])

    def _is_ready(self, url: str) -> bool:
        try:
            return httpx.get(f"{url}/ready", headers=BEARER, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


BEARER = {"Authorization": f"Bearer {KEY}"}


@contextmanager
def chromium() -> Iterator[Any]:
    """A Playwright browser; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright (the dev extra)")
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched_page(
    browser: Any, url: str, *, key: str | None = KEY, wrong: tuple[str, ...] = (), init: str = "", **options: Any
) -> Any:
    """A page in a fresh context, opened and ready; fails at its end if it complained or asked another origin.

    Args:
        key: what the tab knows already, as after its first question for it.
        wrong: parts of complaints that the test means to provoke.
        init: what runs in the page before its own scripts do.
        options: of the context (``viewport``, ``color_scheme``, ``reduced_motion``, ...).
    """
    context = browser.new_context(**{"viewport": DESKTOP, **options})
    complaints: list[str] = []
    page = context.new_page()
    page.set_default_timeout(SECONDS * 1000)
    page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: _is_own(request.url, url) or complaints.append(f"asked for {request.url}"))
    if key is not None:
        page.add_init_script(f"sessionStorage.setItem('ditrelay-key', {key!r})")
    if init:
        page.add_init_script(init)
    try:
        page.goto(url)
        if key is not None:
            page.wait_for_selector("#health[data-state=ready]")
        yield page
        unexpected = [text for text in complaints if not any(part in text for part in wrong)]
        assert unexpected == []
    finally:
        context.close()


def _is_own(address: str, url: str) -> bool:
    return urlsplit(address).scheme in ("blob", "data") or urlsplit(address).netloc == urlsplit(url).netloc


def ask(page: Any, prompt: str) -> None:
    """Type a prompt and send it by Enter."""
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")


def until(page: Any, condition: str) -> None:
    """Wait for a condition in JavaScript. (Playwright's own way to wait needs what the page's policy forbids.)"""
    deadline = time.monotonic() + SECONDS
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"waited {SECONDS:g} s in vain for {condition}"
        page.wait_for_timeout(20)


def setting(page: Any, name: str, value: str) -> None:
    page.fill(f"#{name}", value)


def is_as_wide_as_the_screen(page: Any) -> bool:
    """Nothing makes it scroll sideways."""
    width: list[int] = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    return width[0] <= width[1]


def card(page: Any, place: int = 0) -> Any:
    """The newest is the first."""
    return page.locator(".card").nth(place)


def number(page: Any, place: int = 0) -> int:
    return int(card(page, place).locator(".badge").inner_text())


def colour_of(page: Any, place: int = 0) -> str:
    return card(page, place).evaluate("root => root.style.getPropertyValue('--hue')")


def marked(page: Any) -> list[str]:
    """The inputs that are said to be wrong."""
    return page.evaluate("[...document.querySelectorAll('#order [aria-invalid=true]')].map((each) => each.id)")
