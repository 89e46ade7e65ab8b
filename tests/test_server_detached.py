"""``Prefer: respond-async``: pictures that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
from server_fakes import FakeEngine, running, settle

ADDRESS = "/v1/images/generations"
LATER = {"Prefer": "respond-async"}


def with_client(engine: FakeEngine, act: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(engine) as client:
            await act(client)

    asyncio.run(main())


def test_the_jobs_are_answered_at_once_and_their_files_are_there_when_they_are_done():
    engine = FakeEngine()

    async def act(client: httpx.AsyncClient) -> None:
        answer = await client.post(ADDRESS, json={"prompt": "a cat [wait]", "n": 2, "seed": 5}, headers=LATER)
        assert answer.status_code == 202
        assert answer.headers["preference-applied"] == "respond-async"
        ids = [job["id"] for job in answer.json()["data"]]
        assert len(set(ids)) == 2
        assert [ticket.params.seed for ticket in engine.tickets] == [5, 6]
        for ticket in engine.tickets:
            ticket.finish()
        await settle()
        for job_id, seed in zip(ids, (5, 6), strict=True):
            job = (await client.get(f"/v1/jobs/{job_id}")).json()
            assert job["status"] == "completed"
            file = await client.get(job["url"])
            assert file.content == f"PNG of a cat [wait] with {seed}".encode()
            assert "max-age=3600" in file.headers["cache-control"]  # nobody has got it in another way

    with_client(engine, act)


def test_they_go_on_without_their_client_until_they_are_cancelled_as_jobs():
    engine = FakeEngine()

    async def act(client: httpx.AsyncClient) -> None:
        body = {"prompt": "a cat [wait]", "n": 2}
        first, second = (await client.post(ADDRESS, json=body, headers=LATER)).json()["data"]
        await settle()
        assert not any(ticket.cancelled for ticket in engine.tickets)
        assert (await client.post(f"/v1/jobs/{first['id']}/cancel")).json()["status"] == "cancelled"
        assert [ticket.cancelled for ticket in engine.tickets] == [True, False]
        assert (await client.get(f"/v1/jobs/{second['id']}")).json()["status"] == "in_progress"

    with_client(engine, act)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [({"prompt": "a cat", "size": "128x130"}, 400, "size"), ({"prompt": "a cat", "n": 99}, 400, "n")],
)
def test_what_is_refused_is_refused_as_without_it(body, status, param):
    async def act(client: httpx.AsyncClient) -> None:
        answer = await client.post(ADDRESS, json=body, headers=LATER)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)

    with_client(FakeEngine(), act)


def test_a_queue_without_room_for_all_takes_none():
    engine = FakeEngine(max_queue=2)

    async def act(client: httpx.AsyncClient) -> None:
        answer = await client.post(ADDRESS, json={"prompt": "a cat [wait]", "n": 3}, headers=LATER)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert [ticket.cancelled for ticket in engine.tickets] == [True, True]

    with_client(engine, act)


def test_the_end_of_the_server_waits_for_them():
    engine = FakeEngine()

    async def act(client: httpx.AsyncClient) -> None:
        context = client._transport.app.state.context
        await client.post(ADDRESS, json={"prompt": "a cat [wait]"}, headers=LATER)
        draining = asyncio.ensure_future(context.drain())
        await settle()
        assert not draining.done()
        engine.tickets[0].finish()
        await asyncio.wait_for(draining, 5)

    with_client(engine, act)


@pytest.mark.parametrize("prefer", ["", "wait=10", "respond-asynchronously"])
def test_other_preferences_change_nothing(prefer):
    async def act(client: httpx.AsyncClient) -> None:
        answer = await client.post(ADDRESS, json={"prompt": "a cat"}, headers={"Prefer": prefer})
        assert answer.status_code == 200

    with_client(FakeEngine(), act)


def test_it_is_one_of_several_preferences_in_any_case():
    async def act(client: httpx.AsyncClient) -> None:
        answer = await client.post(ADDRESS, json={"prompt": "a cat"}, headers={"Prefer": "wait=10, Respond-Async"})
        assert answer.status_code == 202

    with_client(FakeEngine(), act)
