"""``/v1/activity``: which lanes there are, and what every rank does, as it happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from server_fakes import FakeEngine, settle
from sse import Follower
from test_server_jobs import StepEngine, draw, serving

from ditrelay.runtime.messages import Started, StepDone
from ditrelay.runtime.metrics import Span


def run(act: Callable[[FastAPI, httpx.AsyncClient, FakeEngine, Follower], Coroutine[Any, Any, None]]) -> None:
    """``act`` with a reader that is there from the start on."""

    async def main() -> None:
        engine = StepEngine()
        async with asyncio.timeout(30), serving(engine) as (app, client):
            reader = Follower(app, "/v1/activity")
            await reader.until(lambda: reader.names == ["topology"])
            await settle()
            await act(app, client, engine, reader)
            await reader.leave()

    asyncio.run(main())


def test_the_first_event_tells_ranks_and_lanes_in_the_order_in_which_a_request_meets_them():
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine, reader: Follower) -> None:
        topology = reader.events[0].data
        assert abs(topology["now"] - time.monotonic()) < 20
        assert topology["model"] == "tiny"
        assert [(rank["rank"], rank["role"], rank["replica"]) for rank in topology["ranks"]] == [
            (0, "dit", 0),
            (1, "dit", 1),
            (2, "non_dit", None),
        ]
        assert topology["ranks"][2]["roles"] == ["encode", "decode"]
        lanes = [(lane["rank"], lane["kind"]) for lane in topology["lanes"]]
        assert lanes[:2] == [(2, "encode"), (2, "send")] and lanes[-2:] == [(2, "receive"), (2, "decode")]
        assert [lane for lane in lanes if lane[1] == "denoise"] == [(0, "denoise"), (1, "denoise")]
        assert (topology["lanes"][0]["title"], topology["lanes"][0]["role"]) == ("rank 2", "non-DiT")

    run(act)


def test_work_is_told_as_it_happens_under_the_name_of_its_job():
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine, reader: Follower) -> None:
        asking, [job] = await draw(client, engine)
        now = time.monotonic()
        engine.feed.observe(Started(0, "r0", "denoise", now), now)
        engine.feed.observe(StepDone(0, "r0", 1, 4, now + 0.5), now)
        await reader.until(lambda: any(event.data.get("step") == 1 for event in reader.events))
        step = reader.events[-1].data
        assert (step["rank"], step["kind"], step["request_id"], step["job_id"]) == (0, "denoise", "r0", job["id"])
        assert (step["began"], step["ended"], step["total_steps"]) == (pytest.approx(now), None, 4)
        engine.tickets[0].finish()
        await asking
        engine.feed.done(Span("r0", 0, "denoise", now, now + 1, (now + 0.5, now + 1)))
        await reader.until(lambda: reader.events[-1].data["ended"] is not None)
        assert (reader.events[-1].data["job_id"], reader.events[-1].data["step"]) == (job["id"], 2)

    run(act)


def test_who_comes_later_is_told_of_the_last_seconds_and_of_what_is_under_way():
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine, reader: Follower) -> None:
        now = time.monotonic()
        engine.feed.done(Span("old", 2, "encode", now - 100, now - 90))
        engine.feed.done(Span("new", 2, "encode", now - 2, now - 1))
        engine.feed.observe(Started(0, "new", "denoise", now), now)
        late = Follower(app, "/v1/activity")
        await late.until(lambda: len(late.events) == 3)
        assert [(event.data["request_id"], event.data["kind"]) for event in late.events[1:]] == [
            ("new", "encode"),
            ("new", "denoise"),
        ]
        assert late.events[1].data["job_id"] is None  # as with the warm-up's
        await late.leave()

    run(act)


def test_a_slow_reader_gets_the_newest_of_each_piece_of_work_and_holds_nothing_back():
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine, reader: Follower) -> None:
        reader.reading.clear()
        now = time.monotonic()
        engine.feed.observe(Started(0, "r", "denoise", now), now)
        await settle()
        for step in range(1, 501):
            engine.feed.observe(StepDone(0, "r", step, 500, now), now)
        engine.feed.observe(Started(1, "s", "denoise", now), now)
        await settle()
        reader.reading.set()
        await reader.until(lambda: reader.events[-1].data.get("request_id") == "s")
        assert [event.data["step"] for event in reader.events[1:]][-2:] == [500, 0]
        assert len(reader.events) < 10

    run(act)
