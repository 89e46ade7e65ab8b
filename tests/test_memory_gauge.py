"""What of the process's memory a stage took, and what memory there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditrelay.runtime.pipelines_core.executors import memory_gauge
from ditrelay.runtime.pipelines_core.executors.memory_gauge import DeviceGauge, HostGauge

MIB = 1 << 20


def touched(nbytes: int) -> bytearray:
    return bytearray(b"x" * 4096) * (nbytes // 4096)


def test_a_peak_is_seen_after_it_has_passed_and_not_by_the_next_stage() -> None:
    gauge = HostGauge()
    idle = gauge.begin()
    held = touched(200 * MIB)
    del held
    assert gauge.peak() - idle >= 190 * MIB
    idle = gauge.begin()
    assert gauge.peak() - idle < 100 * MIB


def test_a_peak_that_can_not_be_counted_anew_is_not_taken_for_that_of_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = HostGauge()
    gauge.begin()
    held = touched(200 * MIB)
    del held
    monkeypatch.setattr(memory_gauge, "_CLEAR", tmp_path / "missing" / "clear_refs")
    idle = gauge.begin()
    assert gauge.peak() - idle < 100 * MIB
    held = touched(300 * MIB)  # above all before it
    del held
    assert gauge.peak() - idle >= 290 * MIB


def test_the_capacity_of_a_host_is_the_machines_or_its_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_gauge, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory_gauge, "_CGROUPS", tmp_path)
    (tmp_path / "cgroup").write_text("0::/service/one\n")
    (tmp_path / "service" / "one").mkdir(parents=True)
    (tmp_path / "service" / "one" / "memory.max").write_text("max\n")
    machine = HostGauge().capacity()
    assert machine > 100 * MIB
    (tmp_path / "service" / "memory.max").write_text(f"{100 * MIB}\n")  # holds for all below it
    assert HostGauge().capacity() == 100 * MIB


def test_limits_of_the_first_version_of_control_groups_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_gauge, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory_gauge, "_CGROUPS", tmp_path)
    (tmp_path / "cgroup").write_text("4:memory:/one\n3:cpuset:/\n")
    (tmp_path / "memory" / "one").mkdir(parents=True)
    (tmp_path / "memory" / "one" / "memory.limit_in_bytes").write_text(f"{50 * MIB}\n")
    assert HostGauge().capacity() == 50 * MIB


class Allocator:
    """Stands for torch's counts of one GPU's memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.most = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self._reset)

    def hold(self, nbytes: int) -> None:
        self.held = nbytes
        self.most = max(self.most, nbytes)

    def _reset(self, device: torch.device) -> None:
        self.most = self.held


def test_the_highest_of_a_device_outlives_the_peaks_of_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, gauge = Allocator(monkeypatch), DeviceGauge(torch.device("cuda", 0))
    for nbytes in (90, 10):  # loading
        allocator.hold(nbytes)
    stages = []
    for most in (50, 30):
        idle = gauge.begin()
        allocator.hold(most)
        allocator.hold(10)
        stages.append((idle, gauge.peak()))
    assert stages == [(10, 50), (10, 30)]
    assert gauge.highest() == 90
    allocator.hold(95)
    assert gauge.highest() == 95
