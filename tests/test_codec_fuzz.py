"""Headers and payloads made of anything: an error or an exact result, never a crash or memory beyond what was told."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditrelay.errors import CodecError
from ditrelay.runtime.communication.codec import allocate, decode_payload, encode_state, verify
from ditrelay.runtime.payloads import FieldSpec, Payload, PayloadHeader, StateValue, TensorSpec

BYTES_LIMIT = 1 << 20
SIZES = st.one_of(st.integers(0, 4), st.integers(-(2**63), 2**64 - 1))
DTYPES = st.one_of(st.sampled_from(["float32", "bfloat16", "uint8", "complex64", "bool", "qint8", "float"]), st.text())
SHAPES = st.lists(SIZES, max_size=4).map(tuple)
COUNTS = st.one_of(st.integers(0, 4), st.integers(-(2**63), 2**63 - 1))


@st.composite
def honest_specs(draw: st.DrawFn) -> TensorSpec:
    """A spec whose bytes are those of its shape, however large."""
    shape = draw(SHAPES)
    nbytes = 4
    for size in shape:
        nbytes *= size
    return TensorSpec(shape, "float32", nbytes)


TENSORS = st.lists(st.one_of(honest_specs(), st.builds(TensorSpec, SHAPES, DTYPES, COUNTS)), max_size=3).map(tuple)
JSON_BYTES = st.one_of(st.just(b"1"), st.binary(max_size=20), st.just(b"[" * 5000), st.just(b'"\xff"'))
NAMES, KINDS = st.text(max_size=5), st.sampled_from(["tensor", "tensors", "json"])
ANY_FIELDS = st.lists(st.builds(FieldSpec, NAMES, KINDS, st.none() | NAMES, COUNTS, JSON_BYTES), max_size=3).map(tuple)


@st.composite
def fitting_fields(draw: st.DrawFn, tensors: int) -> tuple[FieldSpec, ...]:
    """Fields that add up to so many tensors, and one of JSON data."""
    rest, fields = tensors, [FieldSpec("json", "json", json=draw(JSON_BYTES))]
    while rest:
        count = draw(st.integers(1, rest))
        fields.append(FieldSpec(f"f{rest}", "tensor" if count == 1 else "tensors", None, count))
        rest -= count
    return tuple(fields)


@st.composite
def headers(draw: st.DrawFn, fitting: bool = False) -> PayloadHeader:
    tensors = draw(st.lists(honest_specs(), max_size=3).map(tuple) if fitting else TENSORS)
    total = sum(spec.nbytes for spec in tensors)
    return PayloadHeader(
        batch_id="r1",
        request_ids=("r1",),
        fields=draw(st.one_of(fitting_fields(len(tensors)), *([] if fitting else [ANY_FIELDS]))),
        tensors=tensors,
        nbytes=total if fitting else draw(st.one_of(st.just(total), COUNTS)),
        checksum=draw(st.none() | st.integers(0, 2**32 - 1)),
        schema_version=draw(st.sampled_from([1, 1, 1, 2])),
    )


ANY_HEADERS = st.one_of(headers(), headers(fitting=True))


@settings(max_examples=500, deadline=None)
@given(ANY_HEADERS)
def test_any_header_allocates_exactly_what_it_says_or_is_refused(header: PayloadHeader) -> None:
    if header.nbytes > BYTES_LIMIT:  # what the head never lets pass (--max-pending-bytes)
        return
    try:
        tensors = allocate(header, "cpu")
    except CodecError:
        return
    assert [tuple(tensor.shape) for tensor in tensors] == [spec.shape for spec in header.tensors]
    assert sum(tensor.nbytes for tensor in tensors) == header.nbytes <= BYTES_LIMIT


@settings(max_examples=500, deadline=None)
@given(ANY_HEADERS, st.lists(st.integers(0, 64), max_size=3))
def test_any_payload_is_decoded_or_refused(header: PayloadHeader, sizes: list[int]) -> None:
    payload = Payload(header, tuple(torch.zeros(size, dtype=torch.uint8) for size in sizes))
    try:
        state = decode_payload(payload)
    except CodecError:
        return
    assert list(state) == list(dict.fromkeys(field.name for field in header.fields))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
VALUES = st.one_of(
    JSON,
    st.lists(st.integers(0, 255), max_size=8).map(lambda data: torch.tensor(data, dtype=torch.uint8)),
    st.lists(st.lists(st.floats(width=32), max_size=4).map(torch.tensor), min_size=1, max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=4))
def test_any_state_comes_back_as_it_was_or_is_refused_by_name(values: dict[str, object]) -> None:
    try:
        payload = encode_state(
            {name: StateValue(value) for name, value in values.items()},
            batch_id="r1",
            request_ids=("r1",),
            checksum=True,
        )
    except CodecError as error:
        assert any(str(error).startswith(f"{name}:") for name in values)
        return
    header = msgspec.msgpack.decode(msgspec.msgpack.encode(payload.header), type=PayloadHeader)
    copy = Payload(header, payload.tensors)
    verify(copy)
    back = {name: entry.value for name, entry in decode_payload(copy).items()}
    assert list(back) == list(values)
    for name, value in values.items():
        assert same(back[name], value)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


@pytest.mark.parametrize("shape", [(2**63, 0), (2**40, 2**40, 0), (0, 2**64 - 1)])
def test_an_empty_tensor_of_an_impossible_shape_is_refused(shape: tuple[int, ...]) -> None:
    header = PayloadHeader("r1", ("r1",), (FieldSpec("x", "tensor", None, 1),), (TensorSpec(shape, "float32", 0),), 0)
    with pytest.raises(CodecError):
        allocate(header, "cpu")
