"""The self-check under torchrun, as the guide runs it, and that it fails when something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = "ditrelay/runtime/communication/test_async_basic.py"
MODULE = ("-m", "ditrelay.runtime.communication.test_async_basic")
NAMES = ("Basic Async Send/Recv", "Disagg Topology", "Async Batch Transfer")


def torchrun(processes: int, *what: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *what]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)


def test_four_processes_pass_and_print_what_the_guide_shows() -> None:
    result = torchrun(4, FILE)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:4] == ["=" * 60, "Running Async Communication Tests", "Rank: 0/4", "=" * 60]
    assert [f"  ✓ PASSED: {name}" for name in NAMES] == [line for line in lines if "PASSED" in line]
    assert "[Rank 0] Async send initiated" in lines and "All tests passed! ✓" in lines


def test_a_wrong_byte_on_a_rank_that_does_not_print_fails_the_check() -> None:
    result = torchrun(2, *MODULE, "--corrupt-on", "1")
    assert result.returncode != 0
    assert "  ✗ FAILED: Async Batch Transfer" in result.stdout and "  ✓ PASSED: Disagg Topology" in result.stdout
    assert "[Rank 1] TransferCorrupt" in result.stdout
    assert "All tests passed" not in result.stdout
