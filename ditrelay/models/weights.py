"""Tensors in a component's weight files that its class has no place for: what may be left out, and what may not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ditrelay.errors import UnsupportedModel
from ditrelay.models.folder import tensor_names

# The last part of a name, or a part in the middle -> what such tensors are.
_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "weight_scale": "scaled fp8 weights",
        "weight_scale_2": "scaled fp4 weights",
        "scale_weight": "scaled fp8 weights",
        "input_scale": "scaled fp8 weights",
        "scale_input": "scaled fp8 weights",
        "absmax": "quantized weights (bitsandbytes)",
        "SCB": "quantized weights (bitsandbytes)",
        "qweight": "quantized weights",
        "qzeros": "quantized weights",
        "lora_A": "a LoRA",
        "lora_B": "a LoRA",
        "lora_down": "a LoRA",
        "lora_up": "a LoRA",
        "lora_magnitude_vector": "a LoRA",
    }
)


def check_all_used(model: Any, path: Path, unused: Collection[str], *, whole: bool) -> None:
    """Refuse weights of which a part would be left out, so that the rest draws something else than was meant.

    A model whose matrices are scaled, quantized or adapted by further tensors loads without them, and draws noise.

    Args:
        model: as it was loaded.
        path: the component's folder.
        unused: names that the library did not load, less those that it leaves out by its own rules.
        whole: the files hold this model and nothing else. Otherwise they may hold more than its class has (a decoder,
            a head, the half that sees pictures), but nothing further in the parts that it has.

    Raises:
        UnsupportedModel: names the first such tensor, its file and how many there are.
    """
    recomputed = {name for name, _ in model.named_buffers()}
    unknown = sorted(name for name in unused if name not in recomputed and (whole or _belongs_to(model, name)))
    if not unknown:
        return
    kind = next((_KINDS[part] for name in unknown for part in reversed(name.split(".")) if part in _KINDS), None)
    reason = f"; {kind} can't be used" if kind else ""
    raise UnsupportedModel(
        f"{_file_of(path, unknown[0])} has {len(unknown)} tensors that {type(model).__name__} does not know, "
        f"for instance {unknown[0]}{reason}; allowed: weights without further tensors"
    )


def _belongs_to(model: Any, name: str) -> bool:
    """Whether a tensor lies inside one of the model's own parts, and not in one that the class does not have."""
    prefix = f"{model.base_model_prefix}."
    return any(len(way) > 1 and _has(model, way[0]) for way in (name.split("."), name.removeprefix(prefix).split(".")))


def _has(model: Any, part: str) -> bool:
    return any(name == part for name, _ in model.named_children())


def _file_of(path: Path, name: str) -> Path:
    """The weight file with a tensor of that name, which libraries may lengthen or shorten at its start."""
    for file, names in tensor_names(path):
        if any(f".{own}".endswith(f".{name}") or f".{name}".endswith(f".{own}") for own in names):
            return file
    return path
