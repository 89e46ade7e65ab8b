"""``ditrelay generate`` and a server, ranks of their own or not, give the same file for the same seed."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import tiny_models
from chaos_server import Server

SECONDS = 90.0
SPREAD = ["--enable-disagg", "--num-gpus", "2", "--use-async-comm", "true"]


def generated(path: Path, *words: str) -> bytes:
    command = [sys.executable, "-m", "ditrelay", "generate", *words, "--device", "cpu", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert f"wrote {path}" in done.stdout
    return path.read_bytes()


def serving(tmp_path: Path, *flags: str) -> Server:
    return Server([*flags, "--device", "cpu", "--no-warmup", "--output-dir", str(tmp_path / "out")])


def video_of(server: Server, body: dict[str, Any]) -> bytes:
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        address = f"/v1/videos/{client.post('/v1/videos', json=body).json()['id']}"
        until = time.monotonic() + SECONDS
        while client.get(address).json()["status"] != "completed":
            assert time.monotonic() < until, client.get(address).text
            time.sleep(0.02)
        return client.get(f"{address}/content").content


def picture_of(server: Server, body: dict[str, Any]) -> bytes:
    body = body | {"response_format": "b64_json"}
    made = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=SECONDS).json()
    return base64.b64decode(made["data"][0]["b64_json"])


def flags_of(body: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(body[name]))]


def test_a_picture_of_one_seed_has_the_same_bytes_from_the_command_line_and_over_http(tmp_path: Path) -> None:
    body = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 3, "guidance_scale": 1.5}
    flags = flags_of(body, ["seed", "num_inference_steps", "guidance_scale"])
    file = generated(tmp_path / "apple.png", "a red apple", *flags, "--height", "48", "--width", "64", "--no-warmup")
    with serving(tmp_path, *SPREAD) as server:
        body["size"] = "64x48"
        assert picture_of(server, body) == file
        assert picture_of(server, body | {"seed": 8}) != file


def test_a_video_of_one_seed_has_the_same_bytes_from_the_command_line_and_over_http(tmp_path: Path) -> None:
    model = str(tiny_models.build("wan", tmp_path / "model"))
    body = {"prompt": "a fox", "seed": 7, "num_inference_steps": 2, "num_frames": 9}
    flags = flags_of(body, ["seed", "num_inference_steps", "num_frames"])
    size = ["--height", "48", "--width", "64", "--no-warmup"]
    file = generated(tmp_path / "fox.mp4", "a fox", "--model-path", model, *flags, *size)
    assert file[4:8] == b"ftyp"
    with serving(tmp_path, "--model-path", model, *SPREAD) as server:
        body["size"] = "64x48"
        assert video_of(server, body) == file
        assert video_of(server, body | {"seed": 8}) != file
