"""What a client does with its ticket is nobody else's business: the engine goes on."""

from __future__ import annotations

from contextlib import suppress

import pytest

from ditrelay.errors import EngineClosed
from ditrelay.runtime.request import Request, RequestState, SamplingParams
from ditrelay.runtime.request_log import RequestLog
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.tickets import Progress, Ticket
from ditrelay.runtime.topology import Topology

REQUEST = Request(request_id="r", params=SamplingParams(prompt="a cat", seed=1))


def ticket() -> Ticket:
    return Ticket(REQUEST, lambda request_id: None)


def test_a_future_that_a_client_tries_to_cancel_still_gets_its_end() -> None:
    made = ticket()
    assert not made.future.cancel()
    made.fail(EngineClosed("over"), RequestState.FAILED, 0.0)
    with pytest.raises(EngineClosed):
        made.result(1)


def test_a_subscriber_that_raises_is_told_nothing_more_and_the_others_everything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, wrong, right = ticket(), list[Progress](), list[Progress]()

    def fails(progress: Progress) -> None:
        wrong.append(progress)
        raise ValueError("a client's mistake")

    made.subscribe(fails)
    made.subscribe(right.append)
    for step in range(3):
        made.report(Progress("r", RequestState.DENOISING, step, 3))
    assert len(wrong) == 1 and [progress.step for progress in right] == [0, 1, 2]
    assert "a client's mistake" in caplog.text


def test_a_request_that_the_engines_end_overtakes_is_told_of_its_end_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after the end is waited for without one."""
    log, made, told = RequestLog(Topology.build(ServerArgs(device="cpu"))), ticket(), list[Progress]()
    made.subscribe(told.append)
    report = made.report

    def late(progress: Progress) -> None:
        monkeypatch.setattr(made, "report", report)
        log.close("the engine is shut down")
        report(progress)

    monkeypatch.setattr(made, "report", late)
    opened = False
    with suppress(EngineClosed):
        log.open(REQUEST, made, limit=1)
        opened = True
    assert not opened or told[-1].state.ended
