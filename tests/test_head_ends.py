"""The control loop of a real server ends by a defect: all is told, the server ends with 1, and no job is lost."""

from __future__ import annotations

import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from chaos_server import Server

MODEL = "builtin:timed?encode=0.01&denoise={denoise}&decode=0.01&steps=5&conditioning_mb=0.1&latents_mb=0.1"
FLAGS = ["--device", "cpu", "--no-warmup", "--model-path"]
SECONDS = 60.0
REASON = "the engine's control loop failed: a defect"

# Runs before the head's own code; its workers lack the argument. Where the second file is, the server ends later.
DEFECT = """
import os, sys
if "ditrelay.launch_server" in sys.orig_argv:
    from ditrelay.runtime.scheduler import Scheduler
    from ditrelay.server.app import EngineServer
    on_event, fail = Scheduler.on_event, EngineServer._fail
    def breaks(self, event, now):
        assert not os.path.exists({trigger!r}), "a defect"
        return on_event(self, event, now)
    def fails(self, error):
        if not os.path.exists({trigger!r} + "-held"):
            fail(self, error)
    Scheduler.on_event, EngineServer._fail = breaks, fails
"""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, f"after {SECONDS:g} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def trigger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that breaks the loops of the servers that start from now on."""
    made = tmp_path / "break"
    (tmp_path / "sitecustomize.py").write_text(DEFECT.format(trigger=str(made)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return made


def test_clients_probes_and_supervisors_are_told(trigger: Path) -> None:
    held = trigger.with_name("break-held")
    held.touch()
    with Server([*FLAGS, MODEL.format(denoise=30)]) as server, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "a fox"}
        asked = [pool.submit(httpx.post, f"{server.url}/v1/images/generations", json=body, timeout=60) for _ in "ab"]
        with httpx.Client(base_url=server.url, timeout=30) as client:
            wait_for(lambda: client.get("/v1/topology").json()["requests"]["running"] > 0, "nothing runs")
            trigger.touch()
            for answer in (each.result(SECONDS) for each in asked):
                assert answer.status_code == 503 and REASON in answer.text
            for probe in ("/ready", "/health"):
                answer = client.get(probe)
                assert answer.status_code == 503 and REASON in answer.text
            late = client.post("/v1/images/generations", json=body)
            assert late.status_code == 503 and REASON in late.text
        held.unlink()
        assert server.process.wait(SECONDS) == 1
        assert REASON in server.log.read_text()


def test_its_videos_are_queued_afterwards_and_the_next_server_makes_them(trigger: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def flags(denoise: float) -> list[str]:
        return [
            *FLAGS,
            MODEL.format(denoise=denoise) + "&frames=9",
            "--served-model-name",
            "fox",
            "--output-dir",
            str(folder),
        ]

    with Server(flags(30)) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        made = [client.post("/v1/videos", json={"prompt": f"a fox, {i}"}).json()["id"] for i in range(4)]
        wait_for(lambda: client.get("/v1/topology").json()["requests"]["running"] > 0, "nothing runs")
        trigger.touch()
        assert server.process.wait(SECONDS) == 1
    with sqlite3.connect(folder / "jobs.sqlite") as database:
        rows = database.execute("SELECT id, state FROM ditrelay_jobs").fetchall()
    assert dict(rows) == dict.fromkeys(made, "queued")
    trigger.unlink()
    with Server(flags(0.01)) as server, httpx.Client(base_url=server.url, timeout=30) as client:

        def states() -> Counter[str]:
            return Counter(video["status"] for video in client.get("/v1/videos").json()["data"])

        wait_for(lambda: states()["completed"] == len(made), "the videos are not made")
    assert sorted(path.stem for path in folder.glob("*.mp4")) == sorted(made)
