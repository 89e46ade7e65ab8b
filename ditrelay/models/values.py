"""Between diffusers' values and those that may cross an edge."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from ditrelay.errors import CodecError
from ditrelay.runtime.payloads import JsonValue, StateValue
from ditrelay.runtime.request import Request

_DTYPE_KEY = "torch.dtype"  # blocks hand a dtype on; it travels as {"torch.dtype": "bfloat16"}
_GENERATOR_KEY = "torch.Generator"  # its state, as text: a tensor would go over the device, and be waited for


def only(requests: Sequence[Request]) -> Request:
    """The one request of a batch. Raises ``ValueError`` for a batch of another length."""
    if len(requests) != 1:
        raise ValueError(f"a batch of one request is needed, got {len(requests)}")
    return requests[0]


def pack(name: str, value: Any, kwargs_type: str | None = None) -> StateValue:
    """``value`` as it may cross an edge: a tensor, a list of tensors, or JSON data (also a dtype, a CPU generator).

    Raises:
        CodecError: it is none of these.
    """
    if isinstance(value, torch.Tensor):
        return StateValue(value, kwargs_type)
    if isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value):
        if not all(isinstance(item, torch.Tensor) for item in value):
            raise CodecError(f"{name}: a list of tensors holds something else too")
        return StateValue(list(value), kwargs_type)
    if isinstance(value, torch.dtype):
        return StateValue({_DTYPE_KEY: str(value).removeprefix("torch.")}, kwargs_type)
    if isinstance(value, torch.Generator):
        state = zlib.compress(value.get_state().numpy().tobytes())
        return StateValue({_GENERATOR_KEY: base64.b64encode(state).decode("ascii")}, kwargs_type)
    return StateValue(_json(name, value), kwargs_type)


def unpack(value: StateValue, device: torch.device) -> Any:
    """What ``pack`` was given, its tensors on ``device``."""
    content = value.value
    if isinstance(content, torch.Tensor):
        return content.to(device)
    if isinstance(content, list):
        return [item.to(device) if isinstance(item, torch.Tensor) else item for item in content]
    if isinstance(content, dict) and set(content) == {_DTYPE_KEY}:
        return getattr(torch, str(content[_DTYPE_KEY]))
    if isinstance(content, dict) and set(content) == {_GENERATOR_KEY}:
        state = zlib.decompress(base64.b64decode(str(content[_GENERATOR_KEY])))
        return torch.Generator("cpu").set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return content


def _json(name: str, value: Any) -> JsonValue:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [_json(name, item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _json(name, item) for key, item in value.items()}
    raise CodecError(f"{name}: a {type(value).__name__} can't cross an edge; tensors and JSON data can")
