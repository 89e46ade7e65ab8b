"""Soak: thousands of requests over HTTP, and the resident memory of every process on the way.

    python benchmarks/soak.py [--requests 5000] [--steps 2] [--model builtin:emoji] [--json FILE] [--docs]

Exit code 1 where a request fails, or a process holds over 3% more at the end than after the first fifth (the warm-up).
Needs psutil. ``--docs`` writes the section "soak" of docs/reliability.md.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from typing import Any

import httpx
from chaos_load import ADDRESS, error_of
from chaos_server import Server
from chaos_watch import Watch
from common import ROOT, markdown, origin, parser, provenance, show, write_json, write_section
from rich.console import Console

PAGE = ROOT / "docs" / "reliability.md"
SAMPLES = 50
WARM_UP_SHARE = 0.2
ALLOWED_GROWTH = 0.03
MIB = 1 << 20
HEADER = ("process", "after the warm-up MiB", "at the end MiB", "most MiB", "growth")


class Soak:
    """One server and its load. ``memory``: samples of resident bytes by process, from the warm-up's end on."""

    def __init__(self, server: Server, *, requests: int, steps: int, clients: int) -> None:
        self._server, self._requests, self._steps, self._clients = server, requests, steps, clients
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits)
        self._watch = Watch(self._http)
        self._sent = 0
        self.done = 0
        self.failed: list[str] = []
        self.memory: list[dict[str, int]] = []

    async def run(self, console: Console) -> dict[str, Any]:
        began = time.monotonic()
        async with self._http:
            await self._watch.look()
            await asyncio.gather(self._sample(console), *(self._client() for _ in range(self._clients)))
            await asyncio.sleep(1.5)  # a heartbeat comes every second
            await self._watch.look()
        self.memory.append(self._server.memory(self._watch.names()))
        return {
            "requests": self.done,
            "failed": self.failed,
            "seconds": time.monotonic() - began,
            "held": self._watch.held(),
            "memory": self.memory,
        }

    async def _client(self) -> None:
        while self._sent < self._requests:
            seed, self._sent = self._sent, self._sent + 1
            body = {"prompt": f"a cat {seed}", "seed": seed, "num_inference_steps": self._steps}
            response = await self._http.post(ADDRESS, json={**body, "response_format": "b64_json"})
            if response.status_code != 200:
                self.failed.append(f"{response.status_code} {error_of(response)['message']}")
            self.done += 1

    async def _sample(self, console: Console) -> None:
        """A sample of memory every so many requests."""
        step = max(1, self._requests // SAMPLES)
        following = self._requests * WARM_UP_SHARE
        while self.done < self._requests:
            if self.done >= following:
                following += step
                self.memory.append(self._server.memory(self._watch.names()))
                if len(self.memory) % 5 == 1:
                    console.print(f"{self.done} requests, {sum(self.memory[-1].values()) / MIB:.0f} MiB in all")
            await asyncio.sleep(0.05)


def figures(memory: list[dict[str, int]]) -> dict[str, dict[str, float]]:
    """Per process: the median of the first and of the last samples (one alone depends on the moment), and the most."""
    few = max(1, len(memory) // 10)
    made = {}
    for name in memory[0]:
        held = [sample[name] for sample in memory if name in sample]
        first, last = statistics.median(held[:few]), statistics.median(held[-few:])
        made[name] = {"first": first, "last": last, "most": max(held), "growth": last / first - 1}
    return made


def rows(result: dict[str, Any]) -> list[list[str]]:
    return [
        [name, *(f"{each[key] / MIB:.1f}" for key in ("first", "last", "most")), f"{each['growth']:+.1%}"]
        for name, each in sorted(result["figures"].items())
    ]


def verdict(result: dict[str, Any]) -> list[str]:
    wrong = [f"failed: {reason}" for reason in result["failed"]]
    wrong += [f"left behind when idle: {count} {what}" for what, count in result["held"].items() if count]
    wrong += [
        f"{name} grew by {each['growth']:.1%}"
        for name, each in result["figures"].items()
        if each["growth"] > ALLOWED_GROWTH
    ]
    return wrong + [f"at its end: {what}" for what in result["end"]]


def section(result: dict[str, Any]) -> str:
    return (
        f"{origin(provenance())}: "
        f"{result['requests']} requests in {result['seconds'] / 60:.1f} minutes, {len(result['failed'])} failed. "
        f"Medians of the first and the last samples.\n\n{markdown(HEADER, rows(result))}"
    )


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=5000)
    arguments.add_argument("--steps", type=int, default=2)
    arguments.add_argument("--model", default="builtin:emoji")
    arguments.add_argument("--clients", type=int, default=8)
    arguments.add_argument("--docs", action="store_true", help="write the section of docs/reliability.md")
    given = arguments.parse_args()
    flags = ["--model-path", given.model, "--device", "cpu", "--enable-disagg", "--num-gpus", "4"]
    with Server([*flags, "--num-non-dit-ranks", "1"]) as server:
        soak = Soak(server, requests=given.requests, steps=given.steps, clients=given.clients)
        result = asyncio.run(soak.run(Console(stderr=True)))
        result["end"] = server.stop()
    result["figures"] = figures(result["memory"])
    show("Resident memory", HEADER, rows(result))
    write_json(given.json, result)
    if given.docs:
        write_section(PAGE, "soak", section(result))
    wrong = verdict(result)
    for line in wrong:
        print(f"must not be: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
