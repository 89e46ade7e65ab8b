"""Split a transformer over the ranks of the default process group with diffusers' own plans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import context_parallel, tensor_parallel
from diffusers.models._modeling_parallel import TensorParallelConfig


def enable_parallel(transformer: Any, *, sp: int, tp: int, device: torch.device) -> None:
    """Ulysses sequence parallelism (``sp`` > 1) or tensor parallelism (``tp`` > 1), once per transformer.

    ``card.check_parallel`` has refused what has no plan, and both at once.
    """
    if sp == 1 and tp == 1:
        return
    config = (
        # "anything": plain Ulysses asserts that every sequence divides by the degree (512 text tokens by 3: not)
        ContextParallelConfig(ulysses_degree=sp, ulysses_anything=True)
        if sp > 1
        else TensorParallelConfig(tp_degree=tp)
    )
    if device.type == "cpu":
        context_parallel._all_gather_anything = _gather_by_padding
    with _cpu_allowed(device):
        transformer.enable_parallelism(config=config)


@contextmanager
def _cpu_allowed(device: torch.device) -> Iterator[None]:
    """diffusers divides by the number of accelerators, which is 0 without one, and refuses tensor parallelism there."""
    if device.type != "cpu":
        yield
        return
    count_devices, tp_devices = torch.accelerator.device_count, tensor_parallel._SUPPORTED_TP_DEVICES
    torch.accelerator.device_count = lambda: 1
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    try:
        yield
    finally:
        torch.accelerator.device_count = count_devices
        tensor_parallel._SUPPORTED_TP_DEVICES = tp_devices


def _gather_by_padding(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate along ``dim`` the parts that all ranks hold, whatever their sizes.

    Takes the place of diffusers' own gather on the CPU: gloo gathers parts of one size only.
    """
    sizes = context_parallel.gather_size_by_comm(tensor.shape[dim], group)
    shape = list(tensor.shape)
    shape[dim] = max(sizes)
    padded = tensor.new_zeros(shape)
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=dim)
