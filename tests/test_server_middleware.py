"""The body limit, below FastAPI."""

from __future__ import annotations

import asyncio

import pytest
from starlette.exceptions import HTTPException

from ditrelay.server.body_limit import BodyLimit, BodyRules


def read_through(limit: BodyLimit, receive) -> None:
    asyncio.run(asyncio.wait_for(limit({"type": "http", "headers": []}, receive, None), 5))


async def read_to_end(scope, receive, send) -> None:
    while (await receive()).get("more_body"):
        pass


def test_a_body_of_just_the_limit_passes():
    parts = [b"x" * 6, b"x" * 4]

    async def receive():
        return {"type": "http.request", "body": parts.pop(), "more_body": bool(parts)}

    read_through(BodyLimit(read_to_end, rules=BodyRules(max_bytes=10)), receive)
    assert not parts


def test_a_body_too_large_is_read_to_its_end_before_it_is_refused():
    parts = [b"x" * 6] * 4

    async def receive():
        return {"type": "http.request", "body": parts.pop(), "more_body": bool(parts)}

    with pytest.raises(HTTPException, match="413: the body is larger than 10 bytes"):
        read_through(BodyLimit(read_to_end, rules=BodyRules(max_bytes=10)), receive)
    assert not parts


def test_a_body_without_end_is_refused_all_the_same():
    async def receive():
        return {"type": "http.request", "body": b"x" * (1 << 20), "more_body": True}

    with pytest.raises(HTTPException, match="413"):
        read_through(BodyLimit(read_to_end), receive)


def test_a_body_that_stops_coming_is_408():
    async def receive():
        await asyncio.Event().wait()

    with pytest.raises(HTTPException, match=r"408: .* did not come within 0.01 s"):
        read_through(BodyLimit(read_to_end, rules=BodyRules(timeout=0.01)), receive)


def test_waiting_for_the_disconnect_is_not_limited():
    async def application(scope, receive, send):
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    messages = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]

    async def receive():
        if len(messages) == 1:
            await asyncio.sleep(0.05)
        return messages.pop(0)

    read_through(BodyLimit(application, rules=BodyRules(timeout=0.01)), receive)
    assert not messages
