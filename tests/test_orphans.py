"""Real processes that are killed or stopped: who is left, what is left, and how soon it is noticed."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from chaos_server import Server, lives

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.errors import RequestFailed, StartupError
from ditrelay.runtime.control_plane import HeadSockets, WorkerSockets
from ditrelay.runtime.run_dir import FORKSERVER_LOCK, RunDir, check_loopback, check_parent, lock, remove
from ditrelay.runtime.status import WorkerStatus

QUICK = "builtin:timed?encode=0.01&denoise=0.06&decode=0.01&steps=3&conditioning_mb=1&latents_mb=0.1"
HEAD = f"""
import dataclasses, json, time
from ditrelay import Engine, ServerArgs
from ditrelay.runtime.launcher import LocalLauncher
start = LocalLauncher.start
LocalLauncher.start = lambda self, spec: start(self, dataclasses.replace(spec, head_seconds=3.0))
engine = Engine(ServerArgs(model_path={QUICK!r}, device="cpu", num_gpus=3, enable_disagg=True, warmup=False)).start()
print(json.dumps([worker.pid for worker in engine.status().workers]), flush=True)
time.sleep(60)
"""


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> float:
    """Seconds until it is true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"waited {seconds} s in vain"
        time.sleep(0.01)
    return time.monotonic() - began


def children(process: psutil.Process) -> list[psutil.Process]:
    """None of one that has ended."""
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


class HeadProcess:
    """An engine in a process of its own, whose temporary folder is ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = folder / "head.py"
        script.write_text(HEAD)
        environment = {**os.environ, "TMPDIR": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.workers = [psutil.Process(pid) for pid in json.loads(self.process.stdout.readline())]
        # Workers are the forkserver's children, and that and the resource tracker are the head's.
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def left_behind(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if path.name.startswith("ditrelay-")]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[HeadProcess]:
    made = HeadProcess(tmp_path)
    yield made
    if made.process.poll() is None:
        made.kill()
    for process in made.family:
        if lives(process):
            process.kill()


def listening(processes: list[psutil.Process]) -> set[str]:
    """The addresses on which they listen."""
    sockets = [each for process in processes for each in process.net_connections("inet")]
    return {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def test_a_killed_head_leaves_no_process_no_socket_and_no_shared_memory(head: HeadProcess) -> None:
    assert len(head.family) >= 4 and len(head.left_behind()) == 1
    before = shared_memory()
    head.kill()
    wait_until(lambda: not any(lives(process) for process in head.family))
    assert head.left_behind() == []
    assert shared_memory() <= before


def test_the_workers_of_a_head_that_stands_still_end_and_are_started_anew_when_it_goes_on(head: HeadProcess) -> None:
    time.sleep(4.0)  # longer than they would wait without its word
    assert all(lives(worker) for worker in head.workers)
    head.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: not any(lives(worker) for worker in head.workers))
    head.process.send_signal(signal.SIGCONT)
    wait_until(lambda: any(len(children(process)) >= len(head.workers) for process in head.family))


def test_every_socket_listens_on_the_loopback_interface_only(head: HeadProcess) -> None:
    assert listening([psutil.Process(head.process.pid), *head.family]) == {"127.0.0.1"}


def test_the_ranks_of_a_replica_listen_on_the_loopback_interface_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    args = ServerArgs(model_path="builtin:timed", device="cpu", enable_disagg=True, num_gpus=3, sp_degree=2)
    with Engine(args) as replicas:
        replicas.generate("a red apple", timeout=60)
        seen = listening([psutil.Process(worker.pid) for worker in replicas.status().workers])
    assert seen and seen <= {"127.0.0.1", "::1"}


def test_a_second_sigterm_ends_a_busy_server_at_once_and_leaves_nothing() -> None:
    slow = QUICK.replace("denoise=0.06", "denoise=60").replace("steps=3", "steps=2")
    flags = ["--model-path", slow, "--device", "cpu", "--enable-disagg", "--num-gpus", "2", "--no-warmup"]
    with Server(flags) as server, ThreadPoolExecutor(1) as pool:
        server.look()
        waiting = pool.submit(httpx.post, f"{server.url}/v1/images/generations", json={"prompt": "a cat"}, timeout=60)
        wait_until(lambda: httpx.get(f"{server.url}/v1/topology").json()["requests"]["running"] == 1)
        server.process.terminate()
        wait_until(lambda: httpx.get(f"{server.url}/ready").json()["missing"].get("engine") == ["shutting down"])
        assert server.process.poll() is None
        assert server.stop() == []  # sends the second one
        assert waiting.result(10).status_code == 503


def test_a_sigterm_to_every_process_of_a_server_lets_what_runs_end_where_it_is() -> None:
    """So systemd stops a service, and ``timeout`` a command."""
    slow = QUICK.replace("denoise=0.06", "denoise=3").replace("steps=3", "steps=30")
    flags = ["--model-path", slow, "--device", "cpu", "--enable-disagg", "--num-gpus", "2", "--no-warmup"]
    with Server(flags) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, f"{server.url}/v1/images/generations", json={"prompt": "a cat"}, timeout=60)
        wait_until(lambda: httpx.get(f"{server.url}/v1/topology").json()["requests"]["running"] == 1)
        os.killpg(server.process.pid, signal.SIGTERM)
        assert waiting.result(60).status_code == 200
        assert server.process.wait(20) == 0
        assert "is down" not in server.log.read_text()


def test_a_worker_that_was_told_to_end_does_so_when_it_hears_nothing_of_its_head(tmp_path: Path) -> None:
    script = tmp_path / "head.py"
    script.write_text(HEAD.replace("head_seconds=3.0", "head_seconds=120.0"))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as head:
        assert head.stdout is not None
        workers = [psutil.Process(pid) for pid in json.loads(head.stdout.readline())]
        for worker in workers:
            worker.terminate()
        time.sleep(1.0)
        assert all(lives(worker) for worker in workers)
        head.send_signal(signal.SIGSTOP)
        wait_until(lambda: not any(lives(worker) for worker in workers))
        head.kill()


FAILING = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from ditrelay import ServerArgs
from ditrelay.models.card import load_card
from ditrelay.runtime.topology import Topology
from ditrelay.runtime.worker import Worker, run_worker
from ditrelay.runtime.worker_spec import WorkerSpec

def obey(self):
    ThreadPoolExecutor(1).submit(time.sleep, 60)  # as a disk that hangs would keep a checkpoint's writer
    self.fail("the device is lost")

Worker.load, Worker.obey = lambda self: None, obey
args = ServerArgs(model_path="builtin:timed", device="cpu")
card, topology = load_card(args.model_path), Topology.build(args)
run_worker(WorkerSpec(0, 0, args, card, topology, "cpu", sys.argv[1], "127.0.0.1", 1, 1, "token"))
"""


def test_a_worker_that_can_not_go_on_ends_whatever_still_hangs_in_it(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", FAILING, str(tmp_path)], timeout=30)
    assert run.returncode == 1


def test_a_script_that_forgets_its_engine_ends_with_all_processes(tmp_path: Path) -> None:
    script = tmp_path / "head.py"
    script.write_text(HEAD.replace("time.sleep(60)", ""))
    run = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, timeout=30, check=True)
    workers = [pid for pid in json.loads(run.stdout) if psutil.pid_exists(pid)]
    wait_until(lambda: not any(lives(psutil.Process(pid)) for pid in workers if psutil.pid_exists(pid)))


def test_what_a_launch_leaves_that_was_killed_as_a_whole_is_removed_by_the_next(head: HeadProcess) -> None:
    for worker in head.workers:
        worker.suspend()  # none of them can clean up
    head.kill()
    for worker in head.workers:
        worker.kill()
    wait_until(lambda: not any(lives(process) for process in head.family))
    assert len(head.left_behind()) == 1
    following = RunDir(head.folder)
    assert head.left_behind() == [following.path.name]
    following.close()


def test_the_folder_of_a_forkservers_socket_is_removed_by_the_next_launch_once_its_head_is_dead(tmp_path: Path) -> None:
    dead, living, others = (tmp_path / f"pymp-{name}" for name in ("dead", "living", "others"))
    for folder in (dead, living, others):
        folder.mkdir()
        (folder / "listener").touch()
    os.close(lock(dead, FORKSERVER_LOCK))
    held = lock(living, FORKSERVER_LOCK)
    RunDir(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {"pymp-living", "pymp-others"}
    os.close(held)


def test_a_launchs_folder_that_was_removed_is_made_anew_but_not_in_place_of_another_users(tmp_path: Path) -> None:
    launch = RunDir(tmp_path)
    launch.restore()
    remove(str(launch.path))
    launch.restore()
    assert launch.path.stat().st_mode & 0o777 == 0o700
    RunDir(tmp_path).close()  # sweeps
    assert launch.path.exists(), "it is locked again"
    if os.getuid() == 0:
        os.chown(launch.path, 61_987, 61_987)
        with pytest.raises(OSError, match="not only this user's"):
            launch.restore()
    launch.close()


def test_a_launch_leaves_the_folders_of_the_living_alone(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path), RunDir(tmp_path)
    (tmp_path / "ditrelay-of-somebody-else").mkdir()
    third = RunDir(tmp_path)
    assert first.path.stat().st_mode & 0o777 == 0o700
    assert len(list(tmp_path.iterdir())) == 4
    second.close()
    second.close()
    remove(str(first.path))
    first.close()
    third.close()
    assert [path.name for path in tmp_path.iterdir()] == ["ditrelay-of-somebody-else"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    args = ServerArgs(
        model_path=QUICK,
        device="cpu",
        enable_disagg=True,
        num_gpus=3,
        warmup=False,
        dist_timeout=5.0,
        log_level="error",
    )
    with Engine(args) as started:
        yield started


def worker(engine: Engine, rank: int) -> WorkerStatus:
    return engine.status().workers[rank]


def pid_of(engine: Engine, rank: int) -> int:
    wait_until(lambda: engine.ready, 30)
    pid = worker(engine, rank).pid
    assert pid is not None
    return pid


@pytest.mark.parametrize("instead", ["a link to a folder of ours", "a folder that others may enter", "a file"])
def test_what_has_the_name_of_a_removed_folder_is_not_taken_for_it(tmp_path: Path, instead: str) -> None:
    launch = RunDir(tmp_path)
    remove(str(launch.path))
    if instead == "a file":
        launch.path.touch()
    elif instead == "a folder that others may enter":
        launch.path.mkdir(mode=0o755)
    else:
        (tmp_path / "ours").mkdir(mode=0o700)
        launch.path.symlink_to(tmp_path / "ours")
    with pytest.raises(OSError, match="was removed, and what has its name now"):
        launch.restore()
    launch.close()


def test_a_killed_worker_is_noticed_within_a_second(engine: Engine) -> None:
    pid = pid_of(engine, 0)
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: worker(engine, 0).state != "up") < 1.0
    wait_until(lambda: engine.ready, 30)


@pytest.mark.parametrize("rank", [0, 2], ids=["dit", "non_dit"])
def test_a_stopped_worker_is_replaced_after_the_timeout_and_costs_no_request(engine: Engine, rank: int) -> None:
    pid = pid_of(engine, rank)
    restarts = worker(engine, 1).restarts
    tickets = [engine.submit(SamplingParams(prompt=f"picture {i}", seed=i)) for i in range(12)]
    time.sleep(0.1)
    os.kill(pid, signal.SIGSTOP)
    noticed = wait_until(lambda: worker(engine, rank).state != "up")
    assert 2.5 < noticed < 5.0 + 1.0, "4 s, less the age of its last heartbeat"
    assert all(ticket.result(60).media for ticket in tickets)
    assert pid_of(engine, rank) != pid
    assert worker(engine, 1).restarts == restarts, "a healthy rank was restarted"


def test_a_worker_that_is_stopped_for_a_moment_is_left_alone(engine: Engine) -> None:
    pid = pid_of(engine, 0)
    tickets = [engine.submit(SamplingParams(prompt=f"picture {i}", seed=i)) for i in range(12)]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.0)
    os.kill(pid, signal.SIGCONT)
    assert all(ticket.result(60).media for ticket in tickets)
    assert worker(engine, 0).pid == pid


def forkservers() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if lives(each) and "forkserver" in " ".join(each.cmdline())]


def test_the_death_of_the_forkserver_disturbs_no_worker_and_a_new_one_is_there_before_it_is_needed(
    engine: Engine,
) -> None:
    pids = [pid_of(engine, rank) for rank in range(3)]
    (first,) = forkservers()
    first.kill()
    tickets = [engine.submit(SamplingParams(prompt=f"picture {i}", seed=i)) for i in range(12)]
    assert all(ticket.result(60).media for ticket in tickets)
    wait_until(lambda: bool(forkservers()))
    (second,) = forkservers()
    assert second.pid != first.pid
    assert [worker(engine, rank).pid for rank in range(3)] == pids
    os.kill(pids[1], signal.SIGKILL)
    wait_until(lambda: worker(engine, 1).pid != pids[1])
    assert psutil.Process(pid_of(engine, 1)).ppid() == second.pid
    assert [worker(engine, rank).pid for rank in (0, 2)] == [pids[0], pids[2]]


def test_a_forkserver_that_was_stopped_goes_on_after_a_moment_and_holds_up_nobody(engine: Engine) -> None:
    pid_of(engine, 1)
    (first,) = forkservers()
    first.suspend()
    os.kill(pid_of(engine, 1), signal.SIGKILL)
    tickets = [engine.submit(SamplingParams(prompt=f"picture {i}", seed=i)) for i in range(6)]
    assert all(ticket.result(30).media for ticket in tickets)
    wait_until(lambda: engine.ready, 30.0)
    assert lives(first), "what it has imported is not imported again"


def test_a_transfer_that_breaks_with_its_peer_is_no_attempt_of_its_request() -> None:
    """Else three deaths in a row, none of them its fault, would fail a request."""
    model = "builtin:timed?encode=0.01&denoise=0.01&decode=0.01&steps=1&conditioning_mb=100&latents_mb=0.1"
    args = ServerArgs(model_path=model, device="cpu", enable_disagg=True, num_gpus=2, max_attempts=1, log_level="error")
    reasons = []
    with Engine(args) as engine:
        for _ in range(3):
            pid = pid_of(engine, 0)
            tickets = [engine.submit(SamplingParams(prompt=f"picture {i}", seed=i)) for i in range(12)]
            time.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            for ticket in tickets:
                try:
                    ticket.result(60)
                except RequestFailed as error:
                    reasons.append(error.reason)
    assert all("while it was denoised" in reason for reason in reasons), reasons


def test_a_host_without_loopback_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_loopback()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", fail)
    with pytest.raises(StartupError, match="loopback interface .* Network is unreachable.*ip link set lo up") as error:
        check_loopback()
    assert "\n" not in str(error.value)


def test_a_temporary_folder_too_long_for_sockets_is_refused_and_the_longest_that_is_not_serves() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        longest = Path(short, "x" * (74 - len(short) - 1))
        longest.mkdir()
        check_parent(longest)
        launch = RunDir(longest)
        HeadSockets(str(launch.path), "token").flush_and_close(0.0)
        WorkerSockets(str(launch.path), 99, 99, "token").close(0.0)
        launch.close()
    with pytest.raises(StartupError, match="set TMPDIR to a path of at most 74 bytes"):
        check_parent(Path(f"{longest}x"))
