"""What the jobs keep, on disk and in the database, and what happens where one of the two fails them."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from server_fakes import running
from test_server_videos import ADDRESS, CARD, MP4, VideoEngine, create, engine_jobs, png, serving, until

from ditrelay.server import job_thread, jobs
from ditrelay.server.job_rows import Job
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


def test_a_fault_of_the_servers_own_ends_the_video_and_is_told_to_the_log_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, _):
            failed = await until(client, (await create(client, "[bug]"))["id"], status="failed")
            assert failed["error"]["message"] == "internal error; the server's log has the cause"
            made = await create(client, "a dog")
            await until(client, made["id"], status="completed")

    asyncio.run(main())
    assert "ZeroDivisionError: secret" in caplog.text


@pytest.mark.parametrize(
    ("headers", "status", "expected"),
    [({}, 200, MP4), ({"range": "bytes=4-5"}, 206, b"of"), ({"range": "bytes=99-"}, 416, None)],
)
def test_a_video_deleted_while_it_is_sent_is_sent_whole_and_nothing_of_it_stays_open(
    tmp_path: Path, headers: dict[str, str], status: int, expected: bytes | None
) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, _):
            video_id = (await create(client, "a cat"))["id"]
            await until(client, video_id, status="completed")
            path = tmp_path / f"{video_id}.mp4"
            sent = await asked(client, f"{ADDRESS}/{video_id}/content", headers, on_start=path.unlink)
            assert sent[0]["status"] == status
            body = b"".join(message["body"] for message in sent[1:])
            assert body == expected if expected else msgspec.json.decode(body)["error"]["code"] == "invalid_range"
            assert dict(sent[0]["headers"])[b"content-length"] == b"%d" % len(body)
            assert not [fd for fd in Path("/proc/self/fd").iterdir() if str(path) in linked(fd)]
            gone = await client.get(f"{ADDRESS}/{video_id}/content")
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "file_not_found")

    asyncio.run(main())


@pytest.mark.parametrize(("asked_for", "status"), [("bytes=99-", 416), ("bytes=", 400), ("lines=1-2", 400)])
def test_a_part_that_there_is_not_is_refused_in_the_form_of_all_errors(
    tmp_path: Path, asked_for: str, status: int
) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, _):
            video_id = (await create(client, "a cat"))["id"]
            await until(client, video_id, status="completed")
            address, headers = f"{ADDRESS}/{video_id}/content", {"Range": asked_for}
            refused = await client.get(address, headers=headers)
            assert (refused.status_code, refused.json()["error"]["param"]) == (status, "Range")
            assert f"{len(MP4)} bytes" in refused.json()["error"]["message"]
            assert refused.headers.get("content-range") == (f"bytes */{len(MP4)}" if status == 416 else None)
            head = await client.head(address, headers=headers)
            assert (head.status_code, head.headers["content-length"]) == (200, str(len(MP4)))

    asyncio.run(main())


def test_a_video_whose_file_goes_before_the_answer_begins_is_sent_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, _):
            video_id = (await create(client, "a cat"))["id"]
            await until(client, video_id, status="completed")
            path, call = tmp_path / f"{video_id}.mp4", jobs.Jobs.call

            async def call_and_remove(self: jobs.Jobs, what: Any, *values: Any, **named: Any) -> Any:
                done = await call(self, what, *values, **named)
                if not isinstance(done, Job):
                    path.unlink()
                return done

            monkeypatch.setattr(jobs.Jobs, "call", call_and_remove)
            answer = await client.get(f"{ADDRESS}/{video_id}/content")
            assert (answer.status_code, answer.content, path.exists()) == (200, MP4, False)

    asyncio.run(main())


async def asked(
    client: httpx.AsyncClient, path: str, headers: dict[str, str], *, on_start: Callable[[], None]
) -> list[MutableMapping[str, Any]]:
    """What the application sends for one GET; ``on_start`` is called between its status and its body."""
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)
        if message["type"] == "http.response.start":
            on_start()

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "http_version": "1.1", "scheme": "http", "method": "GET"}
    scope |= {"path": path, "query_string": b"", "headers": raw, "server": ("pictures.test", 80), "root_path": ""}
    await client._transport.app(scope, receive, send)
    return sent


def linked(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except FileNotFoundError:  # the one that the folder was read by
        return ""


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
    monkeypatch.setattr(job_thread, "_CALL_SECONDS", 0.1)
    monkeypatch.setattr(job_thread, "_CLOSE_SECONDS", 0.1)

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
    monkeypatch.setattr(job_thread, "_CALL_SECONDS", 0.1)

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
