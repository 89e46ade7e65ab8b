"""The server under chaos: a process of its own, what its processes hold, and what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx
import psutil

ADDRESS = re.compile(r"Listening on (http://\S+)")
END_SECONDS = 30.0


class ServerFailed(Exception):
    """The server did what it must not: did not start, did not end, left something behind. Says what."""


class Server:
    """``with Server(["--num-gpus", "4"]) as server: server.url``. Loopback only, on a port of its own choice.

    Attributes:
        url: where it listens.
        log: its stderr, in ``folder``, which is also its temporary folder.
    """

    def __init__(self, flags: Sequence[str], *, start_timeout: float = 180.0) -> None:
        self._flags = [*flags, "--host", "127.0.0.1", "--port", "0"]
        self._start_timeout = start_timeout
        self._folder = tempfile.TemporaryDirectory(prefix="chaos-")
        self.folder = Path(self._folder.name)
        self.log = self.folder / "server.log"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._family: dict[int, psutil.Process] = {}

    def __enter__(self) -> Server:
        temporary = self.folder / "tmp"
        temporary.mkdir()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ditrelay.launch_server", *self._flags],
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(temporary)},
                start_new_session=True,  # Ctrl-C is for the benchmark, which then ends the server
            )
        try:
            self._await_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def _await_ready(self) -> None:
        until = time.monotonic() + self._start_timeout
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            found = ADDRESS.search(self.log.read_text())
            if found and self._is_ready(found[1]):
                self.url = found[1]
                return
            time.sleep(0.1)
        raise ServerFailed(f"the server was not ready within {self._start_timeout:g} s:\n{self.log_tail()}")

    def _is_ready(self, url: str) -> bool:
        try:
            return httpx.get(f"{url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "used inside of its with block"
        return self._process

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # ------------------------------------------------------------ processes

    def look(self) -> list[psutil.Process]:
        """The living processes of the server; all that were ever seen are remembered for the end."""
        try:
            head = psutil.Process(self.process.pid)
            for process in (head, *head.children(recursive=True)):
                self._family.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            pass
        return [process for process in self._family.values() if lives(process)]

    def memory(self, ranks: dict[int, str]) -> dict[str, int]:
        """Resident bytes by the processes' names. ``ranks``: the name of each worker's process, by pid."""
        held = {}
        for process in self.look():
            try:
                name = ranks.get(process.pid) or self._name(process)
                held[name] = process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return held

    def _name(self, process: psutil.Process) -> str:
        if process.pid == self.process.pid:
            return "head"
        command = " ".join(process.cmdline())
        names = {"resource_tracker": "resource tracker", "forkserver": "forkserver"}
        return next((name for word, name in names.items() if word in command), f"process {process.pid}")

    # ------------------------------------------------------------ end

    def stop(self) -> list[str]:
        """End it by SIGTERM. Returns what is wrong with its end: its exit code, what it left behind."""
        self.look()
        self.process.send_signal(signal.SIGTERM)
        wrong = []
        try:
            code = self.process.wait(END_SECONDS)
            if code != 0:
                wrong.append(f"exit code {code}")
        except subprocess.TimeoutExpired:
            wrong.append(f"not ended {END_SECONDS:g} s after SIGTERM")
        _, alive = psutil.wait_procs([p for p in self._family.values() if lives(p)], timeout=5)
        wrong += [f"process {process.pid} lives on" for process in alive if lives(process)]
        wrong += [f"{path.name} was left behind" for path in (self.folder / "tmp").glob("ditrelay-*")]
        return wrong

    def kill(self) -> None:
        self.look()
        for process in self._family.values():
            if lives(process):
                process.kill()
        self.process.wait(10)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._folder.cleanup()


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
