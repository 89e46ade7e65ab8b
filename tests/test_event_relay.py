"""A request's events reach the loop: the first and the last at once, all of them, in order, with few wakes."""

from __future__ import annotations

import asyncio
import threading
import time

from ditrelay.runtime.event_relay import PAUSE_SECONDS, EventRelay
from ditrelay.runtime.request import RequestState
from ditrelay.runtime.tickets import Progress

STEPS = 200


def test_every_event_arrives_in_order_though_the_loop_is_woken_seldom() -> None:
    async def read() -> tuple[list[Progress], int]:
        loop = asyncio.get_running_loop()
        wakes = _count_wakes(loop)
        relay = EventRelay(loop)
        threading.Thread(target=_report, args=(relay,)).start()
        read: list[Progress] = []
        while not read or not read[-1].state.ended:
            read.append(await asyncio.wait_for(relay.news.get(), 10))
        return read, wakes[0]

    read, wakes = asyncio.run(read())
    assert [progress.step for progress in read] == [*range(STEPS), 0]
    assert wakes <= STEPS // 4


def test_the_first_event_and_the_end_do_not_wait() -> None:
    async def delays() -> list[float]:
        relay = EventRelay(asyncio.get_running_loop())
        found = []
        for state in (RequestState.QUEUED, RequestState.DONE):
            began = time.monotonic()
            threading.Thread(target=relay.put, args=(Progress("r", state),)).start()
            await asyncio.wait_for(relay.news.get(), 10)
            found.append(time.monotonic() - began)
        return found

    tries = [asyncio.run(delays()) for _ in range(5)]
    assert min(max(delays) for delays in tries) < PAUSE_SECONDS / 2


def test_a_loop_that_was_closed_before_the_end_costs_the_engine_nothing() -> None:
    loop = asyncio.new_event_loop()
    relay = EventRelay(loop)
    loop.close()
    relay.put(Progress("r", RequestState.QUEUED))
    relay.put(Progress("r", RequestState.DONE))


def _report(relay: EventRelay) -> None:
    for step in range(STEPS):
        relay.put(Progress("r", RequestState.DENOISING, step, STEPS))
        time.sleep(0.001)
    relay.put(Progress("r", RequestState.DONE))


def _count_wakes(loop: asyncio.AbstractEventLoop) -> list[int]:
    wakes = [0]
    woken = loop.call_soon_threadsafe

    def counting(*values: object) -> asyncio.Handle:
        wakes[0] += 1
        return woken(*values)  # type: ignore[arg-type]

    loop.call_soon_threadsafe = counting  # type: ignore[assignment,method-assign]
    return wakes
