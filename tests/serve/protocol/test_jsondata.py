import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.protocol import jsondata
from lepton_xla.serve.protocol.datatypes import DATATYPES
from lepton_xla.serve.protocol.jsondata import read_data, write_data

FP32, INT32 = DATATYPES["FP32"], DATATYPES["INT32"]
DTYPES = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32", "float64"]
CARRIED = {row.dtype.name: row for row in DATATYPES.values() if row.dtype is not None}


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a few elements, so that short arrays are long ones."""
    monkeypatch.setattr(jsondata, "PIECE_BYTES", 16)
    monkeypatch.setattr(jsondata, "_PIECE_ITEMS", 5)
    monkeypatch.setattr(jsondata, "REST_S", 0.0)


def refused(text, shape, datatype=FP32):
    with pytest.raises(HTTPError) as caught:
        read_data(text, shape, datatype, "input 'x'")
    assert caught.value.status == 400
    assert caught.value.message.startswith("input 'x'")
    return caught.value.message


def arrays(dtype):
    elements = st.floats(width=np.dtype(dtype).itemsize * 8, allow_nan=False, allow_infinity=False)
    kwargs = {"elements": elements} if dtype.startswith("float") else {}
    return hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6), **kwargs)


@pytest.mark.parametrize("pieces", ["whole", "small"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_array_nested_or_flat_in_any_spacing_is_read_and_written_as_numpy_does(request, pieces, dtype, data):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    array = data.draw(arrays(dtype))
    indent = data.draw(st.sampled_from([None, 0, 3]))
    forms = [array.ravel().tolist()] if array.size else []
    for form in (*forms, array.tolist()):
        text = json.dumps(form, indent=indent).encode()
        assert read_data(text, array.shape, CARRIED[dtype], "x") == array.tobytes()
    written = write_data(array.ravel(), "x")
    assert np.array(json.loads(written), dtype).tobytes() == array.tobytes()


@given(
    hnp.arrays(np.int32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=5)),
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=5),
)
def test_another_shape_is_refused_unless_the_list_is_flat_and_as_long(array, shape):
    text = json.dumps(array.tolist()).encode()
    if array.shape == shape or (array.ndim == 1 and array.size == math.prod(shape)):
        assert read_data(text, shape, INT32, "x") == array.tobytes()
    else:
        refused(text, shape, INT32)


@pytest.mark.parametrize("shape", [(2**62, 4), (10**9, 0), (0, 10**9), (2**31, 2**31), (10**12,)])
def test_a_shape_that_claims_much_allocates_nothing(shape):
    import tracemalloc

    tracemalloc.start()
    try:
        for text in (b"[1]", b"[[1]]", b"[[], []]", b"[1,2,3,4]"):
            refused(text, shape)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (b"3", (1,)),
        (b"null", (1,)),
        (b'{"a": 1}', (1,)),
        (b'{"a": [1, 2]}', (2,)),
        (b'{"a": [[1, 2]]}', (1, 2)),
        (b'["a", "b"]', (2,)),
        (b'["[,]"]', (1,)),
        (b'[["1", "2"]]', (1, 2)),
        (b'[["[,", "]"]]', (1, 2)),
        (b"[1, [2]]", (2,)),
        (b"[1, true]", (2,)),
        (b"[1, null]", (2,)),
        (b"[[1], 2]", (2, 1)),
        (b"[[1, 2, 3], [4]]", (2, 2)),
        (b"[[1, 2], [3, 4]]", (4, 1)),
        (b"[1e39]", (1,)),
        (b"[NaN]", (1,)),
    ],
)
@pytest.mark.parametrize("pieces", ["whole", "small"])
def test_what_is_no_list_of_numbers_of_that_shape_is_refused(request, pieces, text, shape):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    refused(text, shape)
    if text.startswith(b"["):
        # The same behind enough good elements for more than one piece.
        refused(b"[" + b"1.0," * 50 + text[1:], (50 + math.prod(shape),))


def test_a_number_too_many_or_too_few_in_a_later_piece_is_seen(small_pieces):
    for count in (99, 101, 300):
        assert "needs 100 elements" in refused(json.dumps([1.5] * count).encode(), (100,))
    assert read_data(json.dumps([1.5] * 100).encode(), (100,), FP32, "x") == np.full(100, 1.5, "f4").tobytes()


def test_deep_nesting_is_refused_without_recursion():
    assert "nested" in refused(b"[" * 100_000 + b"]" * 100_000, (1,))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_way_to_write_what_is_not_finite(value):
    with pytest.raises(HTTPError, match=r"output 'y' holds NaN or infinity.*ask for binary_data") as caught:
        write_data(np.array([1, value], np.float32), "output 'y'")
    assert caught.value.status == 400


@pytest.mark.parametrize("pieces", ["whole", "small"])
@pytest.mark.parametrize("nested", [True, False])
@given(shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=7), data=st.data())
def test_the_element_that_is_wrong_is_named_as_in_the_request(request, pieces, nested, shape, data):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    place = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    array = np.arange(math.prod(shape)).astype(object).reshape(shape)
    array[place] = "seven"
    text = json.dumps(array.tolist() if nested else array.ravel().tolist()).encode()
    index = place if nested else (np.ravel_multi_index(place, shape),)
    message = refused(text, shape, INT32)
    assert message.endswith(
        "data is not INT32: Expected `int`, got `str` - at `$" + "".join(f"[{i}]" for i in index) + "`"
    )


def test_an_element_that_is_cut_in_two_is_still_refused(small_pieces):
    assert refused(json.dumps([1.0] * 10 + ["a,b" * 20] + [2.0] * 10).encode(), (21,)).endswith("data is not FP32")
