"""What memory a stage takes: on a GPU what torch has allocated there, on a CPU what of the process is resident."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from pathlib import Path
from typing import Protocol

import torch

_STATUS = Path("/proc/self/status")
# Writing this to it makes the kernel count the process's peak anew (see proc(5)).
_CLEAR = Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


class MemoryGauge(Protocol):
    """One rank's memory, in bytes. Stages that run side by side are measured together."""

    def begin(self) -> int:
        """What is held now; ``peak`` counts from here."""
        ...

    def peak(self) -> int:
        """The most that was held since ``begin``."""
        ...

    def highest(self) -> int:
        """The most of a GPU's memory that was held since the process began; 0 on a CPU."""
        ...

    def capacity(self) -> int:
        """What there is."""
        ...


class DeviceGauge:
    """That of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._highest = 0  # before the last ``begin``

    def begin(self) -> int:
        with self._lock:
            self._highest = max(self._highest, torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def highest(self) -> int:
        with self._lock:
            return max(self._highest, torch.cuda.max_memory_allocated(self._device))

    def capacity(self) -> int:
        return int(torch.cuda.get_device_properties(self._device).total_memory)


class HostGauge:
    """That of this process. Where the kernel can't count its peak anew, only one above all before it is seen."""

    def __init__(self) -> None:
        self._before = 0  # the peak that was counted at the last ``begin``

    def begin(self) -> int:
        with contextlib.suppress(OSError):
            _CLEAR.write_text(_CLEAR_PEAK)
        self._before = _counted_peak()
        return resident_bytes()

    def peak(self) -> int:
        counted = _counted_peak()
        return counted if counted > self._before else resident_bytes()

    def highest(self) -> int:
        return 0

    def capacity(self) -> int:
        """The machine's memory, or less where a container has a limit."""
        machine = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
        return min([machine, *_container_limits()])


def gauge_of(device: torch.device) -> MemoryGauge:
    return DeviceGauge(device) if device.type == "cuda" else HostGauge()


def resident_bytes() -> int:
    """Of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _counted_peak() -> int:
    fields = (line.split() for line in _STATUS.read_text().splitlines())
    return next((int(words[1]) << 10 for words in fields if words and words[0] == "VmHWM:"), 0)


def _container_limits() -> list[int]:
    """Of the control groups (version 2 or 1) that this process is in, those that have one, in bytes."""
    files = (file for line in _CGROUP.read_text().splitlines() for file in _limit_files(line))
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return [int(text) for text in texts if text.isdigit()]  # "max" is no limit


def _limit_files(line: str) -> list[Path]:
    """``line``: number, controllers (none in version 2), path. A group's limit holds for those below it, too."""
    _, controllers, path = line.split(":", 2)
    if controllers and "memory" not in controllers.split(","):
        return []
    root, name = (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
    own = root / path.lstrip("/")
    return [folder / name for folder in (own, *own.parents) if folder.is_relative_to(root)]
