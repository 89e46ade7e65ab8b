"""``/v1/jobs``: every picture and video can be listed, watched from any event on, and cancelled."""

from __future__ import annotations

import asyncio
import base64
import gc
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from server_fakes import EMOJI, FakeEngine, FakeResult, FakeTicket, settle
from sse import Follower

from ditrelay.models.card import ModelCard
from ditrelay.runtime.metrics import Timings
from ditrelay.runtime.request import RequestState, SamplingParams
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.telemetry import caller
from ditrelay.runtime.tickets import Progress
from ditrelay.server import board
from ditrelay.server.app import create_app
from ditrelay.server.events import EventLog, EventLogs
from ditrelay.server.files import FileStore
from ditrelay.server.image_jobs import ImageJobs
from ditrelay.server.job_schemas import Cancelled, Denoising, Encoding, Preview

PICTURES = "/v1/images/generations"
TIMINGS = Timings(total=1.5)

State = RequestState


class StepTicket(FakeTicket):
    """Comes as far as it is told to; queued at first. Each reader of its events gets all of them."""

    def __init__(self, request_id: str, params: SamplingParams) -> None:
        self._news = asyncio.Event()
        self._told: list[Progress] = []
        super().__init__(request_id, params)
        self.tell(State.QUEUED)

    def tell(self, state: RequestState, step: int = 0, at: float = 0.0, preview: bytes | None = None) -> None:
        self._told.append(Progress(self.request_id, state, step, 4 if step else 0, at, preview))
        self._news.set()

    def finish(self) -> None:
        self._ended.set_result(FakeResult(self.request_id, self.params, b"the file", TIMINGS))
        self.tell(State.DONE)

    def _end(self, error: Exception) -> None:
        if not self._ended.done():
            super()._end(error)
            self.tell(State.FAILED)

    async def events(self) -> AsyncIterator[Progress]:
        position = 0
        while True:
            for each in self._told[position:]:
                position += 1
                yield each
                if each.state.ended:
                    return
            self._news.clear()
            if position == len(self._told):
                await self._news.wait()


class StepEngine(FakeEngine):
    async def submit(self, params: SamplingParams, **how: object) -> FakeTicket:
        ticket = StepTicket(f"r{len(self.tickets)}", self.card.resolve(params))
        self.tickets.append(ticket)
        return ticket


class StepVideos(StepEngine):
    """Makes videos; its files are in ``folder``."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(ServerArgs(served_model_name="tiny", output_dir=str(folder), **settings), dit_ranks=1)

    @property
    def card(self) -> ModelCard:
        clips = {"fps": 16, "frame_multiple": 4, "default_num_frames": 81, "max_num_frames": 161}
        return msgspec.structs.replace(EMOJI, media="video", **clips)


Act = Callable[[FastAPI, httpx.AsyncClient, Any], Coroutine[Any, Any, None]]


@asynccontextmanager
async def serving(engine: FakeEngine) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    app = create_app(engine)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        engine.loaded.set()
        while not app.state.context.started:
            await asyncio.sleep(0.001)
        yield app, client


def run(engine: FakeEngine | Callable[[], FakeEngine], act: Act) -> None:
    async def main() -> None:
        made = engine if isinstance(engine, FakeEngine) else engine()
        async with asyncio.timeout(30), serving(made) as (app, client):
            await act(app, client, made)

    asyncio.run(main())


@pytest.fixture
def videos(tmp_path: Path) -> Callable[[], StepVideos]:
    """Makes an engine for videos; one after the other, they share a folder."""
    return lambda: StepVideos(tmp_path, num_gpus=1, max_pending_transfers=1)  # three jobs at a time are on the engine


async def draw(client: httpx.AsyncClient, engine: FakeEngine, n: int = 1) -> tuple[asyncio.Task, list[dict[str, Any]]]:
    """A request for pictures under way, and its jobs in order."""
    before = len(engine.tickets)
    body = {"prompt": "[wait] a cat", "n": n, "seed": 7, "response_format": "url"}
    asking = asyncio.create_task(client.post(PICTURES, json=body))
    while len(engine.tickets) < before + n:
        await asyncio.sleep(0.001)
    await settle()
    jobs = (await client.get("/v1/jobs")).json()["data"]
    return asking, jobs[:n][::-1]


async def film(client: httpx.AsyncClient, **fields: Any) -> str:
    answer = await client.post("/v1/videos", json={"prompt": "[wait] a cat"} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def play(ticket: StepTicket) -> None:
    """All that happens in a short life, but the end."""
    ticket.tell(State.ENCODING)
    ticket.tell(State.ENCODED)
    ticket.tell(State.DENOISING)
    ticket.tell(State.DENOISING, 1, at=10.0)
    ticket.tell(State.DENOISING, 2, at=12.0)
    ticket.tell(State.DENOISING, 1, at=12.1, preview=b"jpeg of 1")
    ticket.tell(State.DENOISED)
    ticket.tell(State.DECODING)


PLAYED = ["queued", "encoding", "denoising", "denoising", "denoising", "preview", "decoding"]


# ---------------------------------------------------------------- pictures


def test_a_picture_is_a_job_that_tells_every_stage_each_step_and_where_its_file_is():
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        asking, [job] = await draw(client, engine)
        assert job["id"].startswith("image_") and len(job["id"]) == len("image_") + 32
        assert (job["kind"], job["status"], job["position"], job["prompt"]) == ("image", "queued", 1, "[wait] a cat")
        watching = Follower(app, f"/v1/jobs/{job['id']}/events")
        play(engine.tickets[0])
        await watching.until(lambda: watching.names == PLAYED)
        steps = [event.data for event in watching.events if event.name == "denoising"]
        total = engine.tickets[0].params.num_inference_steps
        assert steps == [
            {"step": 0, "total_steps": total, "eta_seconds": None},
            {"step": 1, "total_steps": 4, "eta_seconds": None},
            {"step": 2, "total_steps": 4, "eta_seconds": 4.0},
        ]
        assert base64.b64decode(watching.events[-2].data["b64_jpeg"]) == b"jpeg of 1"
        now = (await client.get(f"/v1/jobs/{job['id']}")).json()
        assert (now["status"], now["stage"], now["position"], now["url"]) == ("in_progress", "decoding", None, None)
        assert (now["step"], now["total_steps"]) == (4, 4)
        engine.tickets[0].finish()
        last = (await watching.to_end())[-1]
        assert last.name == "completed"
        assert last.data | {"url": "", "timings": {}} == {
            "url": "",
            "media_type": "image/png",
            "width": 128,
            "height": 128,
            "seed": 7,
            "timings": {},
        }
        assert last.data["timings"]["total"] == 1.5
        assert last.data["url"].startswith("http://pictures.test:8000/v1/images/")
        assert (await client.get(last.data["url"])).content == b"the file"
        assert (await asking).json()["data"][0]["url"].rpartition("/v1/")[2] == last.data["url"].rpartition("/v1/")[2]
        ended = (await client.get(f"/v1/jobs/{job['id']}")).json()
        assert (ended["status"], ended["stage"], ended["error"]) == ("completed", None, None)
        assert (ended["step"], ended["total_steps"]) == (4, 4)
        assert ended["url"] == last.data["url"].replace("http://pictures.test:8000/", "http://x/")

    run(StepEngine, act)


def test_a_picture_that_has_ended_is_known_without_its_request_and_its_file():
    """These are megabytes each, and hundreds of them are known for ten minutes."""

    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        assert (await client.post(PICTURES, json={"prompt": "[fail]"})).status_code == 500
        for end in (lambda ticket: ticket.finish(), lambda ticket: ticket.cancel()):
            asking, _ = await draw(client, engine)
            end(engine.tickets[-1])
            await asking
        tickets = [weakref.ref(ticket) for ticket in engine.tickets]
        engine.tickets.clear()
        gc.collect()
        assert [ticket() for ticket in tickets] == [None] * 3
        jobs = (await client.get("/v1/jobs")).json()["data"]
        assert [job["status"] for job in jobs] == ["cancelled", "completed", "failed"]
        assert (await client.get(jobs[1]["url"])).content == b"the file"
        cancelled = await client.post(f"/v1/jobs/{jobs[0]['id']}/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")

    run(StepEngine, act)


def test_a_failed_picture_ends_with_the_reason():
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        assert (await client.post(PICTURES, json={"prompt": "[fail]"})).status_code == 500
        [job] = (await client.get("/v1/jobs")).json()["data"]
        assert (job["status"], job["error"]["code"]) == ("failed", "request_failed")
        assert "out of memory" in job["error"]["message"]
        [*_, last] = await Follower(app, f"/v1/jobs/{job['id']}/events").to_end()
        assert (last.name, last.data["error"]) == ("failed", job["error"])

    run(StepEngine, act)


def test_a_cancelled_picture_of_a_stream_is_told_and_the_others_are_finished():
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        body = {"prompt": "[wait]", "n": 2, "stream": True}
        asking = asyncio.create_task(client.post(PICTURES, json=body))
        while len(engine.tickets) < 2:
            await asyncio.sleep(0.001)
        await settle()
        second, first = (await client.get("/v1/jobs")).json()["data"]
        cancelled = await client.post(f"/v1/jobs/{first['id']}/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        assert (await client.post(f"/v1/jobs/{first['id']}/cancel")).json()["status"] == "cancelled"
        assert not engine.tickets[1].cancelled
        engine.tickets[1].finish()
        answer = (await asking).text
        assert answer.count("event: image_generation.cancelled\n") == 1
        assert answer.count("event: image_generation.completed\n") == 1
        assert f'"job_id":"{first["id"]}"' in answer.partition("event: image_generation.cancelled\n")[2]
        late = await client.post(f"/v1/jobs/{second['id']}/cancel")
        assert (late.status_code, late.json()["error"]["code"]) == (400, "job_ended")

    run(StepEngine, act)


def test_a_cancelled_picture_ends_a_request_that_is_not_streamed_with_a_status_that_is_not_tried_again():
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        asking, jobs = await draw(client, engine, n=2)
        await client.post(f"/v1/jobs/{jobs[1]['id']}/cancel")
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_cancelled")
        assert all(ticket.cancelled for ticket in engine.tickets)

    run(StepEngine, act)


def test_places_in_the_queue_follow_the_order_of_submission_and_are_told_as_they_change(monkeypatch):
    monkeypatch.setattr(board, "_POSITION_SECONDS", 0.01)

    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        asking, jobs = await draw(client, engine, n=3)
        assert [job["position"] for job in jobs] == [1, 2, 3]
        watching = Follower(app, f"/v1/jobs/{jobs[2]['id']}/events")
        await watching.until(lambda: len(watching.events) == 1)
        engine.tickets[1].tell(State.ENCODING)
        await watching.until(lambda: len(watching.events) == 2)
        engine.tickets[0].tell(State.ENCODING)
        await watching.until(lambda: len(watching.events) == 3)
        await asyncio.sleep(0.05)  # what does not change is not told again
        assert [event.data["position"] for event in watching.events] == [3, 2, 1]
        asking.cancel()
        await watching.leave()

    run(StepEngine, act)


def test_a_client_that_leaves_cancels_its_job_and_those_who_watch_are_told():
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        asking, [job] = await draw(client, engine)
        watching = Follower(app, f"/v1/jobs/{job['id']}/events")
        await watching.until(lambda: watching.names == ["queued"])
        context = app.state.context
        [task] = [context.images.get(job["id"])]
        task.ticket.cancel()
        assert (await watching.to_end())[-1].name == "cancelled"
        await asking

    run(StepEngine, act)


# ---------------------------------------------------------------- resuming


def test_last_event_id_resumes_exactly_behind_it_in_a_header_or_in_the_address():
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        asking, [job] = await draw(client, engine)
        address = f"/v1/jobs/{job['id']}/events"
        play(engine.tickets[0])
        first = Follower(app, address)
        await first.until(lambda: first.names == PLAYED)
        ids = [event.id for event in first.events]
        assert len(set(ids)) == len(ids) and None not in ids
        await first.leave()
        engine.tickets[0].finish()
        await asking
        for how in ({"Last_Event_ID": ids[2]}, {"query": f"last_event_id={ids[2]}"}):
            rest = await Follower(app, address, **how).to_end()
            # Behind the third; the preview has gone with the end.
            assert [event.name for event in rest] == ["denoising", "denoising", "decoding", "completed"]
            assert [event.id for event in rest[:2]] == ids[3:5]
        over = Follower(app, address, Last_Event_ID=rest[-1].id)
        assert (await over.to_end(), over.status) == ([], 204)

    run(StepEngine, act)


@pytest.mark.parametrize("unknown", ["", "x", "deadbeef-3", "-", "1-2-3", "\u00e9", "9" * 5000])
def test_an_id_of_another_life_of_the_server_or_of_nothing_begins_at_what_is_known(unknown):
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        asking, [job] = await draw(client, engine)
        engine.tickets[0].finish()
        await asking
        events = await Follower(app, f"/v1/jobs/{job['id']}/events", Last_Event_ID=unknown).to_end()
        assert [event.name for event in events] == ["queued", "completed"]

    run(StepEngine, act)


@pytest.mark.parametrize("address", ["/v1/jobs/x", "/v1/jobs/x/events", f"/v1/jobs/video_{'9' * 500}/events"])
def test_an_unknown_job_is_404(address, videos):
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        answer = await client.get(address)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
        cancel = await client.post("/v1/jobs/x/cancel")
        assert (cancel.status_code, cancel.json()["error"]["param"]) == (404, "job_id")

    run(StepEngine, act)
    run(videos, act)


# ---------------------------------------------------------------- readers


def test_a_slow_reader_holds_nothing_back_and_misses_old_previews_only():
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        asking, [job] = await draw(client, engine)
        slow = Follower(app, f"/v1/jobs/{job['id']}/events")
        await slow.until(lambda: slow.names == ["queued"])
        slow.reading.clear()
        ticket = engine.tickets[0]
        ticket.tell(State.ENCODING)
        for step in range(1, 301):
            ticket.tell(State.DENOISING, step)
            if step % 100 == 0:
                ticket.tell(State.DENOISING, step, preview=f"jpeg of {step}".encode())
        await asyncio.wait_for(client.get(f"/v1/jobs/{job['id']}"), 5)
        while (await client.get(f"/v1/jobs/{job['id']}")).json()["step"] < 300:
            await asyncio.sleep(0.001)
        slow.reading.set()
        await slow.until(lambda: "preview" in slow.names)
        steps = [event.data["step"] for event in slow.events if event.name == "denoising"]
        assert steps == list(range(1, 301))
        assert [event.data["step"] for event in slow.events if event.name == "preview"] == [300]
        ticket.finish()
        assert (await slow.to_end())[-1].name == "completed"
        await asking

    run(StepEngine, act)


def test_a_quiet_stream_sends_comments(monkeypatch):
    from ditrelay.server import streaming

    monkeypatch.setattr(
        streaming.EventStream.__init__, "__kwdefaults__", {"until": None, "eager": False, "heartbeat": 0.02}
    )

    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        asking, [job] = await draw(client, engine)
        quiet = Follower(app, f"/v1/jobs/{job['id']}/events")
        await quiet.until(lambda: len(quiet.comments) > 3)
        assert quiet.names == ["queued"]
        await quiet.leave()
        asking.cancel()

    run(StepEngine, act)


def test_the_end_of_the_server_ends_what_is_followed(videos):
    async def main() -> None:
        engine = videos()
        async with asyncio.timeout(30), serving(engine) as (app, client):
            job_id = await film(client)
            followers = [Follower(app, f"/v1/jobs/{job_id}/events"), Follower(app, "/v1/activity")]
            for each in followers:
                await each.until(lambda each=each: each.status == 200)
        for each in followers:
            await each.to_end()
        assert not {"completed", "failed", "cancelled"} & set(followers[0].names)  # the next server makes it

    asyncio.run(main())


def test_old_previews_go_and_a_number_that_is_not_there_counts_as_none():
    log = EventLog()
    for step in (1, 2):
        log.add(Denoising(step=step, total_steps=2, eta_seconds=None))
        log.add(Preview(step=step, b64_jpeg=""))

    async def names(after: int) -> list[int]:
        return [event.number async for event in log.read(after)]

    log.add(Cancelled())
    log.add(Encoding())  # after the end nothing happens
    assert asyncio.run(names(0)) == [1, 3, 5]
    assert asyncio.run(names(2)) == [3, 5]  # number 2 was a preview that is gone
    assert [log.number_of(f"{log.mark}-{number}") for number in (5, 6, "05", "-1", "")] == [5, 0, 5, 0, 0]


def test_logs_are_kept_for_a_while_and_are_bounded():
    now = [0.0]
    logs = EventLogs(lifetime=10, limit=3, clock=lambda: now[0])
    first = logs.open("a")
    first.add(Cancelled())
    assert logs.open("a") is first
    for name in "bcd":
        logs.open(name)
    assert len(logs) == 3 and logs.open("a") is not first
    logs.open("d").readers = 1
    for name in "efg":
        logs.open(name)
    assert [name for name, _ in logs.followed()] == ["d"]
    kept = logs.open("g")
    kept.add(Cancelled())
    now[0] = 11.0
    logs.open("h")
    assert logs.open("g") is not kept


def test_ended_pictures_are_forgotten_by_age_and_by_number():
    async def main() -> None:
        now = [0.0]
        jobs = ImageJobs(lifetime=10, limit=2, clock=lambda: now[0])
        ids = []
        for number in range(4):
            ticket = StepTicket(f"r{number}", SamplingParams(prompt="[wait]", seed=1))
            ids.append(jobs.follow(ticket, FileStore()).id)
            if number < 3:
                ticket.finish()
                await settle()
        assert [job_id for job_id in ids if jobs.get(job_id)] == ids[1:]
        now[0] = 11.0
        assert [job_id for job_id in ids if jobs.get(job_id)] == ids[3:]  # the one that runs
        assert jobs.names.job_of("r0") == ids[0]
        ticket.cancel()
        await settle()

    asyncio.run(main())


def test_one_clients_burst_of_pictures_that_end_takes_no_other_clients_jobs():
    async def main() -> None:
        jobs, ids = ImageJobs(limit=6), []
        for number, client in enumerate(["mine"] * 3 + ["burst"] * 20):
            ticket = StepTicket(f"r{number}", SamplingParams(prompt="[wait]", seed=1))
            ids.append(jobs.follow(ticket, FileStore(), client).id)
            ticket.cancel() if client == "burst" else ticket.finish()
            await settle()
        assert [job_id for job_id in ids if jobs.get(job_id)] == ids[:3] + ids[-3:]

    asyncio.run(main())


# ---------------------------------------------------------------- videos


def test_a_video_tells_its_place_its_stages_and_its_end(videos, monkeypatch):
    monkeypatch.setattr(board, "_POSITION_SECONDS", 0.01)

    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        ids = [await film(client, seed=number) for number in range(5)]
        while len(engine.tickets) < 3:
            await asyncio.sleep(0.001)
        listed = (await client.get("/v1/jobs")).json()["data"]
        assert {job["id"]: job["position"] for job in listed} == dict(zip(ids, (1, 2, 3, 4, 5), strict=True))
        last = Follower(app, f"/v1/jobs/{ids[4]}/events")
        await last.until(lambda: last.names == ["queued"])
        first = Follower(app, f"/v1/jobs/{ids[0]}/events")
        await first.until(lambda: first.names == ["queued"])
        play(engine.tickets[0])
        engine.tickets[0].finish()
        assert [event.name for event in await first.to_end()][-1] == "completed"
        assert [name for name in first.names if name != "queued"] == [*PLAYED[1:], "completed"]
        done = first.events[-1].data
        assert done["url"] == f"http://pictures.test:8000/v1/videos/{ids[0]}/content"
        assert (done["width"], done["seed"], done["timings"]["total"]) == (128, 0, 1.5)
        await last.until(lambda: [event.data for event in last.events] == [{"position": 5}, {"position": 4}])
        assert (await client.post(f"/v1/jobs/{ids[4]}/cancel")).json()["status"] == "cancelled"
        assert (await last.to_end())[-1].name == "cancelled"
        job = (await client.get(f"/v1/jobs/{ids[0]}")).json()
        assert (job["kind"], job["status"]) == ("video", "completed")
        assert job["url"] == f"http://x/v1/videos/{ids[0]}/content"

    run(videos, act)


@pytest.mark.parametrize(("fields", "previews"), [({}, 4), ({"previews": 0}, 0), ({"previews": 10}, 10)])
def test_a_video_has_previews_unless_they_are_not_wanted(videos, fields, previews):
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        await film(client, **fields)
        while not engine.tickets:
            await asyncio.sleep(0.001)
        assert engine.tickets[0].params.previews == previews

    run(videos, act)


def test_more_previews_than_allowed_are_refused(videos):
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        answer = await client.post("/v1/videos", json={"prompt": "a cat", "previews": 11})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "previews")

    run(videos, act)


def test_a_video_is_made_in_the_trace_of_who_asked_for_it(tmp_path):
    seen = []

    class Traced(StepVideos):
        async def submit(self, params: SamplingParams, **how: object) -> FakeTicket:
            seen.append((params.seed, caller()))
            return await super().submit(params)

    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        body = {"prompt": "a cat", "seed": 1}
        await client.post("/v1/videos", json=body, headers={"traceparent": "00-1", "tracestate": "a=b", "other": "x"})
        await client.post("/v1/videos", json=body | {"seed": 2})
        while len(seen) < 2:
            await asyncio.sleep(0.001)
        assert sorted(seen) == [(1, {"traceparent": "00-1", "tracestate": "a=b"}), (2, None)]

    run(lambda: Traced(tmp_path, otlp_endpoint="http://127.0.0.1:9"), act)


def test_events_go_on_in_the_next_life_of_the_server(videos):
    seen: dict[str, str] = {}

    async def before(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        ids = [await film(client, seed=number) for number in range(3)]
        while len(engine.tickets) < 3:
            await asyncio.sleep(0.001)
        engine.tickets[0].finish()
        [*_, end] = await Follower(app, f"/v1/jobs/{ids[0]}/events").to_end()
        assert (await client.post(f"/v1/jobs/{ids[1]}/cancel")).status_code == 200
        engine.tickets[2].tell(State.ENCODING)
        running = Follower(app, f"/v1/jobs/{ids[2]}/events")
        await running.until(lambda: "encoding" in running.names)
        seen.update(done=ids[0], end=end.id, cancelled=ids[1], runs=ids[2], running=running.events[-1].id)
        await running.leave()

    async def after(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        for job, last_event, names in (
            ("done", seen["end"], ["completed"]),
            ("done", "", ["completed"]),
            ("cancelled", "", ["cancelled"]),
        ):
            events = await Follower(app, f"/v1/jobs/{seen[job]}/events", Last_Event_ID=last_event).to_end()
            assert [event.name for event in events] == names
        while not engine.tickets:
            await asyncio.sleep(0.001)
        again = Follower(app, f"/v1/jobs/{seen['runs']}/events", Last_Event_ID=seen["running"])
        engine.tickets[0].tell(State.ENCODING)
        await again.until(lambda: "encoding" in again.names)  # from the start of what this life knows
        engine.tickets[0].finish()
        assert (await again.to_end())[-1].name == "completed"

    run(videos, before)
    run(videos, after)


def test_a_deleted_video_ends_for_those_who_follow_it(videos):
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        job_id = await film(client)
        watching = Follower(app, f"/v1/jobs/{job_id}/events")
        await watching.until(lambda: watching.names == ["queued"])
        await client.delete(f"/v1/videos/{job_id}")
        assert (await watching.to_end())[-1].name == "cancelled"
        assert (await client.get(f"/v1/jobs/{job_id}")).status_code == 404

    run(videos, act)


def test_a_video_that_failed_tells_why_also_to_who_asks_late(videos):
    async def act(app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        job_id = await film(client, prompt="[fail]")
        [*_, last] = await Follower(app, f"/v1/jobs/{job_id}/events").to_end()
        assert (last.name, last.data["error"]["code"]) == ("failed", "request_failed")
        assert "out of memory" in last.data["error"]["message"]

    run(videos, act)
