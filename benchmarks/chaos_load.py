"""Steady load over HTTP, and the account of every request: how it ended, and whether its picture is the right one."""

from __future__ import annotations

import asyncio
import base64
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

ADDRESS = "/v1/images/generations"


@dataclass(frozen=True)
class Drawing:
    """A request whose picture is known: ``picture`` are the bytes of the oracle's file."""

    prompt: str
    seed: int
    steps: int
    picture: bytes

    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "num_inference_steps": self.steps,
            "response_format": "b64_json",
        }


@dataclass
class Account:
    """How requests ended.

    Attributes:
        sent: requests for pictures whose clients meant to wait for the answer.
        refused: answers that say "not now" (429, 503), by their code: not accepted.
        completed: pictures; ``wrong`` of them are not the oracle's.
        failed: clear errors to accepted requests, by their reason.
        lost: connections that ended without an answer.
        hung: requests without an answer within the limit.
        left: requests whose client left before the answer, on purpose.
        answered_badly: answers to rubbish that are not the 4xx they must be.
        latencies: seconds of each completed request.
        completions: when (monotonic seconds) pictures came.
    """

    sent: int = 0
    completed: int = 0
    lost: int = 0
    hung: int = 0
    left: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    answered_badly: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    completions: list[float] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        return self.completed + sum(self.failed.values()) + self.lost + self.hung

    def take(self, drawing: Drawing, response: httpx.Response, seconds: float) -> None:
        if response.status_code == 200:
            self.completed += 1
            self.latencies.append(seconds)
            self.completions.append(time.monotonic())
            if base64.b64decode(response.json()["data"][0]["b64_json"]) != drawing.picture:
                self.wrong.append(f"{drawing.prompt!r}, seed {drawing.seed}, {drawing.steps} steps")
            return
        error = error_of(response)
        if response.status_code == 429 or (response.status_code == 503 and error["code"] == "not_ready"):
            self.refused[f"{response.status_code} {error['code']}"] += 1
        else:
            self.failed[f"{response.status_code} {shape(str(error['message']))}"] += 1


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in OpenAI's form, or what came in its place."""
    try:
        error: dict[str, Any] = response.json()["error"]
        return {"code": None, "message": "", **error}
    except (ValueError, KeyError, TypeError):
        return {"code": "not OpenAI's form", "message": response.text[:200]}


def shape(message: str) -> str:
    """A message without its ids and numbers, so that failures of one kind count together."""
    message = re.sub(r"\b[0-9a-f]{16}\b", "ID", message)
    return re.sub(r"\d+(\.\d+)?", "N", message)


class Clients:
    """``count`` clients, each with one request at a time until ``stop``.

    Args:
        hang_seconds: an answer that takes longer counts as hung.
    """

    def __init__(
        self, http: httpx.AsyncClient, drawings: Sequence[Drawing], *, count: int, hang_seconds: float, seed: int
    ) -> None:
        self.account = Account()
        self._http = http
        self._drawings = drawings
        self._hang_seconds = hang_seconds
        self._stopping = asyncio.Event()
        self._choose = random.Random(f"clients {seed}")
        self._count = count
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._client()) for _ in range(self._count)]

    async def stop(self) -> None:
        """Let every client get the answer that it waits for."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    def any(self) -> Drawing:
        return self._choose.choice(self._drawings)

    async def leave(self, seconds: float) -> None:
        """Ask for a picture and close the connection after so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._http.post(ADDRESS, json=self.any().body())
        except (TimeoutError, httpx.TransportError):
            self.account.left += 1

    async def _client(self) -> None:
        while not self._stopping.is_set():
            pause = await self._one(self.any())
            if pause:
                await asyncio.sleep(pause)

    async def _one(self, drawing: Drawing) -> float:
        """One request; returns how long to wait before the next."""
        began = time.monotonic()
        self.account.sent += 1
        try:
            async with asyncio.timeout(self._hang_seconds):
                response = await self._http.post(ADDRESS, json=drawing.body())
        except TimeoutError:
            self.account.hung += 1
            return 0.0
        except httpx.TransportError:
            self.account.lost += 1
            return 0.5
        self.account.take(drawing, response, time.monotonic() - began)
        return min(1.0, float(response.headers.get("retry-after", "0")))
