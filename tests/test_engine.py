"""The engine with real worker processes and gloo, on the model whose stages sleep."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq
from chaos_server import lives

from ditrelay import AsyncEngine, Engine, SamplingParams, ServerArgs
from ditrelay.errors import (
    ConfigError,
    EngineClosed,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    StartupError,
)
from ditrelay.runtime.control_plane import HeadSockets
from ditrelay.runtime.request import RequestState, spread
from ditrelay.runtime.tickets import Ticket

QUICK = "builtin:timed?encode=0.01&denoise=0.06&decode=0.01&steps=3&conditioning_mb=1&latents_mb=0.1"
SLOW = "builtin:timed?encode=0.01&denoise=3&decode=0.01&steps=30&conditioning_mb=0.1&latents_mb=0.1"


def settings(**changes: object) -> ServerArgs:
    base = {"model_path": QUICK, "device": "cpu", "enable_disagg": True, "num_gpus": 3, "warmup": False}
    return ServerArgs(**{**base, **changes})


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(settings(num_gpus=4)) as started:
        yield started


@pytest.fixture(scope="module")
def slow() -> Iterator[Engine]:
    with Engine(settings(model_path=SLOW, stage_timeout=2.0, max_queue=4)) as started:
        yield started


def submit(engine: Engine, prompt: str, **params: object):
    return engine.submit(SamplingParams(prompt=prompt, **{"seed": 1, **params}))


def wait_ready(engine: Engine, timeout: float = 30.0) -> None:
    until = time.monotonic() + timeout
    while not engine.ready and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.ready, engine.status()


def test_a_request_passes_every_state_in_order(engine: Engine) -> None:
    ticket = submit(engine, "a cat")
    states = [progress.state for progress in ticket.events()]
    order = list(dict.fromkeys(states))
    assert order == [state for state in RequestState if state in order]
    assert order[0] is RequestState.QUEUED and order[-1] is RequestState.DONE
    assert states.count(RequestState.DENOISING) >= 3  # every step is reported


def test_many_requests_overlap_and_come_back_in_order(engine: Engine) -> None:
    prompts = [f"picture {i}" for i in range(24)]
    results = engine.generate(prompts, seed=100)
    assert [result.params.prompt for result in results] == prompts
    assert [result.seed for result in results] == list(range(100, 124))
    assert len({result.media for result in results}) == 24
    assert engine.overlap() > 0.2
    replicas = {span.rank for span in engine.spans if span.kind == "denoise"}
    assert replicas == {0, 1, 2}


def test_timings_add_up_to_the_total(engine: Engine) -> None:
    t = submit(engine, "a cat").result(30).timings
    parts = t.queued + t.encode + t.to_dit + t.wait_dit + t.denoise + t.to_decoder + t.wait_decoder + t.decode
    assert t.denoise >= 0.06 and t.encode >= 0.01 and t.to_dit > 0
    assert parts == pytest.approx(t.total, abs=0.02)


def test_one_seed_is_spread_over_several_pictures() -> None:
    made = spread(["a", "b"], 2, seed=5)
    assert [(p.prompt, p.seed) for p in made] == [("a", 5), ("a", 6), ("b", 7), ("b", 8)]
    assert {p.seed for p in spread("a", 3)} == {None}


@pytest.mark.parametrize("number", [0, -1])
def test_no_pictures_at_all_are_refused(number: int) -> None:
    with pytest.raises(InvalidRequest, match="num_images: .* allowed: 1 or more"):
        spread("a", number)


def test_a_seed_that_is_not_given_is_drawn_and_told(engine: Engine) -> None:
    first, second = (engine.generate("a cat") for _ in range(2))
    assert first.seed != second.seed
    assert engine.generate("a cat", seed=first.seed).media == first.media


def test_a_bad_parameter_is_refused_at_once_by_name(engine: Engine) -> None:
    with pytest.raises(InvalidRequest) as error:
        submit(engine, "a cat", num_inference_steps=0)
    assert error.value.param == "num_inference_steps"


def test_what_the_encoder_refuses_reaches_the_client_as_a_bad_parameter(engine: Engine) -> None:
    with pytest.raises(InvalidRequest) as error:
        submit(engine, "[invalid encode]").result(30)
    assert error.value.param == "prompt"


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_failing_stage_fails_its_request_alone(engine: Engine, stage: str) -> None:
    bad, good = submit(engine, f"[fail {stage}]"), submit(engine, "a cat")
    with pytest.raises(RequestFailed, match=f"{stage} fails"):
        bad.result(30)
    assert good.result(30).media


@pytest.mark.parametrize("rank", [0, 3], ids=["dit", "non_dit"])
def test_a_killed_worker_costs_no_request(engine: Engine, rank: int) -> None:
    wait_ready(engine)
    tickets = [submit(engine, f"picture {i}") for i in range(12)]
    pid = next(worker.pid for worker in engine.status().workers if worker.rank == rank)
    assert pid is not None
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    assert all(ticket.result(60).media for ticket in tickets)
    wait_ready(engine)
    assert engine.status().workers[rank].restarts >= 1


def test_a_rank_for_which_no_file_descriptor_is_left_is_started_when_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clients' connections may have them all; that must not end the head."""
    opened, tries = HeadSockets.open, list[int]()

    def open_socket(self: HeadSockets, rank: int, incarnation: int) -> None:
        if incarnation == 1:
            tries.append(rank)
            raise zmq.ZMQError(errno.EMFILE)
        opened(self, rank, incarnation)

    monkeypatch.setattr(HeadSockets, "open", open_socket)
    with Engine(settings()) as engine:
        pid = engine.status().workers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert submit(engine, "a cat").result(30).media
        wait_ready(engine)
        assert tries == [0] and engine.status().workers[0].restarts == 2


def test_a_request_that_kills_its_worker_fails_and_its_neighbours_do_not(engine: Engine) -> None:
    wait_ready(engine)
    poison = submit(engine, "[exit denoise]")
    others = [submit(engine, f"picture {i}") for i in range(6)]
    assert all(ticket.result(60).media for ticket in others)
    with pytest.raises(RequestFailed, match="died"):
        poison.result(60)
    wait_ready(engine)


def test_a_running_request_can_be_cancelled_and_the_next_one_runs(slow: Engine) -> None:
    wait_ready(slow)
    ticket = submit(slow, "a cat")
    for progress in ticket.events():
        if progress.step == 1:
            break
    began = time.monotonic()
    ticket.cancel()
    with pytest.raises(RequestCancelled):
        ticket.result(5)
    assert time.monotonic() - began < 1.0
    assert submit(slow, "a dog", num_inference_steps=1).result(10).media


def test_a_full_queue_refuses_with_a_time_to_come_back(slow: Engine) -> None:
    wait_ready(slow)
    tickets = []
    with pytest.raises(QueueFull) as error:
        for i in range(40):
            tickets.append(submit(slow, f"picture {i}"))
    assert error.value.retry_after >= 1
    for ticket in tickets:
        ticket.cancel()
    for ticket in tickets:
        with pytest.raises(RequestCancelled):
            ticket.result(10)


@pytest.mark.parametrize(
    ("prompts", "timeout", "error"), [(2, 0.3, TimeoutError), (40, None, QueueFull)], ids=["late", "too many"]
)
def test_what_generate_does_not_return_is_not_drawn(
    slow: Engine, prompts: int, timeout: float | None, error: type[Exception]
) -> None:
    wait_ready(slow)
    with pytest.raises(error):
        slow.generate([f"picture {i}" for i in range(prompts)], timeout=timeout)
    time.sleep(0.2)  # a status may be a tick old
    until = time.monotonic() + 2.0  # of the 3 that one picture takes
    while (status := slow.status()).running or status.queued:
        assert time.monotonic() < until, status
        time.sleep(0.02)


def test_a_stage_that_hangs_fails_its_request_and_the_rank_comes_back(slow: Engine) -> None:
    wait_ready(slow)
    with pytest.raises(RequestFailed, match="no progress for 2 s"):
        submit(slow, "[hang denoise]", num_inference_steps=2).result(20)
    wait_ready(slow)
    assert submit(slow, "a dog", num_inference_steps=1).result(10).media


def test_a_step_that_takes_far_longer_than_usual_is_a_hang_long_before_the_stage_timeout() -> None:
    with Engine(settings(num_gpus=2, dist_timeout=3.0, max_attempts=1)) as engine:
        engine.generate([f"picture {i}" for i in range(3)])
        began = time.monotonic()
        with pytest.raises(
            RequestFailed, match=r"denoise of request .* \(after step 1\) .* for 3 s \(--dist-timeout; usual"
        ):
            submit(engine, "[hang denoise]").result(30)
        assert time.monotonic() - began < 10.0
        wait_ready(engine)
        assert submit(engine, "a dog").result(10).media


def test_a_request_that_takes_too_long_fails_with_the_flags_name() -> None:
    with Engine(settings(model_path=SLOW, num_gpus=2, request_timeout=0.5)) as engine:
        with pytest.raises(RequestFailed, match="--request-timeout"):
            submit(engine, "a cat").result(10)


def test_closing_ends_waiting_requests_and_all_processes() -> None:
    engine = Engine(settings(model_path=SLOW)).start()
    ticket = submit(engine, "a cat")
    workers = [psutil.Process(worker.pid) for worker in engine.status().workers]
    began = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - began < 5.0
    with pytest.raises(EngineClosed):
        ticket.result(1)
    with pytest.raises(EngineClosed):
        submit(engine, "a dog")
    # The forkserver may take a moment to wait for the dead.
    assert not any(lives(worker) for worker in workers)


def test_a_head_with_a_thousand_open_files_ends_its_workers_too(tmp_path: Path) -> None:
    script = tmp_path / "head.py"
    script.write_text(
        "import os, resource\nfrom ditrelay import Engine, ServerArgs\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "files = [os.open('/dev/null', os.O_RDONLY) for _ in range(1100)]\n"
        f"engine = Engine(ServerArgs(model_path={QUICK!r}, device='cpu', warmup=False)).start()\n"
        "worker = engine.status().workers[0].pid\nengine.close()\n"
        "state = open(f'/proc/{worker}/stat').read().split()[2] if os.path.exists(f'/proc/{worker}') else 'gone'\n"
        "assert state in ('gone', 'Z'), state\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)


def test_workers_end_when_their_head_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "head.py"
    # No ``if __name__ == "__main__"``: the engine must not need it.
    script.write_text(
        "import time\nfrom ditrelay import Engine, ServerArgs\n"
        f"engine = Engine(ServerArgs(model_path={QUICK!r}, device='cpu', num_gpus=2, enable_disagg=True)).start()\n"
        "print(*(w.pid for w in engine.status().workers), flush=True)\ntime.sleep(60)\n"
    )
    head = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert head.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in head.stdout.readline().split()]
    assert len(workers) == 2
    head.kill()
    head.wait(10)
    head.stdout.close()
    until = time.monotonic() + 10
    while time.monotonic() < until and any(lives(worker) for worker in workers):
        time.sleep(0.05)
    assert not any(lives(worker) for worker in workers)


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_disagg": False, "num_gpus": 2},
        {"num_gpus": 4, "num_non_dit_ranks": 2},
        {"num_gpus": 4, "num_non_dit_ranks": 2, "num_encoder_ranks": 1, "num_decoder_ranks": 1},
        {"num_gpus": 4, "sp_degree": 2},
        {"use_async_comm": False},
    ],
    ids=["colocated", "two non-DiT", "encoder and decoder apart", "replicas of two and one", "lock-step"],
)
def test_every_topology_makes_the_same_pictures(engine: Engine, changes: dict[str, object]) -> None:
    expected = [result.media for result in engine.generate(["a cat", "a dog", "a tree", "a car"], seed=1)]
    with Engine(settings(**changes)) as other:
        made = other.generate(["a cat", "a dog", "a tree", "a car"], seed=1)
    assert [result.media for result in made] == expected


def test_lock_step_runs_one_request_at_a_time() -> None:
    with Engine(settings(use_async_comm=False)) as engine:
        engine.generate([f"picture {i}" for i in range(5)])
        assert engine.overlap() == 0.0


def test_a_cancel_reaches_both_ranks_of_a_replica_at_every_step() -> None:
    model = QUICK.replace("denoise=0.06", "denoise=0.3").replace("steps=3", "steps=6")
    with Engine(settings(model_path=model, num_gpus=3, sp_degree=2)) as engine:
        for step in range(6):
            ticket = submit(engine, "a cat")
            for progress in ticket.events():
                if progress.step == step and progress.state is RequestState.DENOISING:
                    break
            ticket.cancel()
            with pytest.raises(RequestCancelled):
                ticket.result(5)
        assert submit(engine, "a dog").result(10).media
        assert engine.status().workers[0].restarts == 0


def test_a_request_that_fails_on_every_rank_of_a_replica_costs_no_restart() -> None:
    with Engine(settings(num_gpus=3, sp_degree=2)) as engine:
        for _ in range(3):
            with pytest.raises(RequestFailed, match="denoise fails"):
                submit(engine, "[fail denoise]").result(10)
        assert submit(engine, "a dog").result(10).media
        assert submit(engine, "[oom denoise]").result(10).media  # the first time it runs out of memory
        assert [worker.restarts for worker in engine.status().workers] == [0, 0, 0]


@pytest.mark.parametrize("member", [0, 1], ids=["leader", "peer"])
def test_a_lost_member_of_a_replica_costs_no_request(member: int) -> None:
    model = QUICK.replace("denoise=0.06", "denoise=0.6")
    with Engine(settings(model_path=model, num_gpus=3, sp_degree=2)) as engine:
        tickets = [submit(engine, f"picture {i}") for i in range(3)]
        next(p for p in tickets[0].events() if p.step == 1)
        pid = engine.status().workers[member].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert all(ticket.result(30).media for ticket in tickets)
        wait_ready(engine)
        assert [worker.restarts for worker in engine.status().workers] == [1, 1, 0]


def test_the_async_twin_generates_streams_and_cancels() -> None:
    async def use() -> None:
        async with AsyncEngine(settings()) as engine:
            results = await engine.generate(["a cat", "a dog"], seed=1)
            assert isinstance(results, list) and [result.seed for result in results] == [1, 2]
            ticket = await engine.submit(SamplingParams(prompt="a tree", seed=3))
            states = [progress.state async for progress in ticket.events()]
            assert states[0] is RequestState.QUEUED and states[-1] is RequestState.DONE
            assert (await ticket.result()).seed == 3
            cancelled = await engine.submit(SamplingParams(prompt="a car", seed=3, num_inference_steps=1000))
            cancelled.cancel()
            with pytest.raises(RequestCancelled):
                await cancelled.result(5)

    asyncio.run(use())


def test_an_async_start_that_is_given_up_leaves_no_worker() -> None:
    async def give_up() -> None:
        engine = AsyncEngine(settings())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), engine:
                pass
        with pytest.raises(EngineClosed):
            await engine.submit(SamplingParams(prompt="a cat"))
        assert not any(worker.pid for worker in engine.status().workers)

    asyncio.run(give_up())


def test_warm_up_runs_before_the_engine_is_ready() -> None:
    with Engine(settings(warmup=True)) as engine:
        assert engine.ready
        assert {span.rank for span in engine.spans if span.kind == "denoise"} == {0, 1}


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (TimeoutError("request r has not ended"), "warm-up was not done within startup_timeout"),
        (RequestFailed("r", "encode failed"), "the warm-up failed: encode failed"),
    ],
)
def test_a_warm_up_that_comes_to_nothing_is_a_start_that_failed(
    end: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(self: Ticket, timeout: float | None = None) -> None:
        raise end

    monkeypatch.setattr(Ticket, "result", result)
    with pytest.raises(StartupError, match=reason):
        Engine(settings(warmup=True, num_gpus=1, enable_disagg=False)).start()


def test_a_worker_that_cannot_start_is_named(tmp_path: Path) -> None:
    import shutil

    from ditrelay.models.card import load_card

    folder = tmp_path / "model"
    shutil.copytree(load_card("builtin:emoji").path, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    header = weights.read_bytes()[:2000]
    engine = Engine(settings(model_path=str(folder)))
    weights.write_bytes(header)  # after the head has looked
    with pytest.raises(StartupError, match=r"rank \d \(dit\).*diffusion_pytorch_model"):
        engine.start()
    engine.close()


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"model_path": "builtin:nothing"}, "--model-path"),
        ({"device": "cuda"}, "--num-gpus"),
        ({"model_path": "builtin:emoji", "num_gpus": 3, "sp_degree": 2}, "--sp-degree"),
    ],
)
def test_wrong_settings_are_refused_before_any_process_starts(changes: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError) as error:
        Engine(settings(**changes))
    assert error.value.flag == flag


def test_a_long_run_over_gloo_leaves_nothing_pending_and_no_memory_behind() -> None:
    def memory(engine: Engine) -> list[int]:
        time.sleep(1.5)  # a heartbeat comes every second
        beats = [worker.memory for worker in engine.status().workers]
        assert all(beat is not None for beat in beats)
        assert [(b.pending_sends, b.pending_recvs, b.kept) for b in beats if b] == [(0, 0, 0)] * len(beats)
        return [beat.rss for beat in beats if beat]

    model = "builtin:timed?encode=0.001&denoise=0.004&decode=0.001&steps=2&conditioning_mb=2&latents_mb=0.2"
    with Engine(settings(model_path=model, max_queue=200)) as engine:
        engine.generate([f"warm-up {i}" for i in range(40)])
        before, after = memory(engine), []
        for _ in range(2):  # what the C library keeps for later goes up and down by as much as the window
            engine.generate([f"picture {i}" for i in range(160)])
            after.append(memory(engine))
        window = engine.args.max_pending_transfers * len(engine.topology.edges) * 2_200_000
    assert all(min(late) - early <= window for early, *late in zip(before, *after, strict=True))
