"""A request's state as a file: safetensors with a JSON header, and a checksum where it must not be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from ditrelay.errors import CodecError, TransferCorrupt
from ditrelay.runtime.communication.codec import decode_payload, encode_state, verify
from ditrelay.runtime.payloads import UNREADABLE, Payload, PayloadHeader, State, StateValue

# What ``load`` may raise.
DAMAGED = (
    *UNREADABLE,
    OSError,
    SafetensorError,
    CodecError,
    TransferCorrupt,
    RuntimeError,  # torch opens the file once more, by its name: it may be gone by then
    KeyError,
    TypeError,
    ValueError,
)
# What ``save`` may raise.
NOT_WRITTEN = (OSError, SafetensorError, CodecError)


def save(path: Path, request_id: str, state: State, *, checksum: bool = True) -> None:
    """Write the state; its tensors are on the host.

    safetensors' own writing goes through a file whose name it draws, which would stay when the process is killed.
    """
    payload = encode_state(state, batch_id=request_id, request_ids=[request_id], checksum=checksum)
    tensors = {str(number): tensor for number, tensor in enumerate(payload.tensors)}
    path.write_bytes(to_bytes(tensors, metadata={"header": msgspec.json.encode(payload.header).decode()}))


def load(path: Path, request_id: str) -> State:
    """The state that was written for this request."""
    with safe_open(path, framework="pt") as file:
        header = msgspec.json.decode(file.metadata()["header"], type=PayloadHeader)
        payload = Payload(header, tuple(file.get_tensor(str(number)) for number in range(len(header.tensors))))
    if header.batch_id != request_id:
        raise CodecError(f"it is of request {header.batch_id}")
    verify(payload)
    return decode_payload(payload)


def to_host(state: State) -> State:
    """A copy that no step writes to; what comes from a device is valid once that has done its part."""
    return {name: StateValue(_copy(entry.value), entry.kwargs_type) for name, entry in state.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type == "cpu":
        return value.clone(memory_format=torch.contiguous_format)
    pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return pinned.copy_(value, non_blocking=True)
