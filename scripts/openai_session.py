"""Records docs/openai-session.md: the ``openai`` package at work on servers that this script starts, on the CPU."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from chaos_server import Server  # noqa: E402 - found only now
from common import provenance  # noqa: E402

PAGE = ROOT / "docs" / "openai-session.md"
SHOWN = "http://127.0.0.1:30000"
RANKS = ["--device", "cpu", "--enable-disagg", "--num-gpus", "4", "--num-non-dit-ranks", "1"]
CLIPS = "builtin:emoji-video"

CONNECT = f'''
import base64, time
import openai

client = openai.OpenAI(base_url="{SHOWN}/v1", api_key="none")
print([model.id for model in client.models.list()])
'''

PICTURES = (
    CONNECT,
    """
answer = client.images.generate(
    prompt="a red apple", n=2, size="128x128", response_format="url", extra_body={"seed": 7}
)
for picture in answer.data:
    print(picture.url, picture.seed, f"{picture.timings['total']:.2f} s")
""",
    """
answer = client.images.generate(
    prompt="a red apple", size="128x128", output_format="webp", extra_body={"seed": 7}
)
file = base64.b64decode(answer.data[0].b64_json)
print(answer.output_format, answer.size, len(file), "bytes,", file[:4], file[8:12])
""",
    """
for event in client.images.generate(prompt="a sailing boat", stream=True, partial_images=2, extra_body={"seed": 3}):
    match event.type:
        case "image_generation.progress":
            print(event.state, f"{event.step}/{event.total_steps}" if event.total_steps else "")
        case "image_generation.partial_image":
            print("preview", event.partial_image_index, event.size, len(event.b64_json), "characters")
        case "image_generation.completed":
            picture = base64.b64decode(event.b64_json)
            print("done:", event.size, event.output_format, len(picture), "bytes, seed", event.seed)
""",
    """
answer = client.images.edit(
    image=("boat.png", picture),
    prompt="a red apple",
    extra_body={"strength": 0.6, "seed": 3},
)
print(answer.size, len(base64.b64decode(answer.data[0].b64_json)), "bytes")
""",
    """
try:
    client.images.generate(prompt="a red apple", size="127x128")
except openai.BadRequestError as error:
    print(error.status_code, error.param, "-", error.body["message"])
try:
    client.images.generate(prompt="a red apple", model="dall-e-3")
except openai.NotFoundError as error:
    print(error.status_code, error.code, "-", error.body["message"])
""",
)

VIDEOS = (
    CONNECT,
    """
video = client.videos.create(prompt="a cat moving to the left", seconds="1.5", extra_body={"seed": 7})
print(video.status, video.progress, video.size, video.seconds, video.num_frames, video.seed)
""",
    """
while video.status in ("queued", "in_progress"):
    time.sleep(0.5)
    video = client.videos.retrieve(video.id)
    print(video.status, f"{video.progress}%", video.stage, video.step, video.eta_seconds)
""",
    """
content = client.videos.download_content(video.id).read()
print(len(content), "bytes", content[4:12])
""",
    """
other = client.videos.create_and_poll(prompt="a rocket flying up in space", poll_interval_ms=200)
print(other.status, [each.prompt for each in client.videos.list(limit=10)])
""",
    """
print(client.videos.delete(other.id).deleted)
try:
    client.videos.retrieve(other.id)
except openai.NotFoundError as error:
    print(error.status_code, error.code, "-", error.body["message"])
""",
)


def record(flags: Sequence[str], cells: Sequence[str]) -> Iterator[str]:
    """Each cell as it is run against a server of these flags, and what it prints."""
    with tempfile.TemporaryDirectory() as folder, Server([*flags, *RANKS, "--output-dir", folder]) as server:
        names: dict[str, Any] = {}
        for cell in cells:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # "The Sora API": OpenAI's own service
                exec(cell.replace(SHOWN, server.url), names)
            lines = [line.rstrip() for line in said.getvalue().replace(server.url, SHOWN).splitlines()]
            yield block("python", cell) + "\n\n" + block("text", "\n".join(lines))


def block(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def page() -> str:
    source = provenance()
    intro = f"""
        # A session of the `openai` package

        Recorded by `python scripts/openai_session.py`, {source["date"][:10]}: `openai` {version("openai")},
        as it comes, against real servers on a CPU (`{" ".join(RANKS)}`).
        [clients.md](clients.md) says more about each call.
        """
    pictures = """
        ## Pictures

        `ditrelay serve`: `builtin:emoji`. What OpenAI does not have (`seed`, `strength`, `timings`, ...) goes into
        `extra_body` and comes back as further attributes.
        """
    videos = f"""
        ## Videos

        `ditrelay serve --model-path {CLIPS}`
        """
    parts = [intro, pictures, *record([], PICTURES), videos, *record(["--model-path", CLIPS], VIDEOS)]
    return "\n\n".join(textwrap.dedent(part).strip() for part in parts) + "\n"


def main() -> None:
    os.environ.pop("OPENAI_API_KEY", None)
    text = page()
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
