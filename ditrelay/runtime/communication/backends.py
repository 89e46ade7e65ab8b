"""Which transport an edge runs over (``--transfer-backend``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch._C._distributed_c10d import Store

from ditrelay.runtime.communication.cuda_ipc_transport import CudaIpcTransport
from ditrelay.runtime.communication.endpoint import Endpoint
from ditrelay.runtime.communication.torch_transport import TorchTransport
from ditrelay.runtime.topology import Edge

Backend = Literal["torch", "cuda_ipc"]


def connect_edge(
    wanted: str,
    store: Store,
    edge: Edge,
    generation: int,
    rank: int,
    *,
    device: torch.device,
    timeout: float,
    run_dir: str | None = None,
) -> Endpoint:
    """Make this rank's end of ``edge`` over the backend that ``wanted`` (``auto`` or a ``Backend``) stands for.

    Arguments and errors are those of ``TorchTransport.connect``.
    """
    if choose_backend(wanted, edge, device) == "cuda_ipc":
        return CudaIpcTransport.connect(store, edge, generation, rank, device=device, timeout=timeout, run_dir=run_dir)
    return TorchTransport.connect(store, edge, generation, rank, device=device, timeout=timeout, run_dir=run_dir)


def may_send_early(edges: Sequence[Edge], device: torch.device) -> bool:
    """Whether transfers over ``edges`` may be asked for before their tensors are made.

    On GPUs, where both backends wait for the sender's word with a thread asleep at a socket. On a CPU a stage is done
    when it is launched, and there is nothing to be early for.
    """
    return bool(edges) and device.type == "cuda"


def choose_backend(wanted: str, edge: Edge, device: torch.device) -> Backend:
    """Both ends of an edge come to the same answer: rank r of a host has GPU r, and every rank sees all GPUs."""
    if wanted != "auto":
        return "cuda_ipc" if wanted == "cuda_ipc" else "torch"
    if device.type == "cuda" and torch.cuda.can_device_access_peer(edge.dst, edge.src):
        return "cuda_ipc"
    return "torch"
