"""A client of server-sent events that sees each when it is sent, may be slow, and may leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI


@dataclass(frozen=True)
class Event:
    name: str
    data: dict[str, Any]
    id: str | None


class Follower:
    """``GET path`` of an application in this process.

    Attributes:
        status: of the answer, once it has begun.
        reading: cleared, the client takes nothing more until it is set.
        comments: lines that are no events.
    """

    def __init__(self, app: FastAPI, path: str, *, query: str = "", **headers: str) -> None:
        self.status: int | None = None
        self.reading = asyncio.Event()
        self.reading.set()
        self.events: list[Event] = []
        self.comments: list[str] = []
        self._text = ""
        self._left = asyncio.Event()
        self._asked = False
        raw = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "query_string": query.encode(),
            "headers": raw,
            "scheme": "http",
            "server": ("pictures.test", 8000),
        }
        self.call = asyncio.create_task(app(scope, self._receive, self._send))

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events]

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.002)

    async def to_end(self) -> list[Event]:
        """The events, once the answer is complete."""
        await asyncio.wait_for(self.call, 10.0)
        return self.events

    async def leave(self) -> None:
        self._left.set()
        self.reading.set()
        await asyncio.wait_for(self.call, 10.0)

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reading.wait()
        self.status = message.get("status", self.status)
        self._text += message.get("body", b"").decode()
        *blocks, self._text = self._text.split("\n\n")
        for block in blocks:
            self._take(block.split("\n"))

    def _take(self, lines: list[str]) -> None:
        fields = dict(line.split(": ", 1) for line in lines)
        if "" in fields:
            self.comments.append(fields[""])
        elif "data" in fields:
            self.events.append(Event(fields["event"], json.loads(fields["data"]), fields.get("id")))
