"""Whatever a state holds comes out of the codec as it went in, or is refused by name."""

from __future__ import annotations

import enum

import msgspec
import pytest
import torch

from ditrelay.errors import CodecError, TransferCorrupt
from ditrelay.runtime.communication.codec import allocate, decode_payload, encode_state, verify, wire_view
from ditrelay.runtime.payloads import Payload, PayloadHeader, State, StateValue

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
]


def encode(state: State, *, checksum: bool = False) -> Payload:
    return encode_state(state, batch_id="b", request_ids=["b"], checksum=checksum)


def over_the_wire(payload: Payload) -> Payload:
    """What a receiver has: a header that went through msgpack, and the bytes in tensors that it allocated."""
    header = msgspec.msgpack.decode(msgspec.msgpack.encode(payload.header), type=PayloadHeader)
    tensors = allocate(header, "cpu")
    for source, target in zip(payload.tensors, tensors, strict=True):
        wire_view(target).copy_(wire_view(source))
    return Payload(header, tensors)


def round_trip(value: object) -> object:
    return decode_payload(over_the_wire(encode({"x": StateValue(value)})))["x"].value  # type: ignore[arg-type]


def same(a: torch.Tensor, b: object) -> bool:
    assert isinstance(b, torch.Tensor)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(wire_view(a.contiguous()), wire_view(b))


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of any dtype, made of random bytes that are valid for it."""
    count = torch.Size(shape).numel() * dtype.itemsize
    limit = 2 if dtype is torch.bool else 256
    data = torch.randint(0, limit, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return data.view(dtype).view(shape)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4), (1,)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = some(dtype, *shape)
    assert same(tensor, round_trip(tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.arange(12)[::3],
        torch.arange(3.0).expand(4, 3),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex64).conj().imag,
        torch.nn.Parameter(torch.randn(3)),
    ],
    ids=["transposed", "strided", "expanded", "channels_last", "conjugated", "negated", "parameter"],
)
def test_tensors_in_unusual_memory_come_back_by_value(tensor: torch.Tensor) -> None:
    back = round_trip(tensor)
    assert isinstance(back, torch.Tensor)
    assert torch.equal(back, tensor.detach()) and not back.requires_grad


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -(2**40), 2**70, 0.1 + 0.2, -0.0, 1e300, "", "ünï ☃", [], [1, [2.5, None]], {}, {"a": {"b": [1]}}],
    ids=repr,
)
def test_json_values_come_back_with_their_types(value: object) -> None:
    assert repr(round_trip(value)) == repr(value)


def test_lists_of_tensors_keep_order_and_length() -> None:
    value = [torch.arange(3), torch.empty(0), torch.tensor(7.0)]
    back = round_trip(value)
    assert isinstance(back, list) and all(same(a, b) for a, b in zip(value, back, strict=True))
    assert isinstance(round_trip([torch.ones(1)]), list), "a list of one tensor stays a list"


def test_a_whole_state_keeps_names_order_and_groups() -> None:
    state: State = {
        "embeds": StateValue(torch.ones(2), "denoiser_input_fields"),
        "size": StateValue(3),
        "masks": StateValue([torch.ones(1), torch.zeros(2)]),
        "none": StateValue(None, "group"),
    }
    back = decode_payload(over_the_wire(encode(state)))
    assert list(back) == list(state)
    assert [entry.kwargs_type for entry in back.values()] == ["denoiser_input_fields", None, None, "group"]
    assert [type(entry.value) for entry in back.values()] == [torch.Tensor, int, list, type(None)]


def test_contiguous_tensors_are_not_copied() -> None:
    tensor = torch.randn(4, 4)
    (sent,) = encode({"x": StateValue(tensor[1:])}).tensors
    assert sent.data_ptr() == tensor[1:].data_ptr() and wire_view(sent).data_ptr() == sent.data_ptr()


def test_the_header_tells_the_bytes() -> None:
    header = encode({"a": StateValue(torch.ones(3)), "b": StateValue([torch.ones(2, dtype=torch.bool)])}).header
    assert header.nbytes == 14 and [spec.nbytes for spec in header.tensors] == [12, 2]


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [
        object(),
        (1, 2),
        {1: "a"},
        {"a": torch.ones(1)},
        [torch.ones(1), 2],
        float("nan"),
        [float("inf")],
        b"bytes",
        Colour.RED,
        "\ud800",
        torch.ones(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_values_that_would_change_on_the_way_are_refused_by_name(value: object) -> None:
    with pytest.raises(CodecError, match="^my_field: .* can not cross an edge"):
        encode({"my_field": StateValue(value)})  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_are_refused() -> None:
    with pytest.raises(CodecError, match="quint8"):
        encode({"x": StateValue(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8))})


def test_a_checksum_finds_one_flipped_bit() -> None:
    received = over_the_wire(encode({"a": StateValue(torch.randn(100)), "b": StateValue(torch.ones(3))}, checksum=True))
    verify(received)
    wire_view(received.tensors[1])[5] ^= 1
    with pytest.raises(TransferCorrupt, match=r"3->0 #7 of request b: .*checksum"):
        verify(received, edge="3->0", seq=7)


def test_without_a_checksum_nothing_is_verified() -> None:
    payload = encode({"a": StateValue(torch.ones(3))})
    assert payload.header.checksum is None
    verify(payload)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema 99"),
        ({"nbytes": 1}, "announced"),
        ({"tensors": ()}, "announced|add up"),
        ({"fields": ()}, "do not add up"),
    ],
    ids=["version", "nbytes", "tensors", "fields"],
)
def test_headers_that_contradict_themselves_are_refused(change: dict[str, object], message: str) -> None:
    header = msgspec.structs.replace(encode({"x": StateValue(torch.ones(2))}).header, **change)
    with pytest.raises(CodecError, match=message):
        allocate(header, "cpu")
    with pytest.raises(CodecError, match=message):
        decode_payload(Payload(header, (torch.ones(2),)))


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float"}, {"dtype": "evil"}, {"shape": (3,)}, {"shape": (-2, -1)}, {"nbytes": 7}],
    ids=str,
)
def test_tensor_specs_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    header = encode({"x": StateValue(torch.ones(2))}).header
    spec = msgspec.structs.replace(header.tensors[0], **change)
    with pytest.raises(CodecError):
        allocate(msgspec.structs.replace(header, tensors=(spec,)), "cpu")


def test_a_payload_with_a_tensor_missing_is_refused() -> None:
    with pytest.raises(CodecError, match="1 tensors came with 0"):
        decode_payload(Payload(encode({"x": StateValue(torch.ones(2))}).header, ()))
