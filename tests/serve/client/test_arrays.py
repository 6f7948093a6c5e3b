"""The client's half of the wire against the server's, and against bytes worked out by hand."""

import json
import struct

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_fakes import Affine, Identity

from lepton_xla.errors import InputError
from lepton_xla.serve.client.arrays import read_infer, write_infer
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.protocol.response import write_response
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.protocol.wire import Decoder

DTYPES = [
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64",
    "bfloat16",
]  # fmt: skip


def decoder(servable):
    return Decoder(signature_of(servable), Limits(), 4096)


def array_of(dtype, raw, shape):
    """An array with exactly these bytes, whatever numbers they are."""
    flat = np.frombuffer(raw, np.uint8)
    return (flat & 1 if dtype == "bool" else flat).view(dtype).reshape(shape)


@st.composite
def arrays(draw, dtype):
    rows = draw(st.integers(1, 4))
    size = np.dtype(dtype).itemsize * rows * 3
    array = array_of(dtype, draw(st.binary(min_size=size, max_size=size)), (rows, 3))
    match draw(st.sampled_from(["plain", "transposed", "strided", "swapped", "list"])):
        case "transposed":
            return np.asfortranarray(array)
        case "strided":
            return np.repeat(array, 2, axis=1)[:, ::2]
        case "swapped" if array.dtype.kind in "iuf":
            return array.astype(array.dtype.newbyteorder(">"))
        case "list" if dtype == "bool":
            return array.tolist()
    return array


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_what_is_encoded_is_what_the_server_decodes(dtype, data):
    """Whatever layout and byte order an array has, its C-order little-endian bytes arrive, and go back the same way."""
    array = data.draw(arrays(dtype))
    head, tail = write_infer({"x": array}, data.draw(st.sampled_from([None, ["y"]])), {"timeout": 5})
    request = decoder(Identity(dtype)).decode(head + b"".join(tail), len(head))
    plain = np.asarray(array)
    expected = np.ascontiguousarray(plain.astype(plain.dtype.newbyteorder("<")))
    assert bytes(request.tensors[0]) == expected.tobytes()
    assert request.spec.sizes == {"batch": len(plain)}
    assert request.spec.outputs == ((0, True),)
    answer, rest = write_response(signature_of(Identity(dtype)), request.spec, request.tensors)
    output = read_infer(answer + b"".join(rest), len(answer))["y"]
    assert output.dtype == np.dtype(dtype)
    assert output.shape == plain.shape
    assert output.tobytes() == expected.tobytes()
    assert output.flags.writeable
    assert output.flags.aligned


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4), st.integers(0, 99))
def test_tensors_in_json(values, n):
    servable = Affine()
    x = np.array([values], np.float32)
    head, tail = write_infer({"n": [np.int32(n)], "x": x}, ["y"], binary=False)
    assert tail == []
    request = decoder(servable).decode(head, None)
    assert bytes(request.tensors[0]) == x.tobytes()
    assert bytes(request.tensors[1]) == struct.pack("<i", n)
    assert request.spec.outputs == ((0, False),)
    answer, _ = write_response(signature_of(servable), request.spec, [x.tobytes()])
    np.testing.assert_array_equal(read_infer(answer, None)["y"], x)


def test_the_json_part_word_for_word():
    head, tail = write_infer({"a": np.int8([[1, 2]]), "b": np.float64(1.5)}, None, {"priority": 2})
    assert json.loads(head) == {
        "inputs": [
            {"name": "a", "shape": [1, 2], "datatype": "INT8", "parameters": {"binary_data_size": 2}},
            {"name": "b", "shape": [], "datatype": "FP64", "parameters": {"binary_data_size": 8}},
        ],
        "parameters": {"priority": 2, "binary_data_output": True},
    }
    assert b"".join(tail) == b"\x01\x02" + struct.pack("<d", 1.5)
    assert json.loads(write_infer({}, ["y"])[0])["outputs"] == [{"name": "y", "parameters": {"binary_data": True}}]


@pytest.mark.parametrize(
    ("value", "datatype", "dtype"),
    [
        (1.5, "FP32", "<f4"),
        ([[1, 2.5], [3.0, float("nan")]], "FP32", "<f4"),
        (((), ()), "FP32", "<f4"),
        ([[1, -(2**31)]], "INT32", "<i4"),
        ([True, False], "BOOL", "?"),
        ([2**31], "INT64", "<i8"),
        ([-(2**63)], "INT64", "<i8"),
        ([1e300], "FP64", "<f8"),
        (np.float64(1.5), "FP64", "<f8"),
        ([np.zeros(2)], "FP64", "<f8"),
        ([np.int64(3)], "INT64", "<i8"),
    ],
)
def test_pythons_numbers_have_32_bits_as_in_jax(value, datatype, dtype):
    head, tail = write_infer({"x": value})
    (described,) = json.loads(head)["inputs"]
    assert described["datatype"] == datatype
    assert b"".join(tail) == np.asarray(value, dtype).tobytes()


@pytest.mark.parametrize("value", [["é", "", "ab"], [b"\xc3\xa9", b"", b"ab"], np.array(["é", "", "ab"], object)])
def test_text_and_bytes(value):
    head, tail = write_infer({"x": value})
    assert json.loads(head)["inputs"][0] == {
        "name": "x", "shape": [3], "datatype": "BYTES", "parameters": {"binary_data_size": 16},
    }  # fmt: skip
    data = b"".join(tail)
    assert data == b"\x02\0\0\0\xc3\xa9" + b"\0\0\0\0" + b"\x02\0\0\0ab"
    described = {"name": "y", "datatype": "BYTES", "shape": [3, 1]}
    answer = json.dumps({"outputs": [described | {"parameters": {"binary_data_size": 16}}]}).encode()
    for output in (
        read_infer(answer + data, len(answer))["y"],
        read_infer(json.dumps({"outputs": [described | {"data": ["é", "", "ab"]}]}).encode(), None)["y"],
    ):
        assert output.shape == (3, 1)
        assert output.ravel().tolist() == ["é".encode(), b"", b"ab"]


@pytest.mark.parametrize(
    ("value", "binary", "part"),
    [
        (np.zeros(2, np.complex64), True, "complex64"),
        (np.zeros(2, "float8_e4m3fn"), True, "float8_e4m3fn"),
        (np.array(["a", None], object), True, "NoneType"),
        ([[1], [1, 2]], True, "no array"),
        (np.zeros(2, "datetime64[s]"), True, "datetime64"),
        (np.array([np.nan], np.float32), False, "NaN"),
        (np.zeros(1, ml_dtypes.bfloat16), False, "BF16"),
        ([b"\xff"], False, "UTF-8"),
    ],
)
def test_what_the_protocol_cannot_carry_is_named(value, binary, part):
    with pytest.raises(InputError, match=part) as caught:
        write_infer({"the_input": value}, binary=binary)
    assert "'the_input'" in str(caught.value)


def answer_of(*outputs):
    return json.dumps({"outputs": outputs}).encode()


ONE = {"name": "y", "datatype": "FP32", "shape": [2]}


@pytest.mark.parametrize(
    ("head", "tail", "part"),
    [
        (b"{}", b"", "outputs"),
        (b'{"outputs": [', b"", "truncated"),
        (answer_of(ONE), b"", "not both"),
        (answer_of(ONE | {"data": [1, 2], "parameters": {"binary_data_size": 8}}), b"\0" * 8, "not both"),
        (answer_of(ONE | {"data": [1, 2, 3]}), b"", "3 elements"),
        (answer_of(ONE | {"data": [1, "x"]}), b"", "convert"),
        (answer_of(ONE | {"datatype": "FP8", "data": [1, 2]}), b"", "FP8"),
        (answer_of(ONE | {"shape": [-2], "data": [1, 2]}), b"", "-2"),
        (answer_of(ONE | {"parameters": {"binary_data_size": 8}}), b"\0" * 7, "7 bytes follow"),
        (answer_of(ONE | {"parameters": {"binary_data_size": 8}}), b"\0" * 9, "1 bytes follow its last"),
        (answer_of(ONE | {"parameters": {"binary_data_size": 4}}), b"\0" * 4, "4 bytes"),
        (answer_of(ONE | {"parameters": {"binary_data_size": -8}}), b"\0" * 8, "-8"),
        (answer_of(ONE | {"parameters": {"binary_data_size": "8"}}), b"\0" * 8, "'8'"),
        (answer_of(ONE | {"datatype": "BYTES", "parameters": {"binary_data_size": 5}}), b"\x02\0\0\0a", "cut short"),
        (answer_of(ONE | {"datatype": "BYTES", "parameters": {"binary_data_size": 5}}), b"\x01\0\0\0a", "1 elements"),
    ],
)
def test_an_answer_that_is_none(head, tail, part):
    with pytest.raises((ValueError, msgspec.DecodeError), match=part):
        read_infer(head + tail, len(head))


@pytest.mark.parametrize("size", [-1, 4])
def test_a_json_part_longer_than_the_answer(size):
    with pytest.raises(ValueError, match="JSON part"):
        read_infer(b"{}", size)


@given(st.data())
def test_a_damaged_answer_is_an_error_or_other_numbers(data):
    """Never another exception than those that the client turns into its own."""
    tail = np.arange(2, dtype=np.float32).tobytes()
    body = bytearray(answer_of(ONE | {"parameters": {"binary_data_size": 8}}) + tail)
    size = len(body) - 8
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        outputs = read_infer(bytes(body), data.draw(st.sampled_from([size, size, size - 1, None])))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return
    assert all(isinstance(output, np.ndarray) for output in outputs.values())
