"""Takes docs/images/playground*.png: the playground at work, on a server that this script starts, on the CPU.

Needs the dev extra (playwright) and Chromium.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from demo import PROMPTS
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from chaos_server import Server  # noqa: E402 - found only now

IMAGES = ROOT / "docs" / "images"
RANKS = ["--device", "cpu", "--enable-disagg", "--num-gpus", "4", "--num-non-dit-ranks", "1"]
DESKTOP = {"viewport": {"width": 1280, "height": 1120}, "device_scale_factor": 1.25}
PHONE = {
    "viewport": {"width": 390, "height": 1140},
    "device_scale_factor": 2,
    "color_scheme": "dark",
    "is_mobile": True,
    "has_touch": True,
}
SECONDS = 120.0

# Of the cards in view: [those at work with a preview, those with their picture, those with nothing to see].
IN_VIEW = """() => {
  const count = [0, 0, 0];
  for (const card of document.querySelectorAll(".card")) {
    if (card.getBoundingClientRect().top > innerHeight - 60) continue;
    const isSeen = (picture) =>
      picture?.complete && picture.naturalWidth > 0 && Number(getComputedStyle(picture).opacity) === 1;
    if (isSeen(card.querySelector(".open img"))) count[1] += 1;
    else count[isSeen(card.querySelector(".preview")) ? 0 : 2] += 1;
  }
  return count;
}"""


def main() -> int:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, how, finished in (("playground.png", DESKTOP, 6), ("playground-phone.png", PHONE, 1)):
            with Server(["--model-path", "builtin:emoji", *RANKS]) as server:  # a new one: its lanes are empty
                take(browser, server.url, IMAGES / name, how, finished=finished)
        browser.close()
    return 0


def take(browser: Browser, url: str, path: Path, how: dict[str, Any], *, finished: int) -> None:
    """A picture in which some are at work, at least ``finished`` are drawn, and no card is blank."""
    context = browser.new_context(**how)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#health[data-state=ready]", timeout=SECONDS * 1000)
    for prompt in PROMPTS:
        page.fill("#prompt", prompt)
        page.press("#prompt", "Enter")
        page.wait_for_timeout(120)
    page.evaluate("document.activeElement.blur()")
    deadline = time.monotonic() + SECONDS
    while not _shot(page, path, finished):
        if time.monotonic() > deadline:
            raise SystemExit(f"{path.name}: there was no such moment within {SECONDS:g} s")
        page.wait_for_timeout(10)
    print(path)
    context.close()


def _shot(page: Page, path: Path, finished: int) -> bool:
    """Whether it was such a moment, before the picture was taken and after it."""
    if not _is_it(page, finished):
        return False
    page.screenshot(path=path)
    return _is_it(page, finished)


def _is_it(page: Page, finished: int) -> bool:
    at_work, drawn, blank = page.evaluate(IN_VIEW)
    return bool(at_work and drawn >= finished and not blank)


if __name__ == "__main__":
    sys.exit(main())
