"""Watches ``/v1/topology`` during the chaos, and measures how soon each fault is noticed and healed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

POLL_SECONDS = 0.05


@dataclass
class Recovery:
    """What came of one fault that took a rank away. Times in seconds after the fault.

    Attributes:
        pid: of the process that was hit.
        noticed: the head said that the rank is not up, or had replaced it.
        serving: the first picture came after that.
        full: the rank was up again, and so were its edges to other ranks that were up.
    """

    kind: str
    rank: int
    pid: int
    began: float
    noticed: float | None = None
    serving: float | None = None
    full: float | None = None


@dataclass
class Watch:
    """The newest topology, and the recoveries that are not complete.

    Attributes:
        unanswered: times that the server did not answer the watch within its limit.
        slowest: seconds of the slowest answer.
    """

    http: httpx.AsyncClient
    topology: dict[str, Any] = field(default_factory=dict)
    recoveries: list[Recovery] = field(default_factory=list)
    unanswered: int = 0
    slowest: float = 0.0

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(POLL_SECONDS)

    async def look(self) -> None:
        began = time.monotonic()
        try:
            self.topology = (await self.http.get("/v1/topology", timeout=10)).json()
        except httpx.TransportError:
            self.unanswered += 1
            return
        now = time.monotonic()
        self.slowest = max(self.slowest, now - began)
        for recovery in self.recoveries:
            if recovery.full is None:
                self._follow(recovery, now)

    def _follow(self, recovery: Recovery, now: float) -> None:
        rank = self.topology["ranks"][recovery.rank]
        if recovery.noticed is None and (rank["state"] != "up" or rank["pid"] != recovery.pid):
            recovery.noticed = now - recovery.began
        if rank["state"] == "up" and rank["pid"] != recovery.pid and self._joined(recovery.rank):
            recovery.full = now - recovery.began

    def _joined(self, rank: int) -> bool:
        """Every edge of the rank whose other end is up is open."""
        up = {each["rank"] for each in self.topology["ranks"] if each["state"] == "up"}
        own = [edge for edge in self.topology["edges"] if rank in (edge["source"], edge["target"])]
        return all(edge["up"] for edge in own if {edge["source"], edge["target"]} <= up)

    def note_completions(self, completions: Sequence[float]) -> None:
        """Fill in ``serving``: the first picture after a fault was noticed."""
        for recovery in self.recoveries:
            if recovery.noticed is not None:
                noticed = recovery.began + recovery.noticed
                first = next((at for at in completions if at >= noticed), None)
                recovery.serving = None if first is None else first - recovery.began

    def unhit(self) -> list[dict[str, Any]]:
        """Ranks that are up and that no fault was at in this generation."""
        hit = {recovery.pid for recovery in self.recoveries if recovery.full is None}
        return [rank for rank in self.topology["ranks"] if rank["state"] == "up" and rank["pid"] not in hit]

    def names(self) -> dict[int, str]:
        return {rank["pid"]: f"rank {rank['rank']} ({rank['role']})" for rank in self.topology["ranks"] if rank["pid"]}

    def whole(self) -> bool:
        """Every rank and edge is up."""
        ranks, edges = self.topology["ranks"], self.topology["edges"]
        return all(rank["state"] == "up" for rank in ranks) and all(edge["up"] for edge in edges)

    def held(self) -> dict[str, int]:
        """What requests hold: all zero where nothing runs."""
        ranks, requests = self.topology["ranks"], self.topology["requests"]
        return {
            "requests": requests["queued"] + requests["running"],
            "credits": sum(edge["used"] for edge in self.topology["edges"]),
            "transfers": sum(rank["pending_sends"] + rank["pending_recvs"] for rank in ranks),
            "kept bytes": sum(rank["kept_bytes"] for rank in ranks),
        }
