"""What HTTP costs: the time that it adds to a picture, what polling costs generation, and how soon jobs are listed.

The model is ``builtin:timed``, whose stages sleep, on a CPU. The head is the real one; clients have their own process.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from chaos_server import Server
from common import ROOT, markdown, origin, parser, provenance, show, write_json, write_section
from http_clients import Child, Connection, child, fetch

from ditrelay import ServerArgs
from ditrelay.async_engine import AsyncEngine
from ditrelay.runtime.request import SamplingParams
from ditrelay.server.app import EngineServer
from ditrelay.server.sockets import listen

IMAGES = "/v1/images/generations"
QUICK = "builtin:timed?encode=0.005&denoise=0.02&decode=0.005&steps=4&conditioning_mb=0.1&latents_mb=0.1"
CLIPS = "builtin:timed?encode=0.01&denoise=0.1&decode=0.01&steps=4&conditioning_mb=0.1&latents_mb=0.1&frames=2"
SLOW = "builtin:timed?denoise=600&frames=2"
SPREAD = ["--device", "cpu", "--enable-disagg", "--num-gpus", "3", "--no-warmup", "--stage-timeout", "2000"]
CASES = ((32, "b64_json"), (512, "b64_json"), (512, "url"))
CLIENTS = 200
LISTED = 1000
DONE = re.compile(r'^ditrelay_requests_total\{outcome="done"\} (\S+)$', re.MULTILINE)

ADDED_MS, SLOWER, LISTED_MS = 3.0, 0.02, 50.0  # aims


# ---------------------------------------------------------------- what HTTP adds to one picture


async def measure_added(rounds: int) -> list[dict[str, Any]]:
    """Direct calls of the engine, on the server's own event loop, in turns with requests over HTTP."""
    with tempfile.TemporaryDirectory() as folder:
        args = ServerArgs(model_path=QUICK, device="cpu", enable_disagg=True, num_gpus=2, output_dir=folder, port=0)
        engine, listener = AsyncEngine(args), listen("127.0.0.1", 0)
        server = EngineServer(engine)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            while not engine.ready:
                await asyncio.wait((serving,), timeout=0.05)
            with child("call", f"127.0.0.1:{listener.getsockname()[1]}") as client:
                return [await _added(engine, client, rounds, side, form) for side, form in CASES]
        finally:
            server.stop()
            await serving


async def _added(engine: AsyncEngine, client: Child, rounds: int, side: int, form: str) -> dict[str, Any]:
    direct, over_http = [], []
    for number in range(rounds + 5):
        began = time.perf_counter()
        ticket = await engine.submit(SamplingParams(prompt="a fox", seed=number, height=side, width=side))
        await ticket.result()
        direct.append(time.perf_counter() - began)
        body = {"prompt": "a fox", "seed": number, "size": f"{side}x{side}", "response_format": form}
        over_http.append(await asyncio.to_thread(client.ask, (IMAGES, body)))
    direct, over_http = direct[5:], over_http[5:]  # the first ones make the connection and warm caches
    pairs = zip(direct, over_http, strict=True)
    medians = {
        "direct_ms": statistics.median(direct) * 1e3,
        "http_ms": statistics.median(over_http) * 1e3,
        "added_ms": statistics.median(second - first for first, second in pairs) * 1e3,
    }
    return {"side": side, "response_format": form, "rounds": rounds, **medians}


# ---------------------------------------------------------------- clients that poll


def measure_polling(seconds: float, turns: int) -> dict[str, Any]:
    """Videos done a second while nobody asks, in turns with ``CLIENTS`` that each ask for their job every second."""
    with _jobs(CLIPS) as server:
        address = server.url.removeprefix("http://")
        rate = 2 / 0.1  # two DiT ranks
        ids = _submit(address, round(rate * (seconds + 4) * 3 * turns) + CLIENTS)[-CLIENTS:]
        kinds = {"nobody": [], "videos": [f"/v1/videos/{i}" for i in ids], "jobs": [f"/v1/jobs/{i}" for i in ids]}
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        polled: dict[str, dict[str, float]] = {}
        for _ in range(turns):
            for kind, paths in kinds.items():
                rate, polled[kind] = _window(server, address, paths, seconds)
                rates[kind].append(rate)
    bare = statistics.mean(rates["nobody"])
    return {
        "clients": CLIENTS,
        "window_seconds": seconds,
        "turns": turns,
        "videos_per_second": rates,
        "slower": {kind: 1 - statistics.mean(rates[kind]) / bare for kind in ("videos", "jobs")},
        "polled": {kind: polled[kind] for kind in ("videos", "jobs")},
    }


def _window(server: Server, address: str, paths: list[str], seconds: float) -> tuple[float, dict[str, float]]:
    if not paths:
        return _rate(address, seconds), {}
    with child("poll", address) as clients:
        clients.ask(paths)
        rate = _rate(address, seconds)
        return rate, clients.ask()


def _rate(address: str, seconds: float) -> float:
    """Requests done a second, over ``seconds`` between two that were seen to end."""
    time.sleep(2.0)  # what came before is over
    (first, began), (last, ended) = _at_next_end(address), (time.sleep(seconds), _at_next_end(address))[1]
    return (last - first) / (ended - began)


def _at_next_end(address: str) -> tuple[int, float]:
    """The count of requests done, and the moment at which it rose to it."""
    connection = Connection(address)
    count = before = _done(connection)
    while count == before:
        time.sleep(0.002)
        count, now = _done(connection), time.perf_counter()
    connection.close()
    return count, now


def _done(connection: Connection) -> int:
    [count] = DONE.findall(connection.fetch("/metrics").decode())
    return int(float(count))


# ---------------------------------------------------------------- lists


def measure_listing(rounds: int) -> list[dict[str, Any]]:
    """``LISTED`` queued jobs: all at once, and page after page."""
    with _jobs(SLOW) as server:
        address = server.url.removeprefix("http://")
        _submit(address, LISTED + 20)  # some of them are taken by the ranks
        connection = Connection(address)
        ways: dict[str, Callable[[], int]] = {
            f"GET /v1/jobs?limit={LISTED}": lambda: len(fetch(connection, f"/v1/jobs?limit={LISTED}")["data"]),
            "GET /v1/videos?limit=100, ten pages": lambda: _pages(connection),
        }
        return [_timed(name, rounds, way) for name, way in ways.items()]


def _timed(name: str, rounds: int, way: Callable[[], int]) -> dict[str, Any]:
    seconds = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        count = way()
        seconds.append(time.perf_counter() - began)
        assert count == LISTED, f"{name}: {count} jobs"
    seconds = seconds[2:]
    return {"way": name, "rounds": rounds, "median_ms": statistics.median(seconds) * 1e3, "max_ms": max(seconds) * 1e3}


def _pages(connection: Connection) -> int:
    count, after = 0, ""
    for _ in range(LISTED // 100):
        page = fetch(connection, f"/v1/videos?limit=100{after}")
        count, after = count + len(page["data"]), f"&after={page['last_id']}"
    return count


@contextmanager
def _jobs(model: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder, Server(["--model-path", model, *SPREAD, "--output-dir", folder]) as s:
        yield s


def _submit(address: str, count: int) -> list[str]:
    connection = Connection(address)
    ids = [fetch(connection, "/v1/videos", {"prompt": f"a fox, {i}"})["id"] for i in range(count)]
    connection.close()
    return ids


# ---------------------------------------------------------------- report


def rows(figures: dict[str, Any]) -> list[list[str]]:
    """What was measured, the figure, the aim, and whether it was reached."""
    found = []
    for case in figures.get("added", ()):
        what = f"added to a {case['side']}x{case['side']} picture as {case['response_format']}"
        detail = f"{case['direct_ms']:.2f} -> {case['http_ms']:.2f} ms"
        found.append(_row(what, detail, case["added_ms"], ADDED_MS, "{:.2f} ms"))
    if polling := figures.get("polling"):
        for kind, slower in polling["slower"].items():
            polled = polling["polled"][kind]
            what = f"slower with {polling['clients']} clients polling /v1/{kind}/ID"
            detail = f"{polled['per_second']:.0f} polls/s, median {polled['median_ms']:.1f} ms"
            found.append(_row(what, detail, slower, SLOWER, "{:.2%}"))
    for listing in figures.get("listing", ()):
        detail = f"at most {listing['max_ms']:.1f} ms"
        found.append(_row(f"`{listing['way']}` of {LISTED} jobs", detail, listing["median_ms"], LISTED_MS, "{:.1f} ms"))
    return found


def _row(what: str, detail: str, figure: float, aim: float, form: str) -> list[str]:
    return [what, detail, form.format(figure), form.format(aim), "yes" if figure < aim else "**no**"]


HEADER = ("what", "", "median or mean", "aim: below", "reached")


def main(options: argparse.Namespace) -> None:
    figures: dict[str, Any] = {}
    if "added" in options.parts:
        figures["added"] = asyncio.run(measure_added(options.rounds))
    if "polling" in options.parts:
        figures["polling"] = measure_polling(options.seconds, options.turns)
    if "listing" in options.parts:
        figures["listing"] = measure_listing(options.list_rounds)
    show("over HTTP", HEADER, rows(figures))
    write_json(options.json, figures)
    if options.docs:
        text = f"{origin(provenance())}:\n\n{markdown(HEADER, rows(figures))}"
        write_section(ROOT / "docs" / "performance.md", "http", text)


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument(
        "--parts", nargs="+", choices=("added", "polling", "listing"), default=["added", "polling", "listing"]
    )
    made.add_argument("--rounds", type=int, default=300, help="pictures of each kind")
    made.add_argument("--list-rounds", type=int, default=30)
    made.add_argument("--seconds", type=float, default=15.0, help="of one window of polling")
    made.add_argument("--turns", type=int, default=3, help="windows of each kind")
    made.add_argument("--docs", action="store_true", help="write the section of docs/performance.md")
    main(made.parse_args())
