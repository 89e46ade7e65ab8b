"""Weights that live in host memory and are on the device only while they are needed."""

from __future__ import annotations

import threading
from typing import Any

import torch

OFFLOADABLE = ("text_encoder", "vae", "dit")


def offload_name(component: str) -> str | None:
    """Which of ``OFFLOADABLE`` a component belongs to; the encoders of pictures count among the text encoders."""
    if component.startswith(("text_encoder", "image_encoder")):
        return "text_encoder"
    return {"vae": "vae", "transformer": "dit"}.get(component)


class Parked:
    """A component that is on the device inside a ``with`` block only, one block at a time.

    The copies to the device go out on the current stream, from pinned memory on a GPU. Weights don't change, so that
    leaving the block copies nothing back: the device memory is given up, to be used again in the order of that stream.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        """Takes ``module`` with all its tensors in host memory."""
        self._device = device
        self._lock = threading.Lock()
        pin = device.type == "cuda"
        self._tensors = [*module.parameters(), *module.buffers()]
        self._homes = [tensor.data.pin_memory() if pin else tensor.data for tensor in self._tensors]
        self._restore()

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            for tensor, home in zip(self._tensors, self._homes, strict=True):
                tensor.data = home.to(self._device, non_blocking=True)
        except BaseException:  # out of memory half way: nothing may stay behind
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._restore()
        self._lock.release()

    def _restore(self) -> None:
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            tensor.data = home


def offload_blocks(transformer: Any, device: torch.device) -> None:
    """Keep a transformer in host memory; each block is copied to the device while the one before it computes.

    Source: diffusers' group offloading. On the CPU it has the same hooks and copies nothing.
    """
    on_gpu = device.type == "cuda"
    transformer.enable_group_offload(
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=on_gpu,
        record_stream=on_gpu,
        non_blocking=on_gpu,
    )
