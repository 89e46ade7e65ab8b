"""Starting, watching and killing worker processes of this host."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from typing import Protocol

from ditrelay.runtime.worker_spec import WorkerSpec

_START_LOCK = threading.Lock()
_ENVIRONMENT = {
    # With two busy ranks on two cores, two threads each made a half-second generation take twelve.
    "cpu": {"OMP_NUM_THREADS": "1"},
    # NCCL's watchdog would end the process, or abort an edge so that its failed transfer looks complete.
    "cuda": {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"},
}


class ProcessHandle(Protocol):
    """A running worker. ``fileno`` becomes readable when the process ends."""

    @property
    def pid(self) -> int: ...

    def fileno(self) -> int: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class Launcher(Protocol):
    """Starts workers; other launchers (other hosts) fit behind this."""

    def start(self, spec: WorkerSpec) -> ProcessHandle: ...


class LocalProcess:
    """A process of this host, watched through a pidfd.

    A pidfd tells the end of this very process: it needs no parent relation (a forkserver's children are not ours), a
    reused pid cannot fool it, and unlike multiprocessing's sentinel it does not report the living as dead when the
    forkserver dies.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def fileno(self) -> int:
        return self._fd

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def close(self) -> None:
        os.close(self._fd)


class LocalLauncher:
    """Workers on this host: from a forkserver that has imported the heavy modules (CPU), or spawned (CUDA).

    Args:
        device_type: ``cpu`` or ``cuda``.
        preload: modules that the forkserver imports once for all workers.
    """

    def __init__(self, device_type: str, preload: Sequence[str]) -> None:
        self._context: multiprocessing.context.ForkServerContext | multiprocessing.context.SpawnContext
        if device_type == "cpu":
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(list(preload))
            with _START_LOCK, _environment(_ENVIRONMENT["cpu"]):
                forkserver.ensure_running()  # it imports while the head does other things
        else:
            self._context = multiprocessing.get_context("spawn")
        self._environment = {"TOKENIZERS_PARALLELISM": "false", **_ENVIRONMENT[device_type]}

    def start(self, spec: WorkerSpec) -> ProcessHandle:
        process = self._context.Process(target=_run, args=(spec,), name=f"ditrelay-{spec.rank}", daemon=True)
        with _START_LOCK, _environment(self._environment), _no_main_module():
            process.start()
        assert process.pid is not None
        return LocalProcess(process.pid)


def _run(spec: WorkerSpec) -> None:
    from ditrelay.runtime.worker import run_worker  # not in the head, which needs nothing of it

    run_worker(spec)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes started inside; what the user has set already stays."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep multiprocessing from running the caller's script again in each worker.

    It would do so to find functions defined there; ours are in the package, and a script without
    ``if __name__ == "__main__"`` would start an engine in every worker.
    """
    main = vars(sys.modules["__main__"])
    hidden: dict[str, object] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)
