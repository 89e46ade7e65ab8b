"""What crosses an edge: a header (control plane) and a flat list of tensors (data plane)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1

# What msgspec raises for bytes that are not what was asked for: it lets bad UTF-8 and deep nesting through as they are.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

FieldKind = Literal["tensor", "tensors", "json"]
JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """One tensor on the wire: ``dtype`` is torch's own name without the prefix (``bfloat16``)."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class FieldSpec(msgspec.Struct, frozen=True, array_like=True):
    """One named value: a tensor, a list of tensors, or JSON data carried in the header itself.

    ``count`` tensors of the payload belong to this field, in order. ``kwargs_type`` is the group under which a
    diffusers block looks the value up (for instance ``denoiser_input_fields``).
    """

    name: str
    kind: FieldKind
    kwargs_type: str | None = None
    count: int = 0
    json: bytes = b""


class PayloadHeader(msgspec.Struct, frozen=True):
    """Describes a payload so that the receiver can allocate exactly, before the first byte of it moves.

    Attributes:
        batch_id: names the payload; with one request in a batch, its request id.
        request_ids: the requests whose tensors these are.
        fields: the named values.
        tensors: every tensor in sending order.
        nbytes: bytes of all tensors.
        checksum: CRC-32 over all tensor bytes in order, or ``None`` when checksums are off.
        schema_version: version of this layout; a receiver refuses another one.
    """

    batch_id: str
    request_ids: tuple[str, ...]
    fields: tuple[FieldSpec, ...]
    tensors: tuple[TensorSpec, ...]
    nbytes: int
    checksum: int | None = None
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class StateValue:
    """One value of a request's state between stages."""

    value: torch.Tensor | list[torch.Tensor] | JsonValue
    kwargs_type: str | None = None


# A request's state between two stages: what one stage hands to the next.
State = dict[str, StateValue]


@dataclass(frozen=True)
class Payload:
    """A header with its tensors, in the header's order, all contiguous."""

    header: PayloadHeader
    tensors: tuple[torch.Tensor, ...]
