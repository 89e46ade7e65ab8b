"""torch.distributed's two-rank process groups that belong to no world. Typed here: torch's stubs leave them out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store


class RawWork(Protocol):
    """gloo: ``wait`` blocks, and False means given up. NCCL: ``wait`` orders the current stream after the transfer."""

    def wait(self, timeout: timedelta = ...) -> bool: ...


class RawGroup(Protocol):
    """Rank 0 sends, rank 1 receives. ``tag`` means nothing to NCCL."""

    def send(self, tensors: Sequence[torch.Tensor], rank: int, tag: int) -> RawWork: ...

    def recv(self, tensors: Sequence[torch.Tensor], rank: int, tag: int) -> RawWork: ...

    def abort(self) -> None: ...


def gloo_group(meeting: Store, rank: int, timeout: float, host: str) -> RawGroup:
    """Blocks until both ranks are here, ``timeout`` seconds at most. Listens on ``host`` only.

    Raises:
        RuntimeError: the other rank did not come, or the connection failed.
    """
    backend: Any = dist.ProcessGroupGloo
    options = backend._Options()
    options._devices = [backend.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout)
    options._threads = 1
    group: RawGroup = backend(meeting, rank, 2, options)
    return group


def nccl_group(meeting: Store, rank: int, watchdog_timeout: float) -> RawGroup:
    """Does not block: the communicator is made at the first transfer."""
    backend: Any = dist.ProcessGroupNCCL  # not there in a CPU build of torch
    options = backend.Options()
    options._timeout = timedelta(seconds=watchdog_timeout)
    group: RawGroup = backend(meeting, rank, 2, options)
    return group
