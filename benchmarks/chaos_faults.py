"""The faults: what is done to the server's processes and sent to its port, one after the other by a seeded choice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import httpx
from chaos_load import ADDRESS, Clients, error_of
from chaos_watch import Recovery, Watch

STORM = 12  # requests of a cancel storm
ANSWER_SECONDS = 20.0  # rubbish must be answered within

# What must not be drawn, and the statuses that say so.
OVERSIZED: tuple[tuple[bytes, int], ...] = (
    (b'{"prompt": "%s"}' % (b"x" * (3 << 20)), 413),
    (b'{"prompt": "%s"}' % (b"x" * (1 << 19)), 400),
    (b'{"prompt": "a cat", "size": "999999x999999"}', 400),
    (b'{"prompt": "a cat", "num_inference_steps": 1000000000}', 400),
    (b'{"prompt": "a cat", "n": 1000}', 400),
)
MALFORMED: tuple[tuple[bytes, int], ...] = (
    (b"{not json", 400),
    (b"", 400),
    (b'{"prompt": "\xff\xfe"}', 400),
    (b"[" * 50_000, 400),
    (b'{"prompt": 7}', 400),
    (b'{"prompt": "a cat", "seed": -2}', 400),
    (b'{"prompt": "\\ud800"}', 400),
    (json.dumps({"prompt": "a cat", "height": 13}).encode(), 400),
)
NOT_HTTP: tuple[bytes, ...] = (
    b"\x00" * 512,
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n{",
    b"\x16\x03\x01\x02\x00" + b"\x01" * 200,
    b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
)


class Faults:
    """Does one fault after the other. One seed gives one order of kinds; the ranks that are hit depend on who is up.

    Args:
        every: mean seconds between two faults.
        dist_timeout: the server's.
        only: these kinds; all by default.
    """

    def __init__(
        self,
        clients: Clients,
        watch: Watch,
        http: httpx.AsyncClient,
        *,
        every: float,
        dist_timeout: float,
        seed: int,
        only: tuple[str, ...] = (),
    ) -> None:
        self.done: Counter[str] = Counter()
        self.replaced_needlessly = 0
        self._clients = clients
        self._watch = watch
        self._http = http
        self._every = every
        self._dist_timeout = dist_timeout
        self._choose = random.Random(f"faults {seed}")
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "kill": (5, self._kill),
            "long stop": (3, self._long_stop),
            "short stop": (3, self._short_stop),
            "cancel storm": (2, self._cancel_storm),
            "oversized": (2, self._oversized),
            "malformed": (2, self._malformed),
            "disconnect": (3, self._disconnect),
        }
        self._kinds = {kind: how for kind, how in self._kinds.items() if not only or kind in only}
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self, until: float) -> None:
        """Faults until then (monotonic seconds); a stop that lasts does not hold up the next fault."""
        names = list(self._kinds)
        weights = [self._kinds[name][0] for name in names]
        while (now := time.monotonic()) < until:
            pause = self._choose.uniform(0.5, 1.5) * self._every
            kind = self._choose.choices(names, weights)[0]
            await asyncio.sleep(min(pause, until - now))
            if time.monotonic() < until:
                task = asyncio.create_task(self._kinds[kind][1](), name=kind)
                self._under_way.add(task)
        await asyncio.gather(*self._under_way)

    # ------------------------------------------------------------ processes

    def _hit(self, kind: str, number: int) -> Recovery | None:
        """Send a signal to a rank that is up; ``None`` where there is none."""
        ranks = self._watch.unhit()
        if not ranks:
            return None
        rank = self._choose.choice(ranks)
        try:
            os.kill(rank["pid"], number)
        except ProcessLookupError:
            return None
        self.done[f"{kind}, {rank['role']}"] += 1
        return Recovery(f"{kind}, {rank['role']}", rank["rank"], rank["pid"], time.monotonic())

    async def _kill(self) -> None:
        if (hit := self._hit("kill", signal.SIGKILL)) is not None:
            self._watch.recoveries.append(hit)

    async def _long_stop(self) -> None:
        """Longer than the timeout: the head kills and replaces it, and the SIGCONT finds nobody."""
        if (hit := self._hit("long stop", signal.SIGSTOP)) is not None:
            self._watch.recoveries.append(hit)
            await asyncio.sleep(self._dist_timeout + self._choose.uniform(2.0, 4.0))
            with contextlib.suppress(ProcessLookupError):
                os.kill(hit.pid, signal.SIGCONT)

    async def _short_stop(self) -> None:
        """Shorter than the timeout: it goes on as if nothing had been."""
        if (hit := self._hit("short stop", signal.SIGSTOP)) is None:
            return
        await asyncio.sleep(self._choose.uniform(0.1, 0.5) * self._dist_timeout)
        with contextlib.suppress(ProcessLookupError):
            os.kill(hit.pid, signal.SIGCONT)
        await asyncio.sleep(0.5)
        if self._watch.topology["ranks"][hit.rank]["pid"] != hit.pid and not self._was_hit(hit.pid):
            self.replaced_needlessly += 1

    def _was_hit(self, pid: int) -> bool:
        return any(recovery.pid == pid for recovery in self._watch.recoveries)

    # ------------------------------------------------------------ clients

    async def _cancel_storm(self) -> None:
        self.done["cancel storm"] += 1
        await asyncio.gather(*(self._clients.leave(self._choose.uniform(0.05, 1.5)) for _ in range(STORM)))

    async def _disconnect(self) -> None:
        self.done["disconnect"] += 1
        await self._clients.leave(self._choose.uniform(0.05, 1.0))

    async def _oversized(self) -> None:
        self.done["oversized"] += 1
        await self._post(*self._choose.choice(OVERSIZED))

    async def _malformed(self) -> None:
        self.done["malformed"] += 1
        if self._choose.random() < 0.4:
            await self._send_raw(self._choose.choice(NOT_HTTP))
        else:
            await self._post(*self._choose.choice(MALFORMED))

    async def _post(self, body: bytes, expected: int) -> None:
        """Also while a rank is down: what is wrong with a request does not depend on the ranks."""
        account = self._clients.account
        headers = {"content-type": "application/json"}
        try:
            response = await self._http.post(ADDRESS, content=body, headers=headers, timeout=ANSWER_SECONDS)
        except httpx.TransportError as error:
            account.answered_badly.append(f"{body[:60]!r}: {type(error).__name__}")
            return
        if response.status_code != expected:
            said = error_of(response)["message"]
            account.answered_badly.append(f"{body[:60]!r}: {response.status_code} for {expected}: {said}")

    async def _send_raw(self, data: bytes) -> None:
        """What is no HTTP: whatever the answer, the server must still be there afterwards (the load shows it)."""
        reader, writer = await asyncio.open_connection(self._http.base_url.host, self._http.base_url.port)
        with contextlib.suppress(OSError, TimeoutError):
            writer.write(data)
            await writer.drain()
            await asyncio.wait_for(reader.read(1000), 1.0)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
