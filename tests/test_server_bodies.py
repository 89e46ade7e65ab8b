"""Bodies that take more than their share: too much JSON, packed, slow, or for a temporary folder that is full."""

from __future__ import annotations

import asyncio
import gzip
import json
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_fakes import CardEngine, FakeEngine, running
from starlette.types import Message

from ditrelay.runtime.server_args import ServerArgs
from ditrelay.server.body_limit import BodyLimit, BodyRules
from ditrelay.server.encodings import PIECE, Inflater, JsonSize
from ditrelay.server.held_bytes import HeldBytes
from ditrelay.server.problem import Refused

ADDRESS = "/v1/images/generations"
EDITS = "/v1/images/edits"
JSON = {"content-type": "application/json"}
GZIP = JSON | {"content-encoding": "gzip"}


def send(address: str, engine: FakeEngine | None = None, **how: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with running(engine or FakeEngine()) as client:
            return await client.post(address, **how)

    return asyncio.run(main())


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# ---------------------------------------------------------------- how large its JSON is


@pytest.mark.parametrize("address", [ADDRESS, EDITS])
@pytest.mark.parametrize("item", [b"[],", b"{},", b"[[[[]]]],", b"0,", b'"",'])
def test_json_of_many_values_is_never_read(address: str, item: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = json.loads

    def read(text: bytes | str, **how: Any) -> object:
        assert len(text) < 10_000
        return loads(text, **how)

    monkeypatch.setattr(json, "loads", read)
    body = b'{"prompt": [%s 0]}' % (item * (1_000_000 // len(item)))
    answer = send(address, CardEngine(), content=body, headers=JSON)
    assert code_of(answer) == (400, "invalid_json")
    assert "--max-json-bytes" in answer.json()["error"]["message"]


def counted(text: bytes, cuts: list[int]) -> int:
    """What ``JsonSize`` counts of a text that comes in pieces."""
    size, ends = JsonSize(1 << 30), sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    for begin, end in zip(ends, ends[1:], strict=False):
        size.feed(text[begin:end])
    return size._outside


TEXTS = st.text(st.sampled_from('a"\\[{,é '), max_size=20)


@given(st.recursive(TEXTS | st.integers(), lambda each: st.lists(each) | st.dictionaries(TEXTS, each)), st.data())
def test_what_is_in_strings_is_not_counted_wherever_the_text_is_cut(value: object, data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=False).encode()
    cuts = data.draw(st.lists(st.integers(0, len(text))))
    assert counted(text, cuts) == counted(text, [])
    if not isinstance(value, list | dict):
        return
    outside = 0
    in_string = escaped = False
    for char in text.decode():
        if not in_string or (char == '"' and not escaped):
            outside += 32 if char in "[{" else char not in " \t\r\n"
            in_string ^= char == '"'
            escaped = False
        else:
            escaped = char == "\\" and not escaped
    assert counted(text, cuts) == outside


def test_a_picture_in_json_may_be_large_and_nothing_else_beside_it() -> None:
    picture = b"data:image/png;base64," + b"A" * (2 << 20)
    answer = send(EDITS, CardEngine(), content=b'{"prompt": "a", "image": "%s"}' % picture, headers=JSON)
    assert answer.status_code != 413
    for how in (
        {"content": b'{"prompt": "%s", "image": "%s"}' % (b"a" * (2 << 20), picture), "headers": JSON},
        {"data": {"prompt": "a" * (2 << 20)}, "files": {"image": b"x"}},
    ):
        answer = send(EDITS, CardEngine(), **how)
        assert code_of(answer) == (413, "body_too_large")
        assert "--max-request-bytes" in answer.json()["error"]["message"]


def test_json_in_utf_16_is_refused_as_it_could_not_be_counted() -> None:
    answer = send(ADDRESS, content='{"prompt": "a"}'.encode("utf-16"), headers=JSON)
    assert code_of(answer) == (400, "invalid_json")


# ---------------------------------------------------------------- packed


def test_a_gzip_body_is_read_as_a_plain_one() -> None:
    engine = FakeEngine()
    body = gzip.compress(json.dumps({"prompt": "a red apple", "seed": 7}).encode())
    assert send(ADDRESS, engine, content=body, headers=GZIP).status_code == 200
    assert engine.tickets[0].params.prompt == "a red apple"
    packed = JSON | {"content-encoding": "identity"}
    assert send(ADDRESS, content=b'{"prompt": "a"}', headers=packed).status_code == 200


def test_a_gzip_form_is_read_as_a_plain_one() -> None:
    form = httpx.Request("POST", "http://x", data={"prompt": "a"}, files={"image": b"no picture"})
    headers = {"content-type": form.headers["content-type"], "content-encoding": "gzip"}
    answer = send(EDITS, CardEngine(), content=gzip.compress(form.read()), headers=headers)
    assert answer.json()["error"]["param"] == "image"


@pytest.mark.parametrize("name", ["br", "deflate", "zstd", "gzip, gzip", "nothing"])
def test_other_packings_are_415_and_say_what_is_taken(name: str) -> None:
    answer = send(ADDRESS, content=b"x", headers=JSON | {"content-encoding": name})
    assert code_of(answer) == (415, "unsupported_encoding")
    assert "allowed: gzip, identity" in answer.json()["error"]["message"]
    assert answer.headers["accept-encoding"] == "gzip, identity"


@pytest.mark.parametrize(
    "body", [b"{}", b"", gzip.compress(b'{"prompt": "a"}')[:-1], gzip.compress(b"{}") + b"x", zlib.compress(b"{}")]
)
def test_damaged_gzip_is_400(body: bytes) -> None:
    assert code_of(send(ADDRESS, content=body, headers=GZIP)) == (400, "invalid_encoding")


def test_a_body_that_unpacks_to_too_much_is_413_and_never_unpacked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []
    take = Inflater.take

    def note(self: Inflater) -> bytes:
        pieces.append(len(piece := take(self)))
        return piece

    monkeypatch.setattr(Inflater, "take", note)
    bomb = gzip.compress(b" " * (100 << 20), 1)
    assert code_of(send(ADDRESS, content=bomb, headers=GZIP)) == (413, "body_too_large")
    assert sum(pieces) <= (1 << 20) + PIECE and max(pieces) <= PIECE


# ---------------------------------------------------------------- a full temporary folder


def test_a_large_upload_needs_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*what: object, **how: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(tempfile, "_TemporaryFileWrapper", full)
    answer = send(EDITS, CardEngine(), data={"prompt": "a"}, files={"image": b"x" * (3 << 20)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")


# ---------------------------------------------------------------- slow, and shares


class Client:
    """One body in pieces, sent by hand."""

    def __init__(self, limit: BodyLimit, address: str = "192.0.2.1") -> None:
        self._pieces: asyncio.Queue[Message] = asyncio.Queue()
        scope = {"type": "http", "headers": [(b"content-type", b"multipart/form-data")], "client": (address, 1)}
        self.answer = asyncio.ensure_future(limit(scope, self._pieces.get, None))  # type: ignore[arg-type]

    async def send(self, nbytes: int, *, last: bool = False) -> None:
        self._pieces.put_nowait({"type": "http.request", "body": b"x" * nbytes, "more_body": not last})
        await asyncio.sleep(0.01)

    async def refusal(self) -> tuple[int, str]:
        async with asyncio.timeout(10):
            with pytest.raises(Refused) as caught:
                await self.answer
        return caught.value.status_code, caught.value.detail


async def hold_for_ever(scope: Any, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await asyncio.Event().wait()


def on_a_clock(main: Callable[[Callable[[float], None]], Awaitable[None]]) -> None:
    """Run ``main``, which may put the loop's clock forward."""

    async def run() -> None:
        loop, ahead = asyncio.get_running_loop(), 0.0

        def forward(seconds: float) -> None:
            nonlocal ahead
            ahead += seconds

        loop.time = lambda: time.monotonic() + ahead  # type: ignore[method-assign]
        await asyncio.wait_for(main(forward), 1e6)

    asyncio.run(run())


def test_a_body_that_trickles_is_408_however_often_a_byte_comes() -> None:
    async def main(forward: Callable[[float], None]) -> None:
        client = Client(BodyLimit(hold_for_ever, rules=BodyRules(rate=100, timeout=30)))
        await client.send(50)
        for _ in range(31):
            forward(1)
            await client.send(1)
        status, reason = await client.refusal()
        assert status == 408
        assert "--min-body-rate" in reason and "--body-timeout" in reason

    on_a_clock(main)


def test_a_body_that_comes_at_the_least_rate_arrives_and_may_pause() -> None:
    async def main(forward: Callable[[float], None]) -> None:
        client = Client(BodyLimit(hold_for_ever, rules=BodyRules(rate=100, timeout=30)))
        for _ in range(50):
            forward(20)
            await client.send(2000)
        await client.send(1, last=True)
        assert not client.answer.done()
        client.answer.cancel()

    on_a_clock(main)


def test_bodies_that_stopped_short_of_their_end_give_their_place_to_others() -> None:
    """Eight clients with a body each fill all that may be held, and wait."""

    async def main(forward: Callable[[float], None]) -> None:
        held = HeldBytes(max_total=800, max_client=800)
        limit = BodyLimit(hold_for_ever, held=held, rules=BodyRules(rate=100))
        stopped = [Client(limit, f"192.0.2.{number}") for number in range(8)]
        for client in stopped:
            await client.send(98)
        forward(1)  # not slow yet: the newcomer is the one to wait
        early = Client(limit, "192.0.2.9")
        await early.send(98, last=True)
        assert (await early.refusal())[0] == 429
        forward(2)
        late = Client(limit, "192.0.2.9")
        await late.send(98, last=True)
        assert not late.answer.done()
        assert held.nbytes <= 800
        refused = [client for client in stopped if client.answer.done()]
        assert len(refused) == held.given_up == 1  # no more than need be
        status, reason = await refused[0].refusal()
        assert status == 429 and "comes slowly" in reason
        for client in (*stopped, late):
            client.answer.cancel()

    on_a_clock(main)


def test_one_address_can_not_take_everybodys_bytes() -> None:
    async def main(forward: Callable[[float], None]) -> None:
        held = HeldBytes(max_total=800, max_client=600)
        limit = BodyLimit(hold_for_ever, held=held)
        greedy = [Client(limit, "192.0.2.1") for _ in range(7)]
        for client in greedy:
            await client.send(100, last=True)
        status, reason = await greedy[-1].refusal()
        assert status == 429 and "--max-client-bytes" in reason
        other = Client(limit, "192.0.2.2")
        await other.send(100, last=True)
        assert not other.answer.done()
        for client in (*greedy, other):
            client.answer.cancel()
        await asyncio.gather(*(each.answer for each in (*greedy, other)), return_exceptions=True)
        assert (held.nbytes, held.of("192.0.2.1"), held.arriving) == (0, 0, set())

    on_a_clock(main)


def test_the_share_of_one_address_is_three_quarters_and_never_less_than_a_body() -> None:
    assert ServerArgs().client_share == 192 << 20
    assert ServerArgs(max_client_bytes=40 << 20).client_share == 40 << 20
    assert ServerArgs(max_client_bytes=1).client_share == 32 << 20
    assert ServerArgs(max_total_bytes=1 << 20).client_share == 1 << 20
