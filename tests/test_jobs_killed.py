"""``kill -9`` of the head in the middle of twenty video jobs: the next server ends each of them, none twice."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from chaos_server import Server
from postgres import postgres

MODEL = "builtin:timed?encode=0.01&denoise=0.3&decode=0.02&steps=3&conditioning_mb=0.1&latents_mb=0.1&frames=9"
FLAGS = ["--model-path", MODEL, "--device", "cpu", "--enable-disagg", "--num-gpus", "3", "--no-warmup"]
JOBS = 20
SECONDS = 90.0
TICK_SECONDS = 0.1  # of ``Engine.status``
DONE = re.compile(r'^ditrelay_requests_total\{outcome="done"\} (\S+)$', re.MULTILINE)


def wait_for(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, f"after {SECONDS:g} s: {what()}"
        time.sleep(0.02)


def videos(server: Server) -> dict[str, dict[str, Any]]:
    page = httpx.get(f"{server.url}/v1/videos", params={"limit": 100}, timeout=30).json()
    assert not page["has_more"]
    listed = {video["id"]: video for video in page["data"]}
    assert len(listed) == len(page["data"])
    return listed


def states(server: Server) -> Counter[str]:
    return Counter(video["status"] for video in videos(server).values())


def drawn(server: Server) -> int:
    """Requests that the server's engine has done in its life."""
    [count] = DONE.findall(httpx.get(f"{server.url}/metrics", timeout=30).text)
    return int(float(count))


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_all_jobs_of_a_killed_server_are_completed_by_the_next_one_and_none_is_made_twice(
    database: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    flags = [*FLAGS, "--output-dir", str(folder)]
    with ExitStack() as stack:
        if database == "postgresql":
            flags += ["--job-store", stack.enter_context(postgres()).url()]
        with Server(flags) as server, httpx.Client(base_url=server.url, timeout=30) as client:
            made = [client.post("/v1/videos", json={"prompt": f"a fox, {i}"}).json() for i in range(JOBS)]
            wait_for(lambda: states(server)["completed"] >= 5, lambda: states(server))
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait(30)
        files = {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
        assert 5 <= len(files) < JOBS
        with Server(flags) as server:
            began = time.time()
            before = {key: video for key, video in videos(server).items() if key in files}
            wait_for(lambda: states(server)["completed"] == JOBS, lambda: states(server))
            after = videos(server)
            assert list(after) == [video["id"] for video in made[::-1]]
            assert [after[video["id"]]["seed"] for video in made] == [video["seed"] for video in made]
            time.sleep(3 * TICK_SECONDS)  # so old may the counts be
            assert drawn(server) == JOBS - len(files)
            for key, video in before.items():  # those were done: neither the row nor the file is touched again
                assert after[key] == video and video["completed_at"] <= began
                assert (folder / f"{key}.mp4").stat().st_mtime_ns == files[key]
            assert server.stop() == []
        assert {path.stem for path in folder.glob("*.mp4")} == {video["id"] for video in made}
        assert all(path.read_bytes()[4:8] == b"ftyp" for path in folder.glob("*.mp4"))
        assert not list(folder.glob("*.part"))
