"""Copies from the host that don't hold up the thread that launches them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class AsyncUploads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block, ``cpu_tensor.to("cuda")`` goes through pinned memory and returns at once.

    Copied as usual, from pageable memory, it first waits for all that is on the stream. A denoise is prepared while the
    one before still computes, so that its handful of small copies would leave the device idle until the next step is
    launched. torch keeps the pinned memory until the copy is done.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and _is_upload(args[0], options):
            source = args[0] if options.get("dtype") is None else args[0].to(options["dtype"])
            return func(source.contiguous().pin_memory(), **options | {"non_blocking": True})
        return func(*args, **options)


def _is_upload(source: torch.Tensor, options: Mapping[str, Any]) -> bool:
    device = options.get("device")
    return source.device.type == "cpu" and device is not None and torch.device(device).type == "cuda"
