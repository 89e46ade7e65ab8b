"""Components with random weights, built from their configs: real sizes and real speed without any weight file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights

_SEED = 20240229  # of every component, so that all ranks have the same weights


def build_dummy(
    cls: Any, folder: Path, *, dtype: torch.dtype, device: torch.device, home: torch.device | None = None
) -> torch.nn.Module:
    """A model of class ``cls`` with the config in ``folder``, as ``from_pretrained`` would give it.

    Biases are 0, norms 1, other weights normal with variance 1 / fan-in: activations neither vanish nor explode. Made
    on the device, in the final dtype and the same on every rank (a CPU and a GPU draw different numbers). What a model
    computes when it is constructed (rotary tables and the like) is real.

    Args:
        home: where the tensors stay; each is drawn on ``device`` before it goes there.
    """
    home = home or device
    model = skeleton(cls, folder, dtype=dtype)
    generator = torch.Generator(device).manual_seed(_SEED)
    in_float32 = _kept_in_float32(model, dtype)
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # a tensor that two modules share stays one
    for path, owner in model.named_modules():
        for name, empty in list(owner.named_parameters(recurse=False)):
            if empty not in made:
                kept = not in_float32.isdisjoint((*path.split("."), name))
                drawn = _random(name, empty.shape, torch.float32 if kept else dtype, generator)
                made[empty] = torch.nn.Parameter(drawn.to(home), requires_grad=False)
            setattr(owner, name, made[empty])
        _cast_saved_buffers(owner, dtype)
    return model.to(home).eval()


def skeleton(cls: Any, folder: Path, *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model with its parameters on the meta device (no bytes) and its buffers computed."""
    model: torch.nn.Module
    with init_empty_weights(include_buffers=False), _default_dtype(dtype):
        if issubclass(cls, transformers.PreTrainedModel):
            model = cls(cls.config_class.from_pretrained(str(folder), local_files_only=True))
        else:
            model = cls.from_config(cls.load_config(str(folder), local_files_only=True))
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()  # undone by the context above, which replaces every parameter
    return model


def _random(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=generator.device)
    if name.endswith("bias"):
        tensor.zero_()
    elif tensor.ndim < 2 or name == "gamma":  # gamma: the norms of Wan's VAE, [channels, 1, 1, 1]
        tensor.fill_(1.0)
    else:
        tensor.normal_(std=1 / math.sqrt(tensor[0].numel()), generator=generator)
    return tensor


def _kept_in_float32(model: Any, dtype: torch.dtype) -> set[str]:
    """Names of modules and parameters that ``from_pretrained`` keeps in float32 whatever dtype is asked for."""
    if isinstance(model, transformers.PreTrainedModel):
        return set(model._get_dtype_plan(dtype))
    return set(model._keep_in_fp32_modules or ())


def _cast_saved_buffers(owner: torch.nn.Module, dtype: torch.dtype) -> None:
    """Buffers that are part of a checkpoint get its dtype when it is loaded; the others stay as constructed."""
    for name, buffer in list(owner.named_buffers(recurse=False)):
        if buffer.is_floating_point() and name not in owner._non_persistent_buffers_set:
            setattr(owner, name, buffer.to(dtype))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
