"""torch.distributed point-to-point transfers: gloo between CPUs, NCCL between GPUs.

An edge is a raw process group of its two ranks, made from the store under a prefix of its own. It belongs to no world,
so it can be torn down and made anew while all others go on.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Self

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from ditrelay.runtime.communication.edge_channel import dial, listen
from ditrelay.runtime.communication.endpoint import Endpoint, Job, Link, LinkDown, essence, not_connected
from ditrelay.runtime.communication.nccl_link import NcclLink
from ditrelay.runtime.communication.raw_group import RawGroup, gloo_group
from ditrelay.runtime.communication.store import edge_prefix
from ditrelay.runtime.topology import Edge

# gloo's tags are 31 bits wide.
_TAGS = 1 << 31


class TorchTransport(Endpoint):
    """One end of an edge over torch.distributed."""

    @classmethod
    def connect(
        cls,
        store: Store,
        edge: Edge,
        generation: int,
        rank: int,
        *,
        device: torch.device,
        timeout: float,
        host: str = "127.0.0.1",
        run_dir: str | None = None,
    ) -> Self:
        """Make this rank's end; blocks until the other end is made too.

        Args:
            store: where both ends meet; a client of its own where several edges are made at once (``connect_store``).
            edge: the directed edge.
            generation: how often this edge was made before; both ends must agree.
            rank: which end this is.
            device: where the tensors live: a CPU (gloo) or one GPU (NCCL).
            timeout: seconds that the set-up, and later every single transfer, may take.
            host: the interface that a gloo end listens on.
            run_dir: the launch's folder, where an NCCL edge's socket is until both ends have met
                (``edge_channel.listen``).

        Raises:
            TransferTimeout: the other end did not come within ``timeout``.
            TransferError: the connection failed otherwise.
        """
        deadline = time.monotonic() + timeout
        try:
            meeting = PrefixStore(edge_prefix(edge, generation), store)
            own = 0 if rank == edge.src else 1
            link: Link
            if device.type == "cuda":
                channel = listen(meeting, timeout, run_dir) if own == 0 else dial(meeting, timeout)
                link = NcclLink(meeting, channel, own, device, timeout)
            else:
                link = GlooLink(gloo_group(meeting, own, timeout, host), own)
        except (RuntimeError, OSError) as error:
            raise not_connected(edge, generation, error, timed_out=time.monotonic() >= deadline) from error
        end = cls(edge, rank, link, timeout)
        if device.type == "cuda":
            end.prove(device, generation)
        return end


class GlooLink:
    """A raw two-rank gloo group; ``end`` 0 sends, 1 receives."""

    def __init__(self, group: RawGroup, end: int) -> None:
        self._group: RawGroup | None = group
        self._end = end

    def mark(self) -> None:
        return None

    def move(self, job: Job, deadline: float) -> None:
        """gloo's works make progress only while somebody holds them, and are complete only once waited for."""
        assert self._group is not None, "moved after disconnect"
        post = self._group.send if self._end == 0 else self._group.recv
        tag = job.work.seq % _TAGS
        try:
            works = [post([view], 1 - self._end, tag) for view in job.views]
            complete = [work.wait(_remaining(deadline)) for work in works]
        except RuntimeError as error:
            raise LinkDown(essence(error), timed_out=time.monotonic() >= deadline) from error
        if not all(complete):
            raise LinkDown("gloo gave the transfer up")

    def interrupt(self) -> None:
        """gloo can not be interrupted: ``abort`` and ``shutdown`` leave a waiting thread where it is."""

    def disconnect(self) -> None:
        self._group = None


def _remaining(deadline: float) -> timedelta:
    """Time left, at least 1 ms: gloo takes zero for "no limit"."""
    return timedelta(seconds=max(deadline - time.monotonic(), 0.001))
