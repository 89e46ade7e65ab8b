"""The transfer layer's self-check as the guide runs it: under torchrun, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FILE = "ditrelay/runtime/communication/test_async_basic.py"
MODULE = ("-m", "ditrelay.runtime.communication.test_async_basic")
NAMES = ("Basic Async Send/Recv", "Disagg Topology", "Async Batch Transfer")

_ROOT = Path(__file__).parents[1]
Finished = subprocess.CompletedProcess[str]


def torchrun(processes: int, *what: str, gpus: bool = False, timeout: float = 200.0) -> Finished:
    """Run ``what`` on so many ranks: NCCL where ``gpus`` are left visible to them and are enough, else gloo."""
    meeting = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")  # at a free port: several runs go on at once
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *meeting, *what]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}
    return subprocess.run(command, cwd=_ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def passed(result: Finished) -> list[str]:
    """The checks that the summary says passed."""
    return [line.partition(": ")[2] for line in result.stdout.splitlines() if line.startswith("  ✓ PASSED: ")]
