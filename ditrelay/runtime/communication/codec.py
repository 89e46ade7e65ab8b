"""A request's state <-> a payload: one header and a flat list of contiguous tensors. The only serializer of tensors."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

import msgspec
import torch

from ditrelay.errors import CodecError, TransferCorrupt
from ditrelay.runtime.payloads import (
    SCHEMA_VERSION,
    UNREADABLE,
    FieldSpec,
    JsonValue,
    Payload,
    PayloadHeader,
    State,
    StateValue,
    TensorSpec,
)

# Quantized dtypes carry scales outside of their bytes, so their bytes alone are not the value.
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        str(dtype).removeprefix("torch."): dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
    }
)

_MAX_ELEMENTS = 1 << 48


def encode_state(state: State, *, batch_id: str, request_ids: Sequence[str], checksum: bool = False) -> Payload:
    """Turn named values into a header and tensors, in the order of ``state``.

    Contiguous tensors are not copied: the payload shares their memory, and nobody may write to it before the transfer
    is complete. With ``checksum`` a CRC-32 over all bytes goes into the header (about 0.2 ms per MB; for debugging).

    Raises:
        CodecError: a value is neither a dense tensor, a list of those, nor JSON data.
    """
    fields: list[FieldSpec] = []
    tensors: list[torch.Tensor] = []
    for name, entry in state.items():
        field, own = _encode_field(name, entry)
        fields.append(field)
        tensors.extend(own)
    header = PayloadHeader(
        batch_id=batch_id,
        request_ids=tuple(request_ids),
        fields=tuple(fields),
        tensors=tuple(TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch."), t.nbytes) for t in tensors),
        nbytes=sum(t.nbytes for t in tensors),
        checksum=_crc32(tensors) if checksum else None,
    )
    return Payload(header, tuple(tensors))


def decode_payload(payload: Payload) -> State:
    """The state that was encoded; tensors share the payload's memory.

    Raises:
        CodecError: the header is of another schema version, or does not fit the tensors.
    """
    header = payload.header
    _check_header(header)
    if len(payload.tensors) != len(header.tensors):
        raise CodecError(f"{header.batch_id}: header of {len(header.tensors)} tensors came with {len(payload.tensors)}")
    rest = iter(payload.tensors)
    return {field.name: StateValue(_decode_field(field, rest), field.kwargs_type) for field in header.fields}


def allocate(header: PayloadHeader, device: torch.device | str) -> tuple[torch.Tensor, ...]:
    """Uninitialized tensors that fit ``header`` exactly, to receive into.

    Raises:
        CodecError: the header contradicts itself or names a dtype that this torch does not have.
    """
    _check_header(header)
    return tuple(torch.empty(spec.shape, dtype=_DTYPES[spec.dtype], device=device) for spec in header.tensors)


def verify(payload: Payload, *, edge: str = "?", seq: int | None = None) -> None:
    """Compare the tensors' bytes with the header's checksum; nothing to do where it has none.

    Raises:
        TransferCorrupt: they differ.
    """
    expected = payload.header.checksum
    if expected is None:
        return
    found = _crc32(payload.tensors)
    if found != expected:
        reason = f"the bytes received have checksum {found:08x}, those sent had {expected:08x}"
        raise TransferCorrupt(edge, reason, seq=seq, request_id=payload.header.batch_id)


def wire_view(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor as a flat uint8 tensor that shares its memory."""
    return tensor.view(-1).view(torch.uint8)


def _encode_field(name: str, entry: StateValue) -> tuple[FieldSpec, list[torch.Tensor]]:
    value, kwargs_type = entry.value, entry.kwargs_type
    if isinstance(value, torch.Tensor):
        return FieldSpec(name, "tensor", kwargs_type, 1), [_dense(name, value)]
    if isinstance(value, list) and value and any(isinstance(item, torch.Tensor) for item in value):
        own = [_dense(name, item) for item in value]
        return FieldSpec(name, "tensors", kwargs_type, len(own)), own
    return FieldSpec(name, "json", kwargs_type, json=_encode_json(name, value)), []


def _dense(name: str, value: object) -> torch.Tensor:
    """``value`` as a contiguous tensor without autograd history, whose bytes are its value."""
    if not isinstance(value, torch.Tensor):
        _refuse(name, f"a {type(value).__name__} in a list of tensors")
    if value.layout is not torch.strided or value.is_nested or value.is_meta:
        _refuse(name, f"a tensor that is not dense ({value.layout}, device {value.device})")
    if str(value.dtype).removeprefix("torch.") not in _DTYPES:
        _refuse(name, f"a tensor of {value.dtype}")
    return value.detach().resolve_conj().resolve_neg().contiguous()


def _encode_json(name: str, value: object) -> bytes:
    _check_json(name, value)
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError as error:
        raise CodecError(f"{name}: text that is not valid Unicode can not cross an edge ({error})") from error


def _check_json(name: str, value: object) -> None:
    """Refuse what would come back as something else: tuples, NaN (becomes null), enums, keys that are no strings."""
    if type(value) is list:
        for item in value:
            _check_json(name, item)
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                _refuse(name, f"a dict key of type {type(key).__name__}")
            _check_json(name, item)
    elif type(value) is float:
        if not math.isfinite(value):
            _refuse(name, f"the float {value}")
    elif value is not None and type(value) not in (bool, int, str):
        _refuse(name, f"a {type(value).__name__}")


def _refuse(name: str, what: str) -> NoReturn:
    raise CodecError(f"{name}: {what} can not cross an edge; use a tensor, a list of tensors, or plain JSON data")


def _decode_field(field: FieldSpec, rest: Iterable[torch.Tensor]) -> torch.Tensor | list[torch.Tensor] | JsonValue:
    if field.kind == "json":
        try:
            value: JsonValue = msgspec.json.decode(field.json)
        except UNREADABLE as error:
            raise CodecError(f"{field.name}: its JSON data can not be read ({error})") from error
        return value
    own = [tensor for _, tensor in zip(range(field.count), rest, strict=False)]
    return own[0] if field.kind == "tensor" else own


def _check_header(header: PayloadHeader) -> None:
    """Everything that the receiver relies on when it allocates and hands tensors out."""
    if header.schema_version != SCHEMA_VERSION:
        raise CodecError(f"{header.batch_id}: schema {header.schema_version}, this rank speaks {SCHEMA_VERSION}")
    for spec in header.tensors:
        if spec.dtype not in _DTYPES:
            raise CodecError(f"{header.batch_id}: this torch ({torch.__version__}) has no dtype {spec.dtype!r}")
        if not _is_possible(spec.shape) or spec.nbytes != math.prod(spec.shape) * _DTYPES[spec.dtype].itemsize:
            raise CodecError(f"{header.batch_id}: {spec} contradicts itself")
    if header.nbytes != sum(spec.nbytes for spec in header.tensors):
        raise CodecError(f"{header.batch_id}: {header.nbytes} bytes announced, its tensors have another sum")
    counts = {"tensor": lambda n: n == 1, "tensors": lambda n: n > 0, "json": lambda n: n == 0}
    if not all(counts[field.kind](field.count) for field in header.fields):
        raise CodecError(f"{header.batch_id}: a field's tensor count does not fit its kind")
    if sum(field.count for field in header.fields) != len(header.tensors):
        raise CodecError(f"{header.batch_id}: its fields do not add up to its {len(header.tensors)} tensors")


def _is_possible(shape: Sequence[int]) -> bool:
    """Whether torch can make such a tensor; one without elements may not have sides beyond all bounds either."""
    return all(size >= 0 for size in shape) and math.prod(size for size in shape if size) <= _MAX_ELEMENTS


def _crc32(tensors: Iterable[torch.Tensor]) -> int:
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(wire_view(tensor).cpu().numpy().data, crc)
    return crc
