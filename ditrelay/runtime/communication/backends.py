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

    ``run_dir`` is as for ``CudaIpcTransport.connect``; the other arguments and the errors are those of
    ``TorchTransport.connect``.
    """
    if choose_backend(wanted, edge, device) == "cuda_ipc":
        return CudaIpcTransport.connect(store, edge, generation, rank, device=device, timeout=timeout, run_dir=run_dir)
    return TorchTransport.connect(store, edge, generation, rank, device=device, timeout=timeout)


def may_send_early(wanted: str, edges: Sequence[Edge], device: torch.device) -> bool:
    """Whether transfers over ``edges`` may be asked for before their tensors are made.

    Only where what waits is a thread asleep at a socket, as over CUDA IPC. A posted NCCL receive is a kernel: for as
    long as its send does not come it holds SMs, and so slows the denoise that runs there.
    """
    return bool(edges) and all(choose_backend(wanted, edge, device) == "cuda_ipc" for edge in edges)


def choose_backend(wanted: str, edge: Edge, device: torch.device) -> Backend:
    """Both ends of an edge come to the same answer: rank r of a host has GPU r, and every rank sees all GPUs."""
    if wanted != "auto":
        return "cuda_ipc" if wanted == "cuda_ipc" else "torch"
    if device.type == "cuda" and torch.cuda.can_device_access_peer(edge.dst, edge.src):
        return "cuda_ipc"
    return "torch"
