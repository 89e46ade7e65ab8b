"""What the ranks do, told as it happens: every piece of work has a beginning and one end, however it ends."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from sample_run import topology

from ditrelay.async_engine import AsyncEngine
from ditrelay.runtime.activity import Activity, Newest
from ditrelay.runtime.messages import Dropped, Encoded, Sent, StageFailed, Started, StepDone, WorkerEvent
from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.request import Request, RequestState, SamplingParams
from ditrelay.runtime.request_log import RequestLog
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.tickets import Ticket

HEADER = PayloadHeader(batch_id="b", request_ids=("a",), fields=(), tensors=(), nbytes=0)
STARTED = Started(1, "a", "denoise", 1.0)


def watched(*events: WorkerEvent) -> tuple[RequestLog, list[Activity]]:
    """A log with one request ``a`` to which ``events`` happen, and what a watcher is told."""
    log = RequestLog(topology())
    request = Request(request_id="a", params=SamplingParams(prompt="a cat", seed=1))
    log.open(request, Ticket(request, lambda _: None), limit=1)
    told: list[Activity] = []
    log.activity.watch(told.append)
    for event in events:
        log.observe(event)
    return log, told


def test_a_stage_is_told_when_it_begins_after_each_step_and_when_it_ends() -> None:
    _, told = watched(
        Started(3, "a", "encode", 0.5),
        Encoded(3, "a", HEADER, 0.5, 0.9),
        STARTED,
        StepDone(1, "a", 1, 2, 1.5),
        StepDone(1, "a", 2, 2, 2.0),
        StageFailed(1, "a", "denoise", "broken", 2.5),
    )
    assert [(each.kind, each.began, each.ended, each.step, each.total_steps) for each in told] == [
        ("encode", 0.5, None, 0, 0),
        ("encode", 0.5, 0.9, 0, 0),
        ("denoise", 1.0, None, 0, 0),
        ("denoise", 1.0, None, 1, 2),
        ("denoise", 1.0, None, 2, 2),
        ("denoise", 1.0, 2.5, 2, 2),
    ]


def test_a_transfer_is_told_with_its_two_ends_when_it_is_done() -> None:
    _, told = watched(Sent(3, "a", 1, 0, 0, began=1.0, at=1.25))
    assert [(each.rank, each.kind, each.began, each.ended) for each in told] == [(3, "send", 1.0, 1.25)]


@pytest.mark.parametrize("how", ["dropped", "set back", "cancelled", "closed"])
def test_work_that_is_cut_short_ends_once(how: str) -> None:
    log, told = watched(STARTED)
    log.state_changed("a", RequestState.DENOISING)
    assert len(told) == 1
    match how:
        case "dropped":
            log.observe(Dropped(1, "a"))
        case "set back":
            log.state_changed("a", RequestState.ENCODED)
        case "cancelled":
            log.finish("a", "cancelled", None, None)
    if how != "closed":
        log.observe(Dropped(1, "a"))
    log.close("the end")
    assert [each.ended is None for each in told] == [True, False]
    assert told[1].key == told[0].key


def test_what_begins_for_a_request_that_has_ended_is_not_told_as_nothing_would_end_it() -> None:
    _, told = watched(Started(1, "unknown", "denoise", 1.0))
    assert told == []


def test_a_late_watcher_is_told_what_is_under_way_and_a_former_one_nothing() -> None:
    log, _ = watched(Started(3, "a", "encode", 0.5), Encoded(3, "a", HEADER, 0.5, 0.9), STARTED)
    late: list[Activity] = []
    stop = log.activity.watch(late.append)
    assert [(each.kind, each.ended) for each in late] == [("encode", 0.9), ("denoise", None)]
    stop()
    log.observe(StepDone(1, "a", 1, 2, 1.5))
    assert len(late) == 2


def test_a_slow_reader_gets_the_newest_of_each_piece_of_work_and_no_more_than_the_limit() -> None:
    news = Newest(limit=2)
    for step in range(5):
        news.put(Activity(1, "denoise", "a", 1.0, step=step))
    news.put(Activity(2, "denoise", "b", 1.0))
    assert [(each.request_id, each.step) for each in news.take()] == [("a", 4), ("b", 0)]
    for name in "cde":
        news.put(Activity(1, "denoise", name, 1.0))
    assert [each.request_id for each in news.take()] == ["d", "e"]
    assert news.take() == []
    assert [news.put(Activity(1, "denoise", "a", 1.0, step=step)) for step in (1, 2)] == [True, False]


def test_an_engine_tells_the_work_of_all_its_ranks() -> None:
    args = ServerArgs(
        model_path="builtin:timed?encode=0.01&denoise=0.05&steps=4&decode=0.01",
        device="cpu",
        enable_disagg=True,
        num_gpus=2,
        warmup=False,
    )

    async def main() -> list[Activity]:
        async with asyncio.timeout(100), AsyncEngine(args) as engine, aclosing(engine.activity()) as activity:
            ticket = await engine.submit(SamplingParams(prompt="a cat"))
            told = []
            async for each in activity:
                assert each.request_id == ticket.request_id
                told.append(each)
                if each.kind == "decode" and each.ended is not None:
                    break
            await ticket.result(10)
            return told

    told = asyncio.run(main())
    assert {(each.rank, each.kind) for each in told} == {
        (1, "encode"), (1, "send"), (0, "receive"), (0, "denoise"), (0, "send"), (1, "receive"), (1, "decode"),
    }  # fmt: skip
    steps = [(each.step, each.total_steps) for each in told if each.kind == "denoise"]
    assert steps[0] == (0, 0) and steps[-1] == (4, 4) and steps == sorted(steps)
    began = [each.began for each in told if each.kind in ("encode", "denoise", "decode") and each.ended is not None]
    assert began == sorted(began)
