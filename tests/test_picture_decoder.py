"""The processes that decode clients' pictures: each picture once, within limits, and what one does hurts no other."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import msgspec
import numpy as np
import pytest
from picture_samples import picture, png_of
from PIL import Image

from ditrelay.async_engine import AsyncEngine
from ditrelay.errors import EngineClosed, InvalidRequest, PicturesFull, RequestCancelled
from ditrelay.models.card import load_card
from ditrelay.models.pixels import open_image
from ditrelay.models.raw_picture import unpack
from ditrelay.runtime.messages import Submit
from ditrelay.runtime.pictures import decoder as decoder_module
from ditrelay.runtime.pictures.decoder import PictureDecoder
from ditrelay.runtime.pictures.orders import Answer, Order
from ditrelay.runtime.pictures.pictures import MAX_WHOLE, Pictures
from ditrelay.runtime.pictures.process import DecodingProcess, Died
from ditrelay.runtime.request import SamplingParams
from ditrelay.runtime.server_args import ServerArgs

WAIT = 60.0
EMOJI = load_card("builtin:emoji")
PNG = picture()


def order(content: bytes = PNG, width: int = 0, height: int = 0, claimed: int = 48 * 32) -> Order:
    return Order(content, width, height, MAX_WHOLE, claimed)


@pytest.fixture
def decoder() -> Iterator[PictureDecoder]:
    made = PictureDecoder()
    yield made
    made.close()


def until(condition: object) -> None:
    end = time.monotonic() + WAIT
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


# ---------------------------------------------------------------- real processes


def test_pixels_come_back_as_they_would_be_in_this_process_and_one_process_serves_all(decoder: PictureDecoder) -> None:
    for content in (PNG, picture(kind="JPEG"), picture(kind="AVIF")):
        for size in ((0, 0), (64, 24)):
            found = unpack(decoder.submit(order(content, *size)).future.result(WAIT))
            with open_image(SamplingParams(prompt="", image=content)) as image:
                expected = image.resize(size, Image.Resampling.LANCZOS) if size[0] else image
            assert found is not None and found[0] == expected.size and bytes(found[1]) == expected.tobytes()
    assert len(decoder._idle) == 1


def test_a_damaged_picture_is_refused_and_the_next_is_decoded_by_the_same_process(decoder: PictureDecoder) -> None:
    for content in (PNG[:60] + b"damage" + PNG[66:], png_of(48, 32, 2, 8, short=500)):
        with pytest.raises(InvalidRequest, match="image: .*can't be read.*allowed: a whole PNG"):
            decoder.submit(order(content)).future.result(WAIT)
    decoder.submit(order()).future.result(WAIT)
    assert len(decoder._idle) == 1


def test_a_picture_that_needs_more_memory_than_its_size_has_is_refused(decoder: PictureDecoder) -> None:
    greedy = Order(picture(), 60_000, 60_000, MAX_WHOLE, 48 * 32)
    with pytest.raises(InvalidRequest, match="image: .*more memory"):
        decoder.submit(greedy).future.result(WAIT)
    decoder.submit(order()).future.result(WAIT)


def test_a_picture_that_takes_longer_than_its_time_is_refused_and_not_tried_again(decoder: PictureDecoder) -> None:
    class Slow(Order):
        cpu_seconds = 0.02  # type: ignore[assignment]

    large = picture(3000, 3000, "JPEG", quality=95)
    began = len(_children())
    with pytest.raises(InvalidRequest, match="image: it takes more than 0.0 s to decode"):
        decoder.submit(Slow(large, 3000, 3000, MAX_WHOLE, 9_000_000)).future.result(WAIT)
    assert decoder._idle == [] and len(_children()) <= began
    decoder.submit(order()).future.result(WAIT)


def test_a_process_that_somebody_killed_is_replaced_and_its_picture_decoded(decoder: PictureDecoder) -> None:
    decoder.submit(order()).future.result(WAIT)
    [process] = decoder._idle
    os.kill(process.pid, signal.SIGKILL)
    decoder.submit(order()).future.result(WAIT)
    assert decoder._idle and decoder._idle[0].pid != process.pid


def test_a_process_ignores_a_terminals_and_a_service_managers_signals_and_ends_with_its_connection() -> None:
    process = DecodingProcess()
    process.decode(order())
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
    assert not process.decode(order()).is_refused
    process._connection.close()  # as a head that was killed does
    assert process._process.wait(WAIT) == 0


def test_the_process_imports_nothing_heavy() -> None:
    code = "import sys, ditrelay.runtime.pictures.child as c; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT, check=True)
    assert not {"torch", "numpy", "diffusers", "msgspec", "pydantic"} & set(loaded.stdout.split())


def _children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


# ---------------------------------------------------------------- turns, with processes that decode nothing


class FakeProcess:
    """Answers when it is let, or dies."""

    made: list[FakeProcess] = []

    def __init__(self) -> None:
        self.go, self.orders, self.killed = threading.Event(), [], False
        self.made.append(self)

    def decode(self, order: Order) -> Answer:
        self.orders.append(order.content)
        assert self.go.wait(WAIT)
        self.go.clear()
        if self.killed or order.content == b"deadly":
            raise Died("signal 11", is_late=False)
        return Answer(False, 1, 1, b"rgb")

    def kill(self) -> None:
        self.killed = True
        self.go.set()

    def end(self) -> None:
        self.killed = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    monkeypatch.setattr(FakeProcess, "made", made := [])
    monkeypatch.setattr(decoder_module, "DecodingProcess", FakeProcess)
    return made


def busy(fakes: list[FakeProcess]) -> list[bytes]:
    return [each.orders[-1] for each in fakes if each.orders]


def test_a_clients_pictures_wait_for_each_other_and_not_for_those_of_others(fakes: list[FakeProcess]) -> None:
    decoder = PictureDecoder(at_once=2, per_client=1)
    first, *others = (decoder.submit(order(name), "a") for name in (b"a1", b"a2", b"a3"))
    until(lambda: busy(fakes) == [b"a1"])
    other = decoder.submit(order(b"b1"), "b")
    until(lambda: busy(fakes) == [b"a1", b"b1"])
    fakes[1].go.set()
    other.future.result(WAIT)
    assert not any(each.future.done() for each in (first, *others))
    for each in (first, *others):
        until(lambda each=each: any(process.orders[-1:] == [each.order.content] for process in fakes))
        next(process for process in fakes if process.orders[-1] == each.order.content).go.set()
        each.future.result(WAIT)
    assert len(fakes) == 2
    decoder.close()


def test_where_nobody_is_named_all_places_are_taken(fakes: list[FakeProcess]) -> None:
    decoder = PictureDecoder(at_once=2)
    made = [decoder.submit(order(name)) for name in (b"1", b"2", b"3")]
    until(lambda: sorted(busy(fakes)) == [b"1", b"2"])
    decoder.close()
    for each in made:
        with pytest.raises(EngineClosed):
            each.future.result(WAIT)
    with pytest.raises(EngineClosed):
        decoder.submit(order())


def test_a_picture_that_nobody_wants_any_more_gives_its_process_up_at_once(fakes: list[FakeProcess]) -> None:
    decoder = PictureDecoder(at_once=1)
    running, waiting, last = (decoder.submit(order(name)) for name in (b"1", b"2", b"3"))
    until(lambda: busy(fakes) == [b"1"])
    decoder.cancel(waiting)
    decoder.cancel(running)
    for each in (running, waiting):
        with pytest.raises(RequestCancelled):
            each.future.result(WAIT)
    until(lambda: len(fakes) == 2)
    fakes[1].go.set()
    last.future.result(WAIT)
    assert fakes[0].killed and fakes[1].orders == [b"3"]
    decoder.close()


def test_a_picture_that_kills_its_decoder_twice_is_refused(fakes: list[FakeProcess]) -> None:
    decoder = PictureDecoder()
    deadly = decoder.submit(order(b"deadly"))
    for number in range(2):
        until(lambda number=number: len(fakes) == number + 1)
        fakes[number].go.set()
    with pytest.raises(InvalidRequest, match="image: its decoder ended over it .signal 11."):
        deadly.future.result(WAIT)
    decoder.close()


def test_a_process_that_cannot_be_started_fails_its_picture_alone(
    fakes: list[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = PictureDecoder()

    def none_left() -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(decoder_module, "DecodingProcess", none_left)
        with pytest.raises(OSError, match="Too many open files"):
            decoder.submit(order()).future.result(WAIT)
    later = decoder.submit(order())
    until(lambda: fakes)
    fakes[0].go.set()
    later.future.result(WAIT)
    decoder.close()


# ---------------------------------------------------------------- shared by requests


def resolved(content: bytes, **changes: object) -> SamplingParams:
    return EMOJI.resolve(SamplingParams(prompt="a cat", image=content, **changes))


def pictures(decoder: PictureDecoder, max_bytes: int = 1 << 30) -> Pictures:
    return Pictures(EMOJI, decoder, max_bytes=max_bytes, retry_after=lambda: 7)


def test_requests_that_start_from_the_same_picture_share_its_reading_and_its_pixels(
    decoder: PictureDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[Order] = []
    submit = decoder.submit
    monkeypatch.setattr(decoder, "submit", lambda order, client="": orders.append(order) or submit(order, client))
    ours, content = pictures(decoder), picture(64, 32)
    kept = [ours.open(SamplingParams(prompt="a", image=content)) for _ in range(10)]
    assert kept[0] is not None and all(each is kept[0] for each in kept)
    made = set()
    for seed in range(10):
        with ours.decoding(kept[0], resolved(content, seed=seed), "a") as future:
            made.add(id(future.result(WAIT)))
    assert len(made) == len(orders) == 1
    with ours.decoding(kept[0], resolved(content, width=32, height=32), "a") as future:
        assert len(future.result(WAIT)) > 32 * 32 * 3
    assert [(each.width, each.height) for each in orders] == [(64, 32), (32, 32)]


def test_a_model_that_takes_no_picture_has_none_read() -> None:
    ours = Pictures(msgspec.structs.replace(EMOJI, edits=False), PictureDecoder(), max_bytes=1, retry_after=lambda: 7)
    assert ours.open(SamplingParams(prompt="a", image=b"no picture")) is None


def test_pixels_that_are_held_are_counted_and_those_that_nobody_holds_are_not(decoder: PictureDecoder) -> None:
    ours = pictures(decoder, max_bytes=64 * 64 * 3)
    first, second = picture(64, 64), picture(64, 56)
    held = ours.open(SamplingParams(prompt="a", image=first))
    other = ours.open(SamplingParams(prompt="a", image=second))
    with ours.decoding(held, resolved(first), "") as future:
        future.result(WAIT)
    with pytest.raises(PicturesFull, match="--max-total-bytes.*7 s"), ours.decoding(other, resolved(second), ""):
        pass
    del held
    with ours.decoding(other, resolved(second), "") as future:
        future.result(WAIT)


def test_when_the_last_one_who_waits_leaves_the_picture_is_given_up(fakes: list[FakeProcess]) -> None:
    decoder = PictureDecoder()
    ours = pictures(decoder)
    held = ours.open(SamplingParams(prompt="a", image=PNG))
    assert held is not None
    with ours.decoding(held, resolved(PNG), "a") as first:
        with ours.decoding(held, resolved(PNG), "a") as second:
            assert first is second
        until(lambda: fakes)
        assert not fakes[0].killed
    with pytest.raises(RequestCancelled):
        first.result(WAIT)
    with ours.decoding(held, resolved(PNG), "a") as again:  # what was given up is no answer for those who come later
        assert again is not first
    decoder.close()


# ---------------------------------------------------------------- of an engine


class Posted:
    """In place of a controller: keeps what is sent to it."""

    def __init__(self) -> None:
        self.messages: list[Submit] = []

    def post(self, message: Submit) -> None:
        self.messages.append(message)

    def stop(self, timeout: float) -> None:
        pass


def asked(engine: AsyncEngine) -> Posted:
    posted = Posted()
    engine._engine._controller = posted  # type: ignore[assignment]
    return posted


def test_ranks_get_pixels_and_the_client_keeps_its_file() -> None:
    async def main() -> None:
        engine = AsyncEngine(ServerArgs(device="cpu"))
        posted = asked(engine)
        content = picture(130, 70, "JPEG")
        tickets = [await engine.submit(SamplingParams(prompt="a", image=content)) for _ in range(3)]
        assert all(ticket.params.image is content for ticket in tickets)
        sent = [message.request.params for message in posted.messages]
        assert len({id(params.image) for params in sent}) == 1
        found = open_image(sent[0])
        with open_image(SamplingParams(prompt="", image=content)) as image:
            expected = image.resize((sent[0].width, sent[0].height), Image.Resampling.LANCZOS)
        assert found.size == (128, 64) == (sent[0].width, sent[0].height)
        assert np.array_equal(np.asarray(found), np.asarray(expected))
        with pytest.raises(InvalidRequest):  # what ranks get is nothing that a client may send
            await engine.submit(SamplingParams(prompt="a", image=sent[0].image))
        await engine.close()

    asyncio.run(main())


def test_a_damaged_picture_is_refused_before_a_rank_hears_of_it() -> None:
    async def main() -> None:
        engine = AsyncEngine(ServerArgs(device="cpu"))
        posted = asked(engine)
        damaged = png_of(64, 64, 2, 8, short=2000)
        for ask in (engine.submit, engine.check_picture):
            with pytest.raises(InvalidRequest, match="image: .*(rows are missing|truncated)"):
                await ask(SamplingParams(prompt="a", image=damaged))
        assert posted.messages == []
        await engine.close()

    asyncio.run(main())


def test_a_client_that_leaves_takes_the_decoding_of_its_picture_with_it(fakes: list[FakeProcess]) -> None:
    async def main() -> None:
        engine = AsyncEngine(ServerArgs(device="cpu"))
        posted = asked(engine)
        task = asyncio.create_task(engine.submit(SamplingParams(prompt="a", image=PNG), client="a"))
        async with asyncio.timeout(WAIT):
            while not busy(fakes):
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() and fakes[0].killed and posted.messages == []
        await engine.close()

    asyncio.run(main())


def test_a_thread_that_cannot_be_started_fails_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    decoder = PictureDecoder()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        future: Future[bytes] = decoder.submit(order()).future
        with pytest.raises(OSError, match="no thread"):
            future.result(WAIT)
    assert decoder.submit(order()).future.result(WAIT)
    decoder.close()


def test_the_command_line_refuses_a_damaged_picture_before_it_starts_anything(tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(png_of(64, 64, 2, 8, short=2000))
    command = [sys.executable, "-m", "ditrelay", "generate", "a cat", "--image", "damaged.png", "--device", "cpu"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT, check=False)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and "can't be read" in ended.stderr and ended.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.png"]
