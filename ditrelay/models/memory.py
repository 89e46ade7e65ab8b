"""What the steps of a denoise change, as data from which another process can go on.

A loop of diffusers keeps its place in a few objects: the state of its blocks (the latents), its scheduler (the index of
the step, with multistep schedulers also earlier outputs), its noise generator. What differs from how they were before
the first step is all that there is to write down; the rest is made again from the request.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import numpy as np
import torch

from ditrelay.errors import CodecError
from ditrelay.runtime.payloads import JsonValue, State, StateValue

_PLAIN = (bool, int, float, str, type(None))
# Anything else in a scheduler may hold what steps change, unseen.
_TRANSPARENT = (
    *_PLAIN,
    torch.Tensor,
    torch.Generator,
    list,
    tuple,
    dict,
    torch.dtype,
    torch.device,
    np.ndarray,
    np.generic,
)


@dataclass(frozen=True)
class _Part:
    """An object whose attributes the steps may change. ``grows``: those that it gets by a step count, too."""

    grows: bool
    before: Mapping[str, object]

    def changed(self, name: str, now: Mapping[str, object]) -> dict[str, object]:
        opaque = [key for key, value in now.items() if self.grows and not _is_transparent(value)]
        if opaque:
            raise CodecError(f"{name}.{opaque[0]}: a {type(now[opaque[0]]).__name__} may hide what the steps change")
        kept = {key: value for key, value in now.items() if self.grows or key in self.before}
        return {key: value for key, value in kept.items() if not _is_as_before(self.before.get(key, _GONE), value)}


class StepMemory:
    """How a loop's objects were before its first step.

    Args:
        scope: the state of the loop's blocks. What it gets by a step is scratch: every step makes it anew.
        scheduler: the request's own.
    """

    def __init__(self, scope: object, scheduler: object) -> None:
        self._parts = {name: _Part(name != "scope", _marks(whole)) for name, whole in _named(scope, scheduler).items()}

    def changes(self, scope: object, scheduler: object) -> State:
        """What the steps so far have changed. Tensors are not copied.

        Raises:
            CodecError: among it is something that can't be written down; names it.
        """
        writer = _Writer()
        changed: dict[str, JsonValue] = {}
        for name, whole in _named(scope, scheduler).items():
            new = self._parts[name].changed(name, vars(whole))
            changed[name] = {key: writer.attribute(f"{name}.{key}", value) for key, value in new.items()}
        return {"values": StateValue(changed), "tensors": StateValue(writer.tensors)}


def put_back(state: State, scope: object, scheduler: object, device: torch.device) -> None:
    """Give a loop's objects what ``StepMemory.changes`` found, as it may have crossed the codec."""
    changed, tensors = state["values"].value, state["tensors"].value
    if not isinstance(changed, dict) or not isinstance(tensors, list):
        raise CodecError("a checkpoint without values and tensors; it was not written by this version")
    reader = _Reader([tensor for tensor in tensors if isinstance(tensor, torch.Tensor)], device)
    for name, whole in _named(scope, scheduler).items():
        values = changed.get(name, {})
        assert isinstance(values, dict)
        for key, written in values.items():
            reader.put(whole, key, written)


def _named(scope: object, scheduler: object) -> dict[str, object]:
    return {"scope": scope, "scheduler": scheduler}


# ---------------------------------------------------------------- what has changed


def _is_transparent(value: object) -> bool:
    if isinstance(value, FunctionType):
        return value.__closure__ is None  # it has no place in which to keep anything
    return isinstance(value, _TRANSPARENT)


_GONE = object()


@dataclass(frozen=True)
class _Tensor:
    """Weak: the first latents must not live as long as the denoise. torch counts what is written into a tensor."""

    ref: weakref.ref[torch.Tensor]
    version: int


@dataclass(frozen=True)
class _Items:
    """A list, tuple or dict as it was."""

    kind: type
    items: Mapping[object, object]


def _marks(whole: object) -> dict[str, object]:
    return {key: _mark(value) for key, value in vars(whole).items()}


def _mark(value: object) -> object:
    match value:
        case torch.Tensor():
            return _Tensor(weakref.ref(value), value._version)
        case list() | tuple():
            return _Items(type(value), {index: _mark(item) for index, item in enumerate(value)})
        case dict():
            return _Items(type(value), {key: _mark(item) for key, item in value.items()})
        case torch.Generator():
            return _GONE  # it may have been used since, and is small
        case _:
            return value


def _is_as_before(mark: object, value: object) -> bool:
    match mark:
        case _Tensor(ref=ref, version=version):
            return isinstance(value, torch.Tensor) and ref() is value and value._version == version
        case _Items(kind=kind, items=items):
            if type(value) is not kind:
                return False
            now = dict(value) if isinstance(value, dict) else dict(enumerate(value))  # type: ignore[arg-type]
            return now.keys() == items.keys() and all(_is_as_before(items[key], now[key]) for key in items)
        case bool() | int() | float() | str():
            return type(value) is type(mark) and value == mark
        case _:
            return value is mark


# ---------------------------------------------------------------- values as JSON and tensors


@dataclass
class _Writer:
    tensors: list[torch.Tensor] = field(default_factory=list)

    def attribute(self, name: str, value: object) -> JsonValue:
        """JSON that stands for ``value``; the tensors in it go into ``tensors``."""
        if isinstance(value, torch.Generator):
            return {"generator": self._add(value.get_state())}
        return self._write(name, value)

    def _write(self, name: str, value: object) -> JsonValue:
        match value:
            case torch.Tensor():
                # Kernels sum in another order where the same values lie in memory in another one.
                strides = value.stride()
                order = sorted(range(value.dim()), key=lambda dim: -strides[dim])
                number = self._add(value.permute(order))
                return {"tensor": number, "host": value.device.type == "cpu", "order": list(order)}
            case torch.Size():
                return {"size": list(value)}
            case list() | tuple() if type(value) in (list, tuple):
                return {type(value).__name__: [self._write(name, item) for item in value]}
            case dict() if type(value) is dict and all(isinstance(key, str) for key in value):
                return {"dict": {key: self._write(name, item) for key, item in value.items()}}
            case float() if type(value) is float and not math.isfinite(value):
                return {"float": str(value)}
        if type(value) in _PLAIN:
            return value  # type: ignore[return-value]
        raise CodecError(f"{name}: a {type(value).__name__} can't be written to a checkpoint")

    def _add(self, tensor: torch.Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1


@dataclass
class _Reader:
    tensors: list[torch.Tensor]
    device: torch.device

    def put(self, whole: Any, key: str, written: JsonValue) -> None:
        match written:
            case {"generator": int(index)}:  # the request's own; others hold it too
                getattr(whole, key).set_state(self.tensors[index].cpu())
            case _:
                setattr(whole, key, self._read(written))

    def _read(self, written: JsonValue) -> Any:
        match written:
            case {"tensor": int(index), "host": bool(host), "order": list(order)}:
                back = [order.index(dim) for dim in range(len(order))]
                return self.tensors[index].to("cpu" if host else self.device).permute(back)
            case {"size": list(sides)}:
                return torch.Size(int(side) for side in sides)  # type: ignore[arg-type]
            case {"list": list(items)}:
                return [self._read(item) for item in items]
            case {"tuple": list(items)}:
                return tuple(self._read(item) for item in items)
            case {"dict": dict(items)}:
                return {key: self._read(item) for key, item in items.items()}
            case {"float": str(text)}:
                return float(text)
        return written
