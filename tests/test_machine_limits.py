"""The machine gives no process, thread or file descriptor at the moment when something dies, and later it does."""

from __future__ import annotations

import os
import shutil
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

USER = 61_987  # nobody else's: the limit on processes counts all of a user's
MODEL = "builtin:timed?encode=0.01&denoise=0.05&decode=0.01&steps=3&conditioning_mb=1&latents_mb=0.1"
FLAGS = ["--model-path", MODEL, "--device", "cpu", "--enable-disagg", "--num-gpus", "3", "--sp-degree", "2"]
SHORTAGE = 2.5
SECONDS = 60.0  # for what takes less than five on a machine that does nothing else

# It may read files wherever Python lies, and no more.
AS_USER = [
    *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
    *(f"--{kind}-caps=-all,+dac_override,+dac_read_search" for kind in ("inh", "ambient")),
]

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="only root may run a server as a user of its own"),
    pytest.mark.skipif(not (shutil.which("setpriv") and shutil.which("prlimit")), reason="needs util-linux"),
]


def wait_until(condition: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < SECONDS, f"waited {SECONDS} s in vain"
        time.sleep(0.02)
    return time.monotonic() - began


class Limited:
    """A server whose user's limits can be changed while it runs."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        environment = {**os.environ, "TMPDIR": str(folder), "HOME": str(folder)}
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch may have set it here: to a folder of this user
        command = [sys.executable, "-m", "ditrelay", "serve", *FLAGS, "--port", "0", "--no-warmup"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*AS_USER, *command], stdout=log, stderr=log, env=environment)
        wait_until(lambda: "Listening on" in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        url = self.log.read_text().partition("Listening on ")[2].split()[0]
        self.client = httpx.Client(base_url=url, timeout=90)
        self.looker = httpx.Client(base_url=url, timeout=10)  # keeps its connection where no other can be had
        wait_until(self.is_ready)

    def is_ready(self) -> bool:
        return self.looker.get("/ready").status_code == 200

    def rank(self, rank: int) -> int:
        pid = self.looker.get("/v1/topology").json()["ranks"][rank]["pid"]
        assert isinstance(pid, int)
        return pid

    def forkserver(self) -> int:
        return psutil.Process(self.rank(0)).ppid()

    def draw(self) -> int:
        return self.client.post("/v1/images/generations", json={"prompt": "a cat"}).status_code

    def family(self) -> list[int]:
        head = psutil.Process(self.process.pid)
        return [head.pid, *(each.pid for each in head.children(recursive=True))]

    def no_processes(self) -> None:
        self._limit(self.family(), "--nproc=1:")

    def no_descriptors(self) -> None:
        """All that are below are in use; a wait for more descriptors than there may be would itself be an error."""
        self._limit([self.process.pid], "--nofile=16:")

    def lift(self) -> None:
        self._limit(self.family(), "--nproc=10000:")
        self._limit([self.process.pid], "--nofile=1024:")

    @staticmethod
    def _limit(pids: list[int], limit: str) -> None:
        """Soft limits only, and as the user itself: nobody else may where root lacks the capability."""
        for pid in pids:
            subprocess.run([*AS_USER, "prlimit", f"--pid={pid}", limit], check=True, timeout=SECONDS)

    def close(self) -> None:
        self.client.close()
        self.looker.close()
        self.process.terminate()
        assert self.process.wait(30) == 0, self.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def server() -> Iterator[Limited]:
    folder = Path(tempfile.mkdtemp(prefix="limits-", dir="/tmp"))
    shutil.chown(folder, USER, USER)
    limited = Limited(folder)
    try:
        yield limited
        limited.lift()
        limited.close()
    finally:
        if limited.process.poll() is None:
            for pid in reversed(limited.family()):
                psutil.Process(pid).kill()
        limited.process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("victim", [2, 1], ids=["a rank", "a member of a replica"])
@pytest.mark.parametrize("shortage", [Limited.no_processes, Limited.no_descriptors])
def test_a_rank_that_dies_while_nothing_can_be_started_is_back_once_it_can_and_nothing_is_lost(
    server: Limited, victim: int, shortage: Callable[[Limited], None], record_property: Callable[[str, object], None]
) -> None:
    wait_until(server.is_ready)
    pid = server.rank(victim)
    with ThreadPoolExecutor(4) as pool:
        drawn = [pool.submit(server.draw) for _ in range(4)]
        wait_until(lambda: server.looker.get("/v1/topology").json()["requests"]["running"] > 0)
        shortage(server)
        try:
            os.kill(pid, 9)
            wait_until(lambda: not server.is_ready())
            until = time.monotonic() + SHORTAGE
            while time.monotonic() < until:
                assert not server.is_ready(), "no picture can be drawn"
                time.sleep(0.1)
        finally:
            server.lift()
        record_property("seconds to heal", round(wait_until(server.is_ready), 2))
        assert [each.result(SECONDS) for each in drawn] == [200] * 4
    assert server.rank(victim) != pid and server.draw() == 200
    assert server.looker.get("/health").status_code == 200


def test_a_forkserver_that_dies_while_no_process_can_be_started_costs_nothing_and_is_back_once_it_can(
    server: Limited, record_property: Callable[[str, object], None]
) -> None:
    wait_until(server.is_ready)
    first, pid = server.forkserver(), server.rank(2)
    server.no_processes()
    try:
        os.kill(first, 9)
        time.sleep(SHORTAGE)
        assert server.is_ready() and server.draw() == 200
    finally:
        server.lift()
    os.kill(pid, 9)
    wait_until(lambda: not server.is_ready())
    record_property("seconds to heal with a new forkserver", round(wait_until(server.is_ready), 2))
    assert server.forkserver() != first and server.draw() == 200
