"""Starting, watching and killing worker processes of this host."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from ditrelay.errors import ConfigError
from ditrelay.runtime.code_caches import use_private_caches
from ditrelay.runtime.processes import check_room, is_dead, is_stopped, kill_child
from ditrelay.runtime.run_dir import FORKSERVER_LOCK, lock
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)

NVIDIA_DRIVER = Path("/dev/nvidiactl")
START_SECONDS = 10.0  # for a process from a forkserver that has imported all, which takes milliseconds
IMPORT_SECONDS = 120.0  # for the first one of a forkserver
STOPPED_SECONDS = 1.0
CUDA_SECONDS = 60.0  # for a forked process to find its GPUs
_STATUS_SECONDS = 0.2
_START_LOCK = threading.Lock()
# All ranks are of one host, so that what they listen on need not be seen from others.
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
_ENVIRONMENT = {
    # With two busy ranks on two cores, two threads each made a half-second generation take twelve.
    "cpu": {"OMP_NUM_THREADS": "1", **_LOOPBACK},
    "cuda": {
        # NCCL's watchdog would end the process, or abort an edge so that its failed transfer looks complete.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        # Libraries ask whether there is a GPU while they are imported. Asked in any other way, CUDA is of no use to
        # the processes that are forked afterwards.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        **_LOOPBACK,
    },
}


class ProcessHandle(Protocol):
    """A running worker. ``fileno`` becomes readable when the process ends."""

    @property
    def pid(self) -> int: ...

    def fileno(self) -> int: ...

    def kill(self) -> None: ...

    def ending(self) -> str:
        """How the process ended, in a few words, and what that hints at."""
        ...

    def close(self) -> None: ...


def await_end(handle: ProcessHandle, seconds: float) -> None:
    """Return when the process has ended, or after ``seconds``."""
    end = select.poll()  # ``select.select`` refuses the descriptors of a server with a thousand clients
    end.register(handle.fileno(), select.POLLIN)
    end.poll(max(0, round(seconds * 1000)))


class Launcher(Protocol):
    """Starts workers; other launchers (other hosts) fit behind this."""

    def start(self, spec: WorkerSpec) -> ProcessHandle:
        """May wait for what it starts workers with. Raises ``OSError`` where the process can not be started."""
        ...

    def look_after(self) -> bool:
        """Look after what it starts workers with: whether that must be renewed.

        Called often, by another thread than the rest, also while a start is under way; does not wait.
        """
        ...

    def renew(self) -> None:
        """Make what it starts workers with anew. May wait. Raises ``OSError`` where that is not possible now."""
        ...


class LocalProcess:
    """A process of this host, watched through a pidfd.

    A pidfd tells the end of this very process: it needs no parent relation (a forkserver's children are not ours), a
    reused pid cannot fool it, and unlike multiprocessing's sentinel it does not report the living as dead when the
    forkserver dies.
    """

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None, "it was started"
        self.pid = process.pid
        self._process = process
        self._fd = os.pidfd_open(self.pid)

    def fileno(self) -> int:
        return self._fd

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def ending(self) -> str:
        if not _START_LOCK.acquire(timeout=_STATUS_SECONDS):  # who starts a process reads how others have ended, too
            return "how it ended is not known"
        try:
            self._process.join(_STATUS_SECONDS)  # a forkserver sends it a moment after the end
            code = self._process.exitcode
        finally:
            _START_LOCK.release()
        if code is None:
            return "how it ended is not known"
        if code == -signal.SIGKILL:
            return "killed by SIGKILL; where nobody did, the host had no memory left"
        if code < 0:
            return f"ended by signal {signal.strsignal(-code) or -code}; its stack is on stderr"
        return f"exit code {code}; what it said last is on stderr"

    def close(self) -> None:
        os.close(self._fd)


class LocalLauncher:
    """Workers on this host, from a forkserver that has imported the heavy modules.

    On GPUs they are spawned where what was imported has touched CUDA already, which no process may be forked after.

    Args:
        device_type: ``cpu`` or ``cuda``.
        preload: modules that the forkserver imports once for all workers.
    """

    def __init__(self, device_type: str, preload: Sequence[str]) -> None:
        self._environment = {"TOKENIZERS_PARALLELISM": "false", **_ENVIRONMENT[device_type], **_search_path()}
        self._context: multiprocessing.context.ForkServerContext | multiprocessing.context.SpawnContext
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._is_tried = device_type == "cpu"  # whether forked processes can use the device
        self._uses_forkserver = True
        self._forkserver: int | None = None  # its pid
        self._has_imported = False  # the forkserver, so that it answers at once
        self._busy_since: float | None = None  # the start that is under way
        self._stopped_since: float | None = None
        self._ensure_forkserver()  # it imports while the head does other things
        _mark_forkserver_folder()

    def start(self, spec: WorkerSpec) -> ProcessHandle:
        if not self._is_tried:
            self._try_fork()
        arguments, name = (spec, self._environment), f"ditrelay-{spec.rank}"
        process = self._context.Process(target=_run, args=arguments, name=name, daemon=True)
        check_room()
        if self._uses_forkserver:
            self._ensure_forkserver()
        self._busy_since = time.monotonic()
        try:
            with _START_LOCK, _environment(self._environment), no_interrupts(), _no_main_module():
                process.start()
            self._has_imported = self._uses_forkserver
        except EOFError as error:
            raise OSError("the forkserver died, or hung, while it started the process") from error
        finally:
            self._busy_since = None
        try:
            handle = LocalProcess(process)
        except OSError:  # no file descriptor is left to watch it by, and nobody would know of it
            process.kill()
            raise
        return handle

    def _try_fork(self) -> None:
        """Spawn workers from now on where a forked process can not use the GPUs."""
        self._is_tried = True
        trouble = self._trouble_of_a_fork()
        if trouble:
            logger.warning("workers are spawned, which takes longer: CUDA does not work after a fork (%s)", trouble)
            self._context, self._uses_forkserver = multiprocessing.get_context("spawn"), False

    def _trouble_of_a_fork(self) -> str:
        reader, writer = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_look_for_gpus, args=(writer,), name="ditrelay-gpus", daemon=True)
        with reader:
            try:
                with writer, _START_LOCK, no_interrupts(), _no_main_module():
                    process.start()
                if reader.poll(CUDA_SECONDS):
                    return reader.recv_bytes().decode()
                process.kill()
            except (OSError, EOFError) as error:
                return f"the process ended: {error}"
        return f"no answer within {CUDA_SECONDS:g} s"

    def _ensure_forkserver(self) -> None:
        with _START_LOCK, _environment(self._environment), no_interrupts():
            forkserver.ensure_running()
            pid: int = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # it is told nowhere else
        if pid != self._forkserver:
            self._forkserver, self._has_imported, self._stopped_since = pid, False, None

    def look_after(self) -> bool:
        """A dead forkserver is replaced before it is needed: it imports for seconds. One that was stopped goes on, and
        one that takes too long over a start is killed: its answer would be waited for without an end.
        """
        pid = self._forkserver
        if not self._uses_forkserver or pid is None:
            return False
        if is_dead(pid):
            return True
        now, busy = time.monotonic(), self._busy_since
        if busy is not None and now - busy > (START_SECONDS if self._has_imported else IMPORT_SECONDS):
            logger.warning("the forkserver hangs and is killed")
            kill_child(pid)
        self._let_go_on(pid, now)
        return False

    def _let_go_on(self, pid: int, now: float) -> None:
        if not is_stopped(pid):
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since > STOPPED_SECONDS:  # longer than where all of a terminal's job goes on
            logger.warning("the forkserver was stopped; it is let go on")
            self._stopped_since = None
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)

    def renew(self) -> None:
        logger.warning("the forkserver died; no worker needs it to live, a new one is started")
        self._ensure_forkserver()

    def abandon(self) -> None:
        """Let the starts that are under way fail at once: a forkserver answers when it has imported, or when it dies.

        For a program that ends: those of its other engines fail, too.
        """
        for child in _children():
            with contextlib.suppress(OSError):
                if b"multiprocessing.forkserver" in Path(f"/proc/{child}/cmdline").read_bytes():
                    kill_child(child)


def _children() -> list[int]:
    """The pids of this process's children, whichever thread started them."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(pid) for each in lists for pid in each.read_text().split()]


def _mark_forkserver_folder() -> None:
    """Nothing removes multiprocessing's folder where this process is killed: the next launch finds it by this mark."""
    folder = Path(util.get_temp_dir())
    with contextlib.suppress(OSError):  # then it stays, as multiprocessing's always do
        if not (folder / FORKSERVER_LOCK).exists():
            lock(folder, FORKSERVER_LOCK)


def _look_for_gpus(answer: Connection) -> None:
    """Answer what is wrong with CUDA in this process; nothing where it works."""
    import torch

    trouble = ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        trouble = str(error).partition("\n")[0] or type(error).__name__
    answer.send_bytes(trouble.encode())


def _run(spec: WorkerSpec, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)  # the forkserver may be of a launcher for another device
    use_private_caches(spec.run_dir)
    from torch import set_num_threads  # not in the head, which needs nothing of it

    from ditrelay.runtime.worker import run_worker

    if spec.device_type == "cpu" and (threads := os.environ["OMP_NUM_THREADS"]).isdecimal():
        set_num_threads(int(threads))  # torch has read the variable already
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


def _search_path() -> dict[str, str]:
    """Python looks for a child's modules in the current folder first: a ``queue.py`` there, and none would start.

    Where this process does not look there, its children don't.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed: nothing is found there
        return {}
    return {} if sys.path[:1] in ([""], [here]) else {"PYTHONSAFEPATH": "1"}


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal, and so does the SIGHUP of its end. Those started inside leave both to
    the head, also while they import.

    What this thread gets of them inside the block comes at its end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        resource_tracker.ensure_running()  # else multiprocessing starts it inside, and lets Ctrl-C in again
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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


def resolve_device(args: ServerArgs) -> str:
    """``cpu`` or ``cuda``. Raises ``ConfigError`` where there are fewer GPUs than ranks, or none for CUDA IPC."""
    count = 0 if args.device == "cpu" else count_gpus()
    if args.device == "cpu" or (args.device == "auto" and count == 0):
        if args.transfer_backend == "cuda_ipc":
            raise ConfigError(
                "--transfer-backend", "cuda_ipc moves tensors between GPUs; on a CPU allowed: auto, torch"
            )
        return "cpu"
    if count < args.num_gpus:
        raise ConfigError(
            "--num-gpus", f"{args.num_gpus} ranks need as many GPUs and there are {count}; or --device cpu"
        )
    return "cuda"


def count_gpus() -> int:
    """GPUs that torch can use; torch is imported only where the driver is loaded."""
    if not NVIDIA_DRIVER.exists():
        return 0
    import torch

    return torch.cuda.device_count()
