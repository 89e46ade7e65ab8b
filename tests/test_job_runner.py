"""How many durable jobs are on the engine, and what becomes of them when it ends before they do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_server_videos import ADDRESS, VideoEngine, create, engine_jobs, serving, until

from ditrelay.errors import EngineClosed, QueueFull
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.status import EngineStatus, WorkerStatus
from ditrelay.runtime.topology import Topology, role_name
from ditrelay.server import job_runner
from ditrelay.server.job_rows import JobState
from ditrelay.server.job_runner import room


def status(down: Iterable[int] = (), **placement: Any) -> EngineStatus:
    """The ranks of a placement, all up but for ``down``."""
    topology = Topology.build(ServerArgs(**placement))
    workers = []
    for rank in range(topology.world_size):
        unit, roles = topology.unit_of(rank), topology.roles_of(rank)
        replica = topology.replicas.index(unit.leader) if "denoise" in unit.roles else None
        state = "down" if rank in down else "up"
        workers.append(WorkerStatus(rank, role_name(roles), state, replica=replica))
    return EngineStatus(ready=not down, workers=tuple(workers))


@pytest.mark.parametrize(
    ("placement", "down", "replicas"),
    [
        ({"num_gpus": 1}, (), 1),
        ({"num_gpus": 3}, (), 3),
        ({"num_gpus": 3}, (1,), 2),
        ({"num_gpus": 4, "sp_degree": 4}, (), 1),
        ({"num_gpus": 4, "sp_degree": 4}, (2,), 0),  # one of its ranks is missing
        ({"num_gpus": 6, "sp_degree": 4}, (), 2),  # the last one is smaller
        ({"num_gpus": 6, "sp_degree": 4}, (5,), 1),
        ({"num_gpus": 4, "enable_disagg": True, "num_non_dit_ranks": 1}, (), 3),
        ({"num_gpus": 4, "enable_disagg": True, "num_non_dit_ranks": 1, "sp_degree": 3}, (), 1),
        ({"num_gpus": 4, "enable_disagg": True, "num_non_dit_ranks": 2}, (), 2),
        ({"num_gpus": 4, "enable_disagg": True, "num_non_dit_ranks": 2, "sp_degree": 2}, (), 1),
        ({"num_gpus": 4, "enable_disagg": True, "num_non_dit_ranks": 2}, (3,), 2),  # the encoder's queue takes them
    ],
)
def test_the_engine_has_room_for_what_its_replicas_take_however_many_ranks_they_are(placement, down, replicas):
    assert room(status(down, **placement), window=2) == replicas * 4


class Placed(VideoEngine):
    """Its ranks are those of ``placed``; remembers how patient its requests are."""

    placed = status(num_gpus=4, sp_degree=4)

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self.patient: list[bool] = []

    def status(self) -> EngineStatus:
        return replace(self.placed, ready=self.ready)

    async def submit(self, params, *, patient: bool = False):
        self.patient.append(patient)
        return await super().submit(params)


def test_behind_one_replica_of_four_ranks_as_many_jobs_are_on_the_engine_as_it_takes_and_none_is_hurried(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path, made=Placed) as (client, engine):
            made = [(await create(client))["id"] for _ in range(10)]
            await until(client, made[3], stage="encoding")
            await asyncio.sleep(0.05)
            assert engine.patient == [True] * 4
            assert (await until(client, made[4]))["status"] == "queued"

    asyncio.run(main())


def test_jobs_wait_for_a_replica_that_is_down_and_begin_soon_after_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_runner, "_LOOK_WHILE_DOWN_SECONDS", 0.01)

    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path, made=Placed) as (client, engine):
            engine.placed = status((1,), num_gpus=4, sp_degree=4)
            video = await create(client)
            await asyncio.sleep(0.05)
            assert (await until(client, video["id"]))["status"] == "queued"
            engine.placed = status(num_gpus=4, sp_degree=4)
            await until(client, video["id"], stage="encoding")

    asyncio.run(main())


def test_when_the_engine_ends_by_itself_its_jobs_stay_queued_and_the_next_server_makes_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            made = [(await create(client, f"[wait] {number}"))["id"] for number in range(10)]
            await until(client, made[3], stage="encoding")
            engine.closed = True
            for ticket in engine.tickets:
                ticket._end(EngineClosed("the engine's control loop failed: can't start new thread"))
            for video_id in made:
                await until(client, video_id, status="queued")
            while engine_jobs(client).live:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            assert {video["status"] for video in (await client.get(ADDRESS)).json()["data"]} == {"queued"}
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            for number, video_id in enumerate(made):
                await until(client, video_id, stage="encoding")
                engine.tickets[number].finish()
                await until(client, video_id, status="completed")

    asyncio.run(main())


def test_a_job_for_which_the_engine_had_no_place_after_all_is_made_later(tmp_path: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            video = await create(client)
            await until(client, video["id"], stage="encoding")
            engine.tickets[0]._end(QueueFull(1, 1))
            while len(engine.tickets) < 2:
                await asyncio.sleep(0.005)
            engine.tickets[1].finish()
            await until(client, video["id"], status="completed")

    asyncio.run(main())


def test_a_job_cancelled_as_the_engine_ends_stays_cancelled(tmp_path: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            video = await create(client)
            await until(client, video["id"], stage="encoding")
            jobs = engine_jobs(client)
            await jobs.call(jobs.store.cancel, video["id"])
            engine.tickets[0]._end(EngineClosed("the engine's control loop failed"))
            while jobs.live:
                await asyncio.sleep(0.005)
            row = await jobs.call(jobs.store.get, video["id"])
            assert row.state is JobState.CANCELLED

    asyncio.run(main())
