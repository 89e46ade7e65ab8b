"""What the jobs keep, on disk and in the database, and what happens where one of the two fails them."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from server_fakes import running
from test_server_videos import ADDRESS, CARD, MP4, VideoEngine, create, engine_jobs, png, serving, until

from ditrelay.server import jobs
from ditrelay.server.job_store import JobStore

FROM_PICTURE = msgspec.structs.replace(CARD, needs_image=True)


def test_a_video_that_does_not_fit_on_the_disk_fails_and_takes_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, _):
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                failed = await until(client, (await create(client, "a cat"))["id"], status="failed")
            assert "--output-dir: No space left on device" in failed["error"]["message"]
            assert not [path for path in tmp_path.iterdir() if path.suffix in (".part", ".mp4")]
            made = await create(client, "a dog")
            await until(client, made["id"], status="completed")

    asyncio.run(main())


def test_a_file_that_cannot_be_removed_stays_known_and_keeps_no_other_from_its_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path, job_retention=0.05) as (client, _):
            stuck, other = [(await create(client, prompt))["id"] for prompt in ("a cat", "a dog")]
            for video_id in (stuck, other):
                await until(client, video_id, status="completed")
            path = tmp_path / f"{stuck}.mp4"
            path.unlink()
            path.mkdir()  # what nobody unlinks, also not root
            await asyncio.sleep(0.1)
            await engine_jobs(client).sweep()
            left = (await client.get(ADDRESS)).json()["data"]
            assert [video["id"] for video in left] == [stuck]
            path.rmdir()
            path.write_bytes(MP4)
            await engine_jobs(client).sweep()
            assert not (await client.get(ADDRESS)).json()["data"] and not path.exists()

    asyncio.run(main())


def test_the_picture_of_a_video_outlives_a_restart_and_is_not_read_where_jobs_are_told(tmp_path: Path) -> None:
    async def make(client: httpx.AsyncClient) -> dict[str, Any]:
        file = {"input_reference": ("x.png", png(64), "image/png")}
        return (await client.post(ADDRESS, data={"prompt": "[wait]"}, files=file)).json()

    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path, card=FROM_PICTURE) as (client, _):
            video = await make(client)
            await until(client, video["id"], stage="encoding")
        async with asyncio.timeout(30), serving(tmp_path, card=FROM_PICTURE) as (client, engine):
            await until(client, video["id"], stage="encoding")
            assert [ticket.params.image for ticket in engine.tickets] == [png(64)]
            row = await engine_jobs(client).call(engine_jobs(client).store.get, video["id"])
            assert row.params["image"] is None
            engine.tickets[0].finish()
            await until(client, video["id"], status="completed")

    asyncio.run(main())


# ---------------------------------------------------------------- a database that stands still


@pytest.fixture
def stands_still(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """From now on the store says nothing, until the event is set."""
    goes_on = threading.Event()
    monkeypatch.setattr(JobStore, "page", lambda self, **how: goes_on.wait(60) and [])
    yield goes_on
    goes_on.set()


def test_requests_to_a_database_that_stands_still_are_503_and_the_server_still_answers_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stands_still: threading.Event
) -> None:
    monkeypatch.setattr(jobs, "_CALL_SECONDS", 0.1)
    monkeypatch.setattr(jobs, "_CLOSE_SECONDS", 0.1)

    async def main() -> None:
        async with asyncio.timeout(30), running(VideoEngine(tmp_path)) as client:
            while (refused := await client.get(ADDRESS)).json()["error"]["code"] != "job_store_down":
                await asyncio.sleep(0.01)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert (await client.get("/health")).status_code == 200

    asyncio.run(main())  # ends, though the call has not


def test_a_database_that_answers_again_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stands_still: threading.Event
) -> None:
    monkeypatch.setattr(jobs, "_CALL_SECONDS", 0.1)

    async def main() -> None:
        async with asyncio.timeout(30), running(VideoEngine(tmp_path)) as client:
            while (await client.get(ADDRESS)).json()["error"]["code"] != "job_store_down":
                await asyncio.sleep(0.01)
            stands_still.set()
            video = await create(client, "a cat")
            await until(client, video["id"], status="completed")

    asyncio.run(main())
    JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}").close()  # the server has let go of it


def test_a_call_that_never_returns_does_not_keep_the_process_from_its_end() -> None:
    code = """if True:
        import asyncio, time
        from ditrelay.server.one_thread import OneThread
        async def main():
            thread = OneThread("blocks")
            assert await thread.call(lambda: 7) == 7
            try:
                await asyncio.wait_for(thread.call(lambda: time.sleep(60)), 0.1)
            except TimeoutError:
                print("given up")
        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "given up\n", "")
