"""Chaos: a real server under steady load over HTTP, while its workers are killed and stopped and its port gets rubbish.

    python benchmarks/chaos.py --minutes 20 --seed 1 [--every 6] [--json FILE] [--docs]

Four ranks on the CPU (three DiT, one non-DiT) with the built-in model. Every picture is compared, byte for byte, with
the one that a single process made before the faults began. Exit code 1 where a request was lost or hung, a picture was
wrong, rubbish was answered by anything but its 4xx, or the server did not heal or left something behind.
Needs psutil. Everything stays on the loopback interface, and no process outlives the run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from chaos_faults import Faults
from chaos_load import Clients, Drawing
from chaos_report import account_figures, recovery_figures, section, show_result, verdict
from chaos_server import Server, ServerFailed
from chaos_watch import Watch
from common import ROOT, parser, provenance, write_json, write_section
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ditrelay import Engine, ServerArgs

PAGE = ROOT / "docs" / "reliability.md"
PROMPTS = ("a red apple", "a blue bird in the snow", "two dogs", "a small green car on a yellow background")
STEPS = (4, 8)
WARM_UP_SHARE = 0.1  # of the run, at most 20 s, before the faults: the memory at its end is the memory at the start
HEAL_SECONDS = 120.0
LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True, kw_only=True)
class Options:
    """One run. ``minutes`` are those with faults; ``only``: kinds of faults, all by default."""

    minutes: float
    seed: int = 0
    every: float = 6.0
    clients: int = 6
    dist_timeout: float = 5.0
    request_timeout: float = 60.0
    only: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        return [
            *("--model-path", "builtin:emoji", "--device", "cpu", "--enable-disagg", "--num-gpus", "4"),
            *("--num-non-dit-ranks", "1", "--dist-timeout", f"{self.dist_timeout:g}"),
            *("--request-timeout", f"{self.request_timeout:g}"),
        ]

    @property
    def hang_seconds(self) -> float:
        """A request has ended by its own timeout before."""
        return self.request_timeout + 15.0


def draw_oracle() -> list[Drawing]:
    """The pictures as one process makes them, with no transfers and no faults."""
    orders = [(prompt, 100 + number, steps) for steps in STEPS for number, prompt in enumerate(PROMPTS)]
    with Engine(ServerArgs(device="cpu", warmup=False, log_level="warning")) as engine:
        made = [
            engine.generate(prompt, seed=seed, num_inference_steps=steps, timeout=120) for prompt, seed, steps in orders
        ]
    return [Drawing(*order, result.media) for order, result in zip(orders, made, strict=True)]


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """The whole run; its figures.

    Raises:
        ServerFailed: the server did not start.
    """
    console = console or Console(stderr=True)
    console.print("drawing the oracle's pictures ...")
    drawings = draw_oracle()
    console.print("starting the server ...")
    with Server(options.flags) as server:
        result = asyncio.run(Run(options, server, drawings, console).result())
        result["end"] = server.stop()
        result["log_errors"] = [line for line in server.log_tail(100_000).splitlines() if "Traceback" in line]
    return result


class Run:
    """One server, its load, its watch and its faults."""

    def __init__(self, options: Options, server: Server, drawings: Sequence[Drawing], console: Console) -> None:
        self._options, self._server, self._console = options, server, console
        # A connection each: one that idles is closed by the server just when it is used again, which looks like a loss.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits)
        self._clients = Clients(
            self._http,
            drawings,
            count=options.clients,
            hang_seconds=options.hang_seconds,
            seed=options.seed,
        )
        self._watch = Watch(self._http)
        self._faults = Faults(
            self._clients,
            self._watch,
            self._http,
            every=options.every,
            dist_timeout=options.dist_timeout,
            seed=options.seed,
            only=options.only,
        )

    async def result(self) -> dict[str, Any]:
        async with self._http:
            await self._watch.look()
            watching = asyncio.create_task(self._watch.run())
            showing = asyncio.create_task(self._show())
            try:
                return await self._run()
            finally:
                for task in (watching, showing):
                    task.cancel()
                await asyncio.gather(watching, showing, return_exceptions=True)

    async def _run(self) -> dict[str, Any]:
        options, seconds = self._options, self._options.minutes * 60
        began = time.monotonic()
        self._clients.start()
        await asyncio.sleep(min(20.0, seconds * WARM_UP_SHARE))
        memory_before = self._memory()
        await self._faults.run(time.monotonic() + seconds)
        await self._clients.stop()
        whole = await self._heal()
        self._watch.note_completions(self._clients.account.completions)
        return {
            "flags": options.flags,
            "seed": options.seed,
            "clients": options.clients,
            "every": options.every,
            "hang_seconds": options.hang_seconds,
            "seconds": time.monotonic() - began,
            "faults": dict(self._faults.done),
            "replaced_needlessly": self._faults.replaced_needlessly,
            "load": account_figures(self._clients.account),
            "recovery": recovery_figures(self._watch.recoveries),
            "recoveries": [vars(each) for each in self._watch.recoveries],
            "watch": {"unanswered": self._watch.unanswered, "slowest": self._watch.slowest},
            "whole": whole,
            "held": self._watch.held(),
            "memory": {"start": memory_before, "end": self._memory()},
        }

    async def _heal(self) -> bool:
        """Wait for full strength, and until nothing is held any more (a heartbeat later at the latest)."""
        until = time.monotonic() + HEAL_SECONDS
        while time.monotonic() < until:
            await asyncio.sleep(0.2)
            if self._watch.whole() and not any(self._watch.held().values()):
                return True
        return self._watch.whole()

    def _memory(self) -> dict[str, int]:
        return self._server.memory(self._watch.names())

    # ------------------------------------------------------------ progress

    async def _show(self) -> None:
        with _bar(self._console, self._options.minutes * 60) as (bar, task):
            last, began = 0.0, time.monotonic()
            while True:
                self._server.look()  # every process that ever was must be gone at the end
                bar.update(task, completed=time.monotonic() - began, state=self._state())
                if not self._console.is_terminal and time.monotonic() - last > LINE_SECONDS:
                    last = time.monotonic()
                    self._console.print(f"{last - began:5.0f} s: {self._state()}")
                await asyncio.sleep(0.5)

    def _state(self) -> str:
        account = self._clients.account
        states = "".join("." if rank["state"] == "up" else rank["state"][0] for rank in self._watch.topology["ranks"])
        faults = sum(self._faults.done.values())
        bad = account.lost + account.hung + len(account.wrong) + len(account.answered_badly)
        failed = sum(account.failed.values())
        return f"ranks {states}  {faults} faults  {account.completed} drawn  {failed} failed  {bad} that must not be"


@contextlib.contextmanager
def _bar(console: Console, seconds: float) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TimeElapsedColumn(), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield bar, bar.add_task("", total=seconds, state="")


def main() -> int:
    arguments: argparse.ArgumentParser = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=1.0, help="how long faults are made (default 1)")
    arguments.add_argument("--seed", type=int, default=0, help="of the faults and the load")
    arguments.add_argument("--every", type=float, default=6.0, metavar="SECONDS", help="mean time between two faults")
    arguments.add_argument("--clients", type=int, default=6, help="requests at a time")
    arguments.add_argument("--dist-timeout", type=float, default=5.0, metavar="SECONDS", help="the server's")
    arguments.add_argument("--only", action="append", default=[], metavar="KIND", help="only this kind; repeatable")
    arguments.add_argument("--docs", action="store_true", help="write the section of docs/reliability.md")
    given = arguments.parse_args()
    options = Options(
        minutes=given.minutes,
        seed=given.seed,
        every=given.every,
        clients=given.clients,
        dist_timeout=given.dist_timeout,
        only=tuple(given.only),
    )
    try:
        result = run(options)
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 2
    show_result(result)
    write_json(given.json, result)
    if given.docs:
        write_section(PAGE, "chaos", section(result, provenance()))
    wrong = verdict(result)
    for line in wrong:
        print(f"must not be: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
