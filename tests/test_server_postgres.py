"""Video jobs in PostgreSQL: made, kept over a restart of the server, and waiting while the database is away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from postgres import Cluster, postgres
from server_fakes import CardEngine, running

from ditrelay.models.card import load_card
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.server import job_thread

SECONDS = 30.0


class VideoEngine(CardEngine):
    model_card = load_card("builtin:timed?frames=9")

    @property
    def card(self) -> Any:
        return self.model_card


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with postgres() as made:
        yield made


def engine_over(url: str, folder: Path) -> VideoEngine:
    return VideoEngine(ServerArgs(served_model_name="tiny", job_store=url, output_dir=str(folder)))


async def answered(client: httpx.AsyncClient, status: int, method: str = "GET", path: str = "", **options: Any) -> Any:
    """The answer, once it has that status (right after the start the store is not open yet)."""
    async with asyncio.timeout(SECONDS):
        while (response := await client.request(method, f"/v1/videos{path}", **options)).status_code != status:
            await asyncio.sleep(0.02)
    return response.json()


async def completed(client: httpx.AsyncClient, video: dict[str, Any]) -> dict[str, Any]:
    async with asyncio.timeout(SECONDS):
        while (now := await answered(client, 200, path=f"/{video['id']}"))["status"] != "completed":
            await asyncio.sleep(0.02)
    return now


def test_videos_are_made_and_a_later_server_lists_them(cluster: Cluster, tmp_path: Path) -> None:
    url = cluster.create_database("listed")

    async def main() -> None:
        async with running(engine_over(url, tmp_path)) as client:
            await answered(client, 200)
            made = await completed(client, await answered(client, 200, "POST", json={"prompt": "a fox ⛵"}))
        async with running(engine_over(url, tmp_path)) as client:
            assert (await answered(client, 200))["data"] == [made]
            file = await client.get(f"/v1/videos/{made['id']}/content")
            assert (file.status_code, file.headers["content-type"]) == (200, "video/mp4")

    asyncio.run(main())


def test_while_the_database_is_away_the_answer_is_503_and_afterwards_all_goes_on(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(job_thread, "_RETRY_SECONDS", 0.1)
    url = cluster.create_database("away")

    async def main() -> None:
        async with running(engine_over(url, tmp_path)) as client:
            await answered(client, 200)
            await asyncio.to_thread(cluster.stop)
            try:
                refused = await client.post("/v1/videos", json={"prompt": "a secret"})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
                assert refused.json()["error"]["code"] == "job_store_down"
                assert (await client.get("/v1/videos")).status_code == 503
                assert (await client.get("/health")).status_code == 200
            finally:
                await asyncio.to_thread(cluster.start)
            await completed(client, await answered(client, 200, "POST", json={"prompt": "a fox"}))

    asyncio.run(main())
    assert "--job-store" in caplog.text and "a secret" not in caplog.text
