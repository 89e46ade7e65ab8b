"""``ditrelay doctor``: what this machine has, and whether its processes can talk to each other."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ditrelay._version import __version__

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "pyzmq", "msgspec", "fastapi")
_ATTENTION_PACKAGES = {
    "fa": ("flash_attn_interface", "flash_attn"),
    "sage": ("sageattention",),
    "xformers": ("xformers",),
}
_SELF_CHECK = "ditrelay.runtime.communication.test_async_basic"
_TEST_LINE = re.compile(r"(PASSED|FAILED): (.+)")
_TERM_SECONDS = 5.0


@dataclass(frozen=True)
class Check:
    """One row: ``ok`` is None for what is only told and cannot fail."""

    name: str
    value: str
    ok: bool | None = None


def examine(*, num_processes: int, timeout: float) -> int:
    """Print everything.

    Args:
        num_processes: processes of the communication self-check; 0: leave it out.
        timeout: seconds that it may take.

    Returns:
        0 if no check failed, else 1.
    """
    console = Console()
    checks = [*versions(), *devices(), *features()]
    console.print(_table(checks))
    if num_processes:
        with console.status(f"communication self-check with {num_processes} processes"):
            results = self_check(num_processes, timeout)
        console.print(_table(results))
        checks += results
    return 1 if any(check.ok is False for check in checks) else 0


def versions() -> Iterator[Check]:
    """ditrelay, Python, and the packages that matter. A missing one is a failed check."""
    yield Check("ditrelay", __version__)
    yield Check("python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            yield Check(package, importlib.metadata.version(package), ok=True)
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, "not installed", ok=False)


def devices() -> Iterator[Check]:
    """CPU, memory and GPUs."""
    import torch

    yield Check("cpu", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable")
    yield Check("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1024**3:.1f} GiB")
    count = torch.cuda.device_count()
    for i in range(count):
        gpu = torch.cuda.get_device_properties(i)
        yield Check(f"gpu {i}", f"{gpu.name}, {gpu.total_memory / 1024**3:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    if count:
        yield Check("nccl", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    else:
        yield Check("gpu", "none; ranks run as processes on the CPU")


def features() -> Iterator[Check]:
    """Attention backends and the ways to spread a transformer over ranks."""
    from ditrelay.models.quirks import FAMILIES, PLAN_FLAGS

    found = [name for name, modules in _ATTENTION_PACKAGES.items() if any(map(importlib.util.find_spec, modules))]
    yield Check("attention", ", ".join(["torch_sdpa", *found]))
    for plan, flag in PLAN_FLAGS.items():
        yield Check(flag, ", ".join(family.name for family in FAMILIES if plan in family.plans))


def self_check(num_processes: int, timeout: float) -> list[Check]:
    """Run the communication self-check under torchrun; one row per test of it, and one for the whole.

    Args:
        num_processes: processes, at least 2.
        timeout: seconds after which it counts as failed and its processes are ended.
    """
    began = time.monotonic()
    spec = importlib.util.find_spec(_SELF_CHECK)
    assert spec is not None and spec.origin is not None
    # -P: modules in the current folder are not taken for Python's own.
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    code, output = _run([*command, spec.origin], timeout)
    tests = [Check(name.strip(), word.lower(), ok=word == "PASSED") for word, name in _TEST_LINE.findall(output)]
    if code is None:
        return [*tests, Check("communication", f"no end within {timeout:g} s", ok=False)]
    if code == 0:
        return [*tests, Check("communication", f"{num_processes} processes, {time.monotonic() - began:.1f} s", ok=True)]
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
    return [*tests, Check("communication", f"exit code {code}: {last.strip()}", ok=False)]


def _run(command: list[str], timeout: float) -> tuple[int | None, str]:
    """(exit code, output) of a command; None where it was ended after ``timeout`` seconds, its children with it."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, _end(process)
    except BaseException:
        _end(process)
        raise
    return process.returncode, output


def _end(process: subprocess.Popen[str]) -> str:
    """Ends the process group: torchrun is asked first, as only it ends workers in groups of their own."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=_TERM_SECONDS)[0]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate(timeout=_TERM_SECONDS)[0]


def _table(checks: list[Check]) -> Table:
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    marks = {True: Text("ok", style="green"), False: Text("failed", style="bold red"), None: Text("")}
    for check in checks:
        table.add_row(check.name, marks[check.ok], Text(check.value))
    return table
