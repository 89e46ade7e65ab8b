"""The head's record of requests: the queue limit, and after how long a client that is turned away may come back."""

from __future__ import annotations

import pytest

from ditrelay.errors import QueueFull
from ditrelay.runtime.messages import Decoded
from ditrelay.runtime.metrics import Span
from ditrelay.runtime.preview_messages import Previewed
from ditrelay.runtime.request import Request, RequestState, SamplingParams
from ditrelay.runtime.request_log import KeptSpans, RequestLog
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.tickets import Ticket
from ditrelay.runtime.topology import Topology


def new_log() -> RequestLog:
    return RequestLog(Topology.build(ServerArgs()))


def submit(log: RequestLog, name: str, limit: int = 1000) -> Ticket:
    request = Request(request_id=name, params=SamplingParams(prompt="a cat", seed=1))
    ticket = Ticket(request, lambda request_id: None)
    log.open(request, ticket, limit=limit)
    return ticket


def finish(log: RequestLog, name: str, at: float) -> None:
    submit(log, name)
    log.observe(Decoded(0, name, b"x", "image/png", 8, 8, 1, at - 0.01, at))
    log.finish(name, "done", None, None)


@pytest.mark.parametrize(("rate", "seconds"), [(1.0, 4), (4.0, 1), (0.5, 8), (0.01, 60)])
def test_the_time_to_come_back_is_that_of_a_tenth_of_the_queue_at_the_measured_rate(rate: float, seconds: int) -> None:
    log = new_log()
    for number in range(30):
        finish(log, f"done {number}", at=number / rate)
    for number in range(40):
        submit(log, f"waiting {number}")
    assert log.counts()["retry_after"] == seconds
    with pytest.raises(QueueFull) as error:
        submit(log, "one too many", limit=40)
    assert error.value.retry_after == seconds


def test_without_a_measured_rate_it_is_a_second() -> None:
    log = new_log()
    submit(log, "first", limit=1)
    with pytest.raises(QueueFull) as error:
        submit(log, "second", limit=1)
    assert error.value.retry_after == 1


def test_a_request_that_runs_takes_no_place_in_the_queue_and_one_set_back_takes_it_again() -> None:
    log = new_log()
    submit(log, "first", limit=1)
    log.state_changed("first", RequestState.ENCODING)
    submit(log, "second", limit=1)
    log.state_changed("first", RequestState.QUEUED)
    assert (log.counts()["queued"], log.counts()["running"]) == (2, 0)


def test_a_preview_is_progress_while_its_request_denoises_and_nothing_before_or_after() -> None:
    log = new_log()
    ticket = submit(log, "a")
    shown = []
    ticket.subscribe(lambda progress: shown.append(progress.preview))
    for state in (RequestState.AT_DIT, RequestState.DENOISING, RequestState.DENOISED):
        log.state_changed("a", state)
        log.observe(Previewed(1, "a", 2, 8, str(state).encode(), 1.0))
        log.observe(Previewed(1, "a", 3, 8, None, 1.0))
        log.observe(Previewed(1, "another", 3, 8, b"", 1.0))
    assert [preview for preview in shown if preview is not None] == [b"denoising"]


def test_the_spans_of_the_newest_requests_are_kept_and_of_no_others() -> None:
    kept = KeptSpans(limit=2)
    for number, name in enumerate(["a", "b", "a", "c", "b"]):
        kept.add(Span(name, 0, "encode", float(number), float(number)))
    assert [(span.request_id, span.began) for span in kept.all()] == [("b", 1.0), ("c", 3.0), ("b", 4.0)]
