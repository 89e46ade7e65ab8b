"""``/v1/videos``: jobs, their pages, files, ends, and what a restart does with them."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import tiny_models
from chaos_server import Server
from PIL import Image
from server_fakes import FakeEngine, FakeResult, FakeTicket, running

from ditrelay.errors import ConfigError, RequestFailed
from ditrelay.models.card import load_card
from ditrelay.runtime.metrics import Timings
from ditrelay.runtime.request import RequestState, SamplingParams
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.tickets import Progress
from ditrelay.server.job_store import JobStore
from ditrelay.server.jobs import Live

ADDRESS = "/v1/videos"
CARD = msgspec.structs.replace(
    load_card("builtin:emoji"),
    media="video",
    fps=16,
    frame_multiple=4,
    default_num_frames=81,
    max_num_frames=161,
    supports_negative_prompt=True,
    supports_guidance=True,
)
MP4 = b"MP4 of a cat"


class VideoTicket(FakeTicket):
    """Ends by ``finish``; ``step`` tells of a step of four."""

    def __init__(self, request_id: str, params: SamplingParams) -> None:
        self._news: asyncio.Queue[Progress] = asyncio.Queue()
        super().__init__(request_id, params)
        self.step(RequestState.ENCODING)

    def step(self, state: RequestState, step: int = 0, at: float = 0.0) -> None:
        self._news.put_nowait(Progress(self.request_id, state, step, 4, at))

    def finish(self) -> None:
        self._ended.set_result(FakeResult(self.request_id, self.params, MP4, timings=Timings(total=1.0)))

    async def events(self) -> AsyncIterator[Progress]:
        while not self._ended.done():
            news = asyncio.ensure_future(self._news.get())
            await asyncio.wait((news, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if news.done():
                yield news.result()
            news.cancel()


class VideoEngine(FakeEngine):
    def __init__(self, folder: Path, *, card: Any = CARD, **settings: Any) -> None:
        settings = {"served_model_name": "tiny", "output_dir": str(folder)} | settings
        super().__init__(ServerArgs(**settings), dit_ranks=1)
        self._card = card

    @property
    def card(self) -> Any:
        return self._card

    async def submit(self, params: SamplingParams, **how: object) -> FakeTicket:
        if self.closed:
            return await super().submit(params)
        ticket = VideoTicket(f"r{len(self.tickets)}", self.card.resolve(params))
        self.tickets.append(ticket)
        return ticket


def png(side: int = 8, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


@pytest.fixture
def use(tmp_path: Path) -> Callable[..., None]:
    """Run ``act(client, engine)`` against a server whose files are in ``tmp_path``."""

    def use(act: Callable[[httpx.AsyncClient, VideoEngine], Coroutine[Any, Any, None]], **settings: Any) -> None:
        async def main() -> None:
            async with asyncio.timeout(30), serving(tmp_path, **settings) as (client, engine):
                await act(client, engine)

        asyncio.run(main())

    return use


@asynccontextmanager
async def serving(
    folder: Path, *, made: type[VideoEngine] = VideoEngine, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    engine = made(folder, **settings)
    async with running(engine) as client:
        while (await client.get(ADDRESS)).status_code == 503 or not engine.ready:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        yield client, engine


async def create(client: httpx.AsyncClient, prompt: str = "[wait]", **fields: Any) -> dict[str, Any]:
    response = await client.post(ADDRESS, json={"prompt": prompt} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def until(client: httpx.AsyncClient, video_id: str, **expected: Any) -> dict[str, Any]:
    """The video, once it is as expected."""
    for _ in range(2000):
        video = (await client.get(f"{ADDRESS}/{video_id}")).json()
        if expected.items() <= video.items():
            return video
        await asyncio.sleep(0.005)
    raise AssertionError(f"waited in vain for {expected}: {video}")


def wait_for(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain"
        time.sleep(0.02)


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_a_video_is_queued_made_and_fetched(use, tmp_path):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        video = await create(client, "a cat", seconds="2", size="64x128", seed=7, num_inference_steps=4)
        assert (video["object"], video["status"], video["model"], video["progress"]) == ("video", "queued", "tiny", 0)
        assert (video["seconds"], video["size"], video["num_frames"], video["seed"]) == ("2.062", "64x128", 33, 7)
        assert (video["error"], video["completed_at"], video["remixed_from_video_id"]) == (None, None, None)
        done = await until(client, video["id"], status="completed")
        assert done["progress"] == 100 and done["completed_at"] >= done["created_at"] > 1_700_000_000
        assert done["expires_at"] == pytest.approx(done["completed_at"] + 7 * 24 * 3600, abs=1)
        file = await client.get(f"{ADDRESS}/{video['id']}/content")
        assert (file.content, file.headers["content-type"]) == (MP4, "video/mp4")
        part = await client.get(f"{ADDRESS}/{video['id']}/content", headers={"Range": "bytes=0-2"})
        assert (part.status_code, part.content) == (206, b"MP4")
        assert (tmp_path / f"{video['id']}.mp4").read_bytes() == MP4
        [ticket] = engine.tickets
        assert (ticket.params.width, ticket.params.height, ticket.params.num_inference_steps) == (64, 128, 4)

    use(act)


def test_a_running_video_tells_its_stage_percent_and_time_left(use):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        video = await create(client)
        running = await until(client, video["id"], stage="encoding")
        assert (running["status"], running["progress"], running["eta_seconds"]) == ("in_progress", 0, None)
        engine.tickets[0].step(RequestState.DENOISING, 1, at=10.0)
        engine.tickets[0].step(RequestState.DENOISING, 2, at=13.0)
        running = await until(client, video["id"], step=2)
        assert (running["stage"], running["progress"], running["eta_seconds"]) == ("denoising", 47, 6.0)
        engine.tickets[0].step(RequestState.DECODING)
        running = await until(client, video["id"], stage="decoding")
        assert (running["progress"], running["step"]) == (90, 4)
        engine.tickets[0].finish()
        done = await until(client, video["id"], status="completed")
        assert (done["stage"], done["step"]) == (None, done["num_inference_steps"])
        job = (await client.get(f"/v1/jobs/{video['id']}")).json()
        assert job["step"] == job["total_steps"] == done["num_inference_steps"]

    use(act)


def test_a_denoise_that_starts_over_measures_its_pace_anew():
    live = Live()
    for state, step, at in (("denoising", 3, 5.0), ("queued", 0, 6.0), ("denoising", 1, 9.0), ("denoising", 2, 10.0)):
        live.observe(Progress("r", RequestState(state), step, 4, at))
    assert (live.step, live.seconds_left()) == (2, 2.0)


def test_a_denoise_that_goes_on_at_a_checkpoint_measures_its_pace_from_there():
    live = Live()
    for step, at in ((11, 5.0), (12, 6.0), (13, 7.0)):
        live.observe(Progress("r", RequestState.DENOISING, step, 20, at))
    assert live.seconds_left() == 7.0


def test_a_form_makes_a_video_as_json_does(use):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        fields = {"prompt": "[wait]", "seconds": "4", "size": "64x64", "seed": "3", "guidance_scale": "2.5"}
        response = await client.post(ADDRESS, files={name: (None, value) for name, value in fields.items()})
        assert response.status_code == 200, response.text
        assert (response.json()["seed"], response.json()["num_frames"]) == (3, 65)
        await until(client, response.json()["id"], stage="encoding")
        assert engine.tickets[0].params.guidance_scale == 2.5

    use(act)


def test_a_picture_reaches_a_model_that_starts_from_one_by_form_and_as_data_url(use):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        file = ("../../x.png", png(), "image/png")
        form = await client.post(ADDRESS, data={"prompt": "a"}, files={"input_reference": file})
        url = "data:image/png;base64," + base64.b64encode(png()).decode()
        for video in (form.json(), await create(client, "b", input_reference=url)):
            await until(client, video["id"], status="completed")
        assert [ticket.params.image for ticket in engine.tickets] == [png(), png()]
        error = error_of(await client.post(ADDRESS, json={"prompt": "c"}))
        assert error["param"] == "input_reference"

    use(act, card=msgspec.structs.replace(CARD, needs_image=True))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a picture",
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        png(save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]),
    ],
    ids=["empty", "text", "broken", "heic", "animated"],
)
def test_what_is_no_single_picture_is_refused(use, content):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        file = {"input_reference": ("x.png", content, "image/png")}
        assert error_of(await client.post(ADDRESS, data={"prompt": "a"}, files=file))["param"] == "input_reference"

    use(act, card=msgspec.structs.replace(CARD, needs_image=True))


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1/x.png", "file:///etc/passwd", "/etc/passwd", "data:image/png;base64,%"]
)
def test_an_address_is_never_fetched(use, address):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        error = error_of(await client.post(ADDRESS, json={"prompt": "a", "input_reference": address}))
        assert error["param"] == "input_reference" and "data:image/png" in error["message"]

    use(act, card=msgspec.structs.replace(CARD, needs_image=True))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"seconds": 0}, "seconds"),
        ({"seconds": "soon"}, "seconds"),
        ({"seconds": "nan"}, "seconds"),
        ({"seconds": 60}, "seconds"),
        ({"seconds": 2, "num_frames": 33}, "num_frames"),
        ({"num_frames": 34}, "num_frames"),
        ({"size": "huge"}, "size"),
        ({"size": "65x64"}, "size"),
        ({"seed": -2}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"input_reference": "data:image/png;base64,AA=="}, "input_reference"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_input_is_400_with_its_field_and_queues_nothing(use, fields, param):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        error = error_of(await client.post(ADDRESS, json={"prompt": "a cat"} | fields))
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert error["message"].startswith(f"{param}: ")
        assert (await client.get(ADDRESS)).json()["data"] == []

    use(act)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, "invalid_json"),
        ({"content": b"\xff", "headers": {"content-type": "application/json"}}, "invalid_json"),
        ({"json": ["a cat"]}, "invalid_json"),
        ({"content": b"a cat"}, "invalid_content_type"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "invalid_form"),
        ({"files": [("prompt", (None, "a")), ("prompt", (None, "b"))]}, "invalid_value"),
        ({"files": {"prompt": ("a.txt", b"a")}}, "invalid_value"),
    ],
)
def test_a_body_that_cannot_be_read_is_400(use, how, code):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        assert error_of(await client.post(ADDRESS, **how))["code"] == code

    use(act)


def test_unknown_models_videos_and_parameters(use):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        refused = await client.post(ADDRESS, json={"prompt": "a", "model": "sora-2"})
        assert error_of(refused, 404)["code"] == "model_not_found"
        for method, path in (("GET", ""), ("GET", "/content"), ("POST", "/cancel"), ("DELETE", "")):
            answer = await client.request(method, f"{ADDRESS}/video_none{path}")
            assert error_of(answer, 404)["code"] == "video_not_found"
        for query in ("limit=0", "limit=101", "limit=x", "after=video_none", "order=up", "page=2"):
            answer = await client.get(f"{ADDRESS}?{query}")
            assert error_of(answer)["param"] == query.partition("=")[0]
        video = await create(client)
        assert error_of(await client.get(f"{ADDRESS}/{video['id']}/content"))["code"] == "video_not_completed"
        content = await client.get(f"{ADDRESS}/{video['id']}/content?variant=thumbnail")
        assert error_of(content)["param"] == "variant"

    use(act)


def test_a_method_that_is_not_allowed_names_all_that_are(use):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        assert (await client.put(ADDRESS)).headers["allow"] == "GET, HEAD, POST"
        assert (await client.put(f"{ADDRESS}/video_x")).headers["allow"] == "DELETE, GET, HEAD"

    use(act)


def test_a_model_that_makes_pictures_is_refused_at_every_address(tmp_path):
    async def main() -> None:
        engine = FakeEngine(ServerArgs(served_model_name="tiny", output_dir=str(tmp_path / "none")))
        async with running(engine) as client:
            calls = [client.post(ADDRESS, json={"prompt": "a"}), client.get(ADDRESS), client.get(f"{ADDRESS}/x")]
            for answer in await asyncio.gather(*calls):
                assert error_of(answer)["code"] == "unsupported_model"
                assert "'tiny' makes images" in (message := answer.json()["error"]["message"])
                assert message.endswith("such as builtin:emoji-video")
        assert not (tmp_path / "none").exists()

    asyncio.run(main())


def test_pages_hold_every_video_once_in_both_orders(use):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        made = [(await create(client))["id"] for _ in range(5)]
        for order, expected in (("desc", made[::-1]), ("asc", made)):
            seen, after = [], ""
            while True:
                page = (await client.get(f"{ADDRESS}?limit=2&order={order}{after}")).json()
                seen += [video["id"] for video in page["data"]]
                assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
                if not page["has_more"]:
                    break
                after = f"&after={page['last_id']}"
            assert seen == expected

    use(act)


def test_an_idempotency_key_makes_one_video_and_refuses_another_request(use):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        headers = {"Idempotency-Key": "once"}
        calls = [client.post(ADDRESS, json={"prompt": "[wait]"}, headers=headers) for _ in range(5)]
        answers = [answer.json() for answer in await asyncio.gather(*calls)]
        assert len({video["id"] for video in answers}) == len({video["seed"] for video in answers}) == 1
        other = await client.post(ADDRESS, json={"prompt": "another"}, headers=headers)
        assert error_of(other)["code"] == "idempotency_key_reused"
        assert len((await client.get(ADDRESS)).json()["data"]) == 1
        assert error_of(await client.post(ADDRESS, json={"prompt": "a"}, headers={"Idempotency-Key": "k" * 256}))

    use(act)


def test_a_video_is_cancelled_while_it_runs_and_while_it_waits(use):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        made = [(await create(client))["id"] for _ in range(5)]  # there is room for four
        await until(client, made[3], stage="encoding")
        assert (await until(client, made[4]))["status"] == "queued"
        for video_id in (made[4], made[0], made[0]):
            answer = await client.post(f"{ADDRESS}/{video_id}/cancel")
            assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        assert engine.tickets[0].cancelled and len(engine.tickets) == 4
        engine.tickets[1].finish()
        await until(client, made[1], status="completed")
        ended = await client.post(f"{ADDRESS}/{made[1]}/cancel")
        assert error_of(ended)["code"] == "video_ended"
        assert (await until(client, made[0]))["status"] == "cancelled"

    use(act)


def test_deleting_removes_the_file_and_cancels_what_runs(use, tmp_path):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        done, runs = await create(client, "a cat"), await create(client)
        await until(client, done["id"], status="completed")
        await until(client, runs["id"], stage="encoding")
        for video in (done, runs):
            answer = await client.delete(f"{ADDRESS}/{video['id']}")
            assert answer.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
            assert (await client.get(f"{ADDRESS}/{video['id']}")).status_code == 404
        assert engine.tickets[1].cancelled
        assert not list(tmp_path.glob("*.mp4"))

    use(act)


def test_a_video_that_fails_says_why_and_others_go_on(use):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        bad, good = await create(client, "[fail]"), await create(client, "a cat")
        failed = await until(client, bad["id"], status="failed")
        assert "out of memory" in failed["error"]["message"]
        await until(client, good["id"], status="completed")

    use(act)


def test_more_videos_than_may_be_queued_are_429(use):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        for _ in range(4):
            await until(client, (await create(client))["id"], stage="encoding")
        await create(client)
        answer = await client.post(ADDRESS, json={"prompt": "one too many"})
        assert error_of(answer, 429)["code"] == "queue_full" and answer.headers["retry-after"] == "9"

    use(act, max_jobs=1)


def test_after_a_restart_old_videos_are_there_and_what_was_left_is_made_once_with_its_seed(tmp_path):
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            done = await create(client, "a cat", seed=3)
            await until(client, done["id"], status="completed")
            left = [await create(client, f"[wait] {i}") for i in range(6)]
            await until(client, left[3]["id"], stage="encoding")
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            assert (await client.get(f"{ADDRESS}/{done['id']}/content")).content == MP4
            for video in left:
                await until(client, video["id"], stage="encoding")
                ticket = next(t for t in engine.tickets if t.params.prompt == video["prompt"])
                assert ticket.params.seed == video["seed"]
                ticket.finish()
                await until(client, video["id"], status="completed")
            assert len(engine.tickets) == 6

    asyncio.run(main())


def test_a_video_is_as_long_as_its_own_model_made_it_whatever_is_served_now(tmp_path):
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, _):
            made = await create(client, "a cat", num_frames=33)
            done = await until(client, made["id"], status="completed")
        other = msgspec.structs.replace(CARD, fps=24)
        async with asyncio.timeout(30), serving(tmp_path, card=other, served_model_name="other") as (client, _):
            [kept] = (await client.get(ADDRESS)).json()["data"]
            assert kept["seconds"] == done["seconds"] == f"{33 / 16:.4g}"
            assert (await create(client, "a dog", num_frames=33))["seconds"] == f"{33 / 24:.4g}"

    asyncio.run(main())


def test_a_file_that_was_written_before_the_crash_is_not_made_again(tmp_path):
    async def main() -> None:
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            video = await create(client)
            await until(client, video["id"], stage="encoding")
        (tmp_path / f"{video['id']}.mp4").write_bytes(b"whole")
        (tmp_path / "video_other.part").write_bytes(b"half")
        async with asyncio.timeout(30), serving(tmp_path) as (client, engine):
            await until(client, video["id"], status="completed")
            assert (await client.get(f"{ADDRESS}/{video['id']}/content")).content == b"whole"
            assert not engine.tickets and not list(tmp_path.glob("*.part"))

    asyncio.run(main())


def test_two_servers_never_share_a_folder(use, tmp_path):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        failures: list[BaseException] = []
        from ditrelay.server.app import create_app

        app = create_app(VideoEngine(tmp_path), on_failed_start=failures.append)
        async with app.router.lifespan_context(app):
            while not failures:
                await asyncio.sleep(0.001)
        assert isinstance(failures[0], ConfigError) and "--output-dir" in str(failures[0])

    use(act)


def test_videos_are_kept_for_their_time(use, tmp_path):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        video = await create(client, "a cat")
        await until(client, video["id"], status="completed")
        await asyncio.sleep(0.2)
        await engine_jobs(client).sweep()
        assert (await client.get(f"{ADDRESS}/{video['id']}")).status_code == 404
        assert not list(tmp_path.glob("*.mp4"))

    use(act, job_retention=0.15)


def engine_jobs(client: httpx.AsyncClient) -> Any:
    return client._transport.app.state.context.jobs  # type: ignore[attr-defined]


def test_where_a_role_is_lost_for_good_what_waits_waits_for_the_next_server(use):
    async def act(client: httpx.AsyncClient, engine: VideoEngine) -> None:
        made = [(await create(client))["id"] for _ in range(5)]
        await until(client, made[3], stage="encoding")
        engine.lost_roles = (("denoise", "died too often"),)
        engine.tickets[0]._end(RequestFailed("r0", "no rank is left"))
        await until(client, made[0], status="failed")
        assert (await until(client, made[4]))["status"] == "queued"
        assert error_of(await client.post(ADDRESS, json={"prompt": "a"}), 503)["code"] == "role_down"

    use(act)


def test_killed_in_the_middle_of_its_jobs_the_next_server_ends_each_once(tmp_path):
    model = tiny_models.build("wan", tmp_path / "model")
    flags = ["--model-path", str(model), "--device", "cpu", "--no-warmup", "--output-dir", str(tmp_path / "out")]
    body = {"size": "48x48", "num_frames": 9, "num_inference_steps": 60}
    with Server(flags) as server:
        made = [
            httpx.post(f"{server.url}{ADDRESS}", json=body | {"prompt": f"a chair {i}"}, timeout=30).json()
            for i in range(4)
        ]
        wait_for(lambda: httpx.get(f"{server.url}{ADDRESS}/{made[0]['id']}", timeout=30).json()["step"] > 2)
        server.process.kill()
        server.process.wait(30)
    before = JobStore(f"sqlite:///{tmp_path / 'out' / 'jobs.sqlite'}")
    assert before.interrupted() and len(before.page(limit=9)) == 4
    before.close()
    with Server(flags) as server:
        for video in made:
            address = f"{server.url}{ADDRESS}/{video['id']}"
            wait_for(lambda address=address: httpx.get(address, timeout=30).json()["status"] == "completed")
            assert httpx.get(f"{address}/content", timeout=30).content[4:8] == b"ftyp"
            assert httpx.get(address, timeout=30).json()["seed"] == video["seed"]
        page = httpx.get(f"{server.url}{ADDRESS}", timeout=30).json()
        assert [video["id"] for video in page["data"]] == [video["id"] for video in made[::-1]]
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 4


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")  # it means OpenAI's own service
def test_the_openai_package_makes_lists_fetches_and_deletes_videos_and_sigterm_ends_the_server_amid_one(tmp_path):
    model = tiny_models.build("wan", tmp_path / "model")
    flags = ["--model-path", str(model), "--device", "cpu", "--no-warmup", "--output-dir", str(tmp_path / "out")]
    ask: dict[str, Any] = {"model": str(model), "size": "48x48", "seconds": "1"}
    with (
        Server(flags) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0) as client,
    ):
        video = client.videos.create_and_poll(
            prompt="a chair", poll_interval_ms=50, extra_body={"num_inference_steps": 2, "seed": 3}, **ask
        )
        assert (video.status, video.progress, video.object, video.size) == ("completed", 100, "video", "48x48")
        assert client.videos.download_content(video.id).read()[4:8] == b"ftyp"
        waits = client.videos.create(prompt="a table", extra_body={"num_inference_steps": 1000}, **ask)
        assert [each.id for each in client.videos.list(limit=1)] == [waits.id, video.id]
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
        with pytest.raises(openai.BadRequestError) as caught:
            client.videos.create(prompt="a chair", **(ask | {"size": "47x48"}))
        assert caught.value.param == "size"
        wait_for(lambda: client.videos.retrieve(waits.id).status == "in_progress")
        assert server.stop() == []
