"""A database that has done what it was asked, and whose answer is lost: a job goes on as it stands in the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from test_server_videos import ADDRESS, MP4, create, engine_jobs, serving, until

from ditrelay.server import job_thread
from ditrelay.server.job_schemas import Cancelled, Completed, Failed
from ditrelay.server.job_store import JobStore

Lose = Callable[[str], list[str]]


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Lose:
    """Loses the next answer to a call of the store once it has been done; what it returns is filled with the call."""
    monkeypatch.setattr(job_thread, "_RETRY_SECONDS", 0.01)

    def lose(name: str) -> list[str]:
        lost: list[str] = []
        call = getattr(JobStore, name)

        def call_and_lose(self: JobStore, *values: Any, **named: Any) -> Any:
            done = call(self, *values, **named)
            if not lost:
                lost.append(name)
                raise OperationalError("UPDATE", {}, ConnectionError("server closed the connection unexpectedly"))
            return done

        monkeypatch.setattr(JobStore, name, call_and_lose)
        return lost

    return lose


async def comes_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_video_whose_submission_was_not_answered_is_made_soon_and_found_by_its_key(
    tmp_path: Path, lose: Lose
) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            lost, headers = lose("add"), {"Idempotency-Key": "one"}
            refused = await client.post(ADDRESS, json={"prompt": "a cat"}, headers=headers)
            assert lost and refused.json()["error"]["code"] == "job_store_down"
            await comes_true(lambda: len(engine.tickets) == 1)
            again = await client.post(ADDRESS, json={"prompt": "a cat"}, headers=headers)
            await until(client, again.json()["id"], status="completed")
            assert len(engine.tickets) == 1

    asyncio.run(main())


def test_a_video_whose_start_was_not_answered_is_made(tmp_path: Path, lose: Lose) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            lost = lose("start")
            video = await create(client, "a cat")
            await until(client, video["id"], status="completed")
            assert lost and len(engine.tickets) == 1

    asyncio.run(main())


def test_a_video_whose_completion_was_not_answered_keeps_its_file_and_its_readers_are_told(
    tmp_path: Path, lose: Lose
) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            video = await create(client)
            await until(client, video["id"], stage="encoding")
            log = engine_jobs(client).logs.open(video["id"])
            lost = lose("complete")
            engine.tickets[0].finish()
            await until(client, video["id"], status="completed")
            await comes_true(lambda: not engine_jobs(client).live)
            assert lost and isinstance(log.last, Completed)
            assert (await client.get(f"{ADDRESS}/{video['id']}/content")).content == MP4

    asyncio.run(main())


def test_the_readers_of_a_video_whose_failure_was_not_answered_are_told(tmp_path: Path, lose: Lose) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, _):
            lost = lose("fail")
            video = await create(client, "[fail]")
            await until(client, video["id"], status="failed")
            await comes_true(lambda: not engine_jobs(client).live)
            assert lost and isinstance(engine_jobs(client).logs.open(video["id"]).last, Failed)

    asyncio.run(main())


@pytest.mark.parametrize(("how", "call"), [("cancel", "cancel"), ("delete", "delete")])
def test_a_video_whose_end_was_not_answered_is_not_drawn_on(tmp_path: Path, lose: Lose, how: str, call: str) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            video = await create(client)
            await until(client, video["id"], stage="encoding")
            log = engine_jobs(client).logs.open(video["id"])
            lost, address = lose(call), f"{ADDRESS}/{video['id']}"
            answer = await (client.post(f"{address}/cancel") if how == "cancel" else client.delete(address))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "job_store_down")
            await comes_true(lambda: engine.tickets[0].cancelled)
            assert lost and isinstance(log.last, Cancelled)
            await comes_true(lambda: not engine_jobs(client).live)
            after = await client.get(address)
            assert after.status_code == 404 if how == "delete" else after.json()["status"] == "cancelled"

    asyncio.run(main())


def test_a_video_whose_cancel_did_not_reach_the_database_is_drawn_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(self: JobStore, job_id: str) -> bool:
        raise OperationalError("UPDATE", {}, ConnectionError("no route to host"))

    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            video = await create(client)
            await until(client, video["id"], stage="encoding")
            with monkeypatch.context() as patch:
                patch.setattr(JobStore, "cancel", unreached)
                assert (await client.post(f"{ADDRESS}/{video['id']}/cancel")).status_code == 503
            await asyncio.sleep(0.05)
            assert not engine.tickets[0].cancelled
            engine.tickets[0].finish()
            await until(client, video["id"], status="completed")

    asyncio.run(main())
