"""Nothing that user code does ends the head's loop, and an end or a halt of the loop is told to everybody."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest
from server_fakes import FakeEngine, running
from simulated_worker import request

from ditrelay import Engine, ServerArgs
from ditrelay.cli_restart import restart_rank
from ditrelay.errors import ConfigError, DitrelayError, EngineClosed, InvalidRequest
from ditrelay.runtime.control_plane import HeadSockets
from ditrelay.runtime.messages import Started
from ditrelay.runtime.request import RequestState
from ditrelay.runtime.request_log import RequestLog
from ditrelay.runtime.scheduler import Scheduler
from ditrelay.runtime.tickets import Ticket
from ditrelay.runtime.topology import Topology
from ditrelay.runtime.watchdog import Watchdog

TIMED = "builtin:timed?encode=0.01&denoise=0.2&decode=0.01&steps=9&conditioning_mb=0.1&latents_mb=0.1"


def raising(*args: object) -> None:
    raise SystemExit("user code")


@pytest.mark.parametrize("end", ["finish", "close"])
def test_a_request_ends_though_every_observer_raises(end: str) -> None:
    log = RequestLog(Topology.build(ServerArgs()))
    wanted = request("a")
    ticket = Ticket(wanted, lambda request_id: None)
    log.open(wanted, ticket, limit=1)
    log.activity.watch(raising)
    log.on_end = lambda ended: 1 / 0  # type: ignore[assignment,return-value]
    ticket.subscribe(lambda progress: raising() if progress.state.ended else None)
    ticket.future.add_done_callback(raising)
    log.state_changed("a", RequestState.ENCODING)
    log.observe(Started(0, "a", "encode", 0.0))
    if end == "finish":
        log.finish("a", "failed", "because", None)
    else:
        log.close("because")
    with pytest.raises(DitrelayError, match="because"):
        ticket.result(0)
    assert list(ticket.events())[-1].state is RequestState.FAILED


def test_a_watcher_may_stop_itself_while_it_is_told() -> None:
    log, told = RequestLog(Topology.build(ServerArgs())), []
    log.open(request("a"), Ticket(request("a"), lambda request_id: None), limit=1)
    stop = log.activity.watch(lambda activity: (told.append(activity), stop()))  # type: ignore[arg-type,func-returns-value]
    log.observe(Started(0, "a", "encode", 0.0))
    log.close("the end")
    assert len(told) == 1


def test_a_result_that_cannot_be_told_is_an_error_for_its_client() -> None:
    log = RequestLog(Topology.build(ServerArgs()))
    ticket = Ticket(request("a"), lambda request_id: None)
    log.open(request("a"), ticket, limit=1)
    log.finish("a", "done", None, None)  # without its media: a defect
    with pytest.raises(DitrelayError, match="could not be told"):
        ticket.result(0)


def test_a_loop_that_stands_still_is_told_with_all_stacks_once(caplog: pytest.LogCaptureFixture) -> None:
    dog, now = Watchdog("the loop", limit=5.0), time.monotonic()
    dog.look(now + 4.0)
    assert not dog.trouble and not caplog.records
    for late in (6.0, 7.0):
        dog.look(now + late)
        assert "the loop has stood still for" in dog.trouble
    dog.turned()
    dog.look(time.monotonic())
    assert not dog.trouble
    dog.look(time.monotonic() + 6.0)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(messages) == 2 and "test_head_faults" in messages[0] and "all threads" not in messages[1]


def test_actions_that_fail_cost_a_rank_and_an_end_of_the_loop_ends_all_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [RuntimeError("can't start new thread"), BlockingIOError("no process"), MemoryError()]
    opened, sent = HeadSockets.open, HeadSockets.send

    def open_socket(self: HeadSockets, rank: int, incarnation: int) -> None:
        if incarnation and errors:
            raise errors.pop()
        opened(self, rank, incarnation)

    def send(self: HeadSockets, command: object) -> None:
        monkeypatch.setattr(HeadSockets, "send", sent)
        raise MemoryError("no memory for a command")

    args = ServerArgs(model_path=TIMED, device="cpu", warmup=False, log_level="error")
    with Engine(args) as engine:
        monkeypatch.setattr(HeadSockets, "open", open_socket)
        monkeypatch.setattr(HeadSockets, "send", send)
        assert engine.generate("a cat", timeout=60).media
        assert not errors and engine.status().workers[0].restarts >= 4
        pid = engine.status().workers[0].pid
        engine.restart(0)
        assert engine.generate("a cat", timeout=60).media and engine.status().workers[0].pid != pid
        with pytest.raises(InvalidRequest, match="allowed: 0 to 0"):
            engine.restart(1)

        def defect(self: Scheduler, event: object, now: float) -> None:
            raise AssertionError("a defect")

        ticket = engine.submit(engine.card.resolve(params("a cat")))
        monkeypatch.setattr(Scheduler, "on_event", defect)
        with pytest.raises(EngineClosed, match="control loop failed: a defect"):
            ticket.result(30)
        assert not engine.ready and "a defect" in engine.failure == engine.status().failure
        with pytest.raises(EngineClosed, match="a defect"):
            engine.submit(engine.card.resolve(params("a cat")))


def params(prompt: str) -> object:
    from ditrelay import SamplingParams

    return SamplingParams(prompt=prompt)


def test_a_server_whose_engine_has_ended_says_so_everywhere_and_a_rank_can_be_restarted() -> None:
    async def look() -> None:
        engine = FakeEngine()
        async with running(engine) as client:
            assert (await client.get("/health")).status_code == 200
            answer = await client.post("/v1/ranks/1/restart")
            assert (answer.status_code, answer.json()["rank"], engine.restarted) == (202, 1, [1])
            for wrong in (3, -1):
                assert "allowed: 0 to 2" in (await client.post(f"/v1/ranks/{wrong}/restart")).text
            engine.ended = "the engine's control loop failed: a defect"
            health, ready = await client.get("/health"), await client.get("/ready")
            assert health.status_code == ready.status_code == 503
            assert health.json()["reason"] == engine.ended == ready.json()["missing"]["engine"][0]

    asyncio.run(look())


def test_the_command_for_a_restart_says_what_is_wrong_in_one_line() -> None:
    with pytest.raises(ConfigError, match="--url"):
        restart_rank(0, "localhost:1", "")
    with pytest.raises(ConfigError, match="no server answers"):
        restart_rank(0, "http://127.0.0.1:9", "")
