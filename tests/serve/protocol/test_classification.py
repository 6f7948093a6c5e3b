import importlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lepton_xla.serve.protocol.classification import classes_shape, top_classes
from lepton_xla.serve.protocol.datatypes import join_elements


def test_the_example_of_the_extensions_text():
    assert list(top_classes(np.array([[1, 5, 10, 4]], np.uint32), 2)) == ["10:2", "5:1"]
    assert list(top_classes(np.array([[1.1, 3.3, 0.5, 2.4]], np.float32), 2)) == ["3.3:1", "2.4:3"]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint64", "int8", "int64", "float16", "float32", "float64"])
@given(data=st.data())
def test_against_sorting_pairs_of_value_and_index(dtype, data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 12)))
    rows = data.draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(np.dtype(dtype), allow_nan=False)))
    count = data.draw(st.integers(0, shape[1]))
    found = [text.split(":") for text in top_classes(rows, count)]
    expected = []
    for row in rows.tolist():
        expected += sorted(range(len(row)), key=lambda index, row=row: (-row[index], index))[:count]
    assert [int(index) for _, index in found] == expected
    for position, (value, index) in enumerate(found):
        read = np.array(value if rows.dtype.kind == "f" else int(value)).astype(dtype)
        assert read == rows[position // count, int(index)]


def test_equal_elements_come_in_their_order_and_nan_comes_last():
    assert list(top_classes(np.array([[2, 7, 7, 7, 1]]), 3)) == ["7:1", "7:2", "7:3"]
    rows = np.array([[np.nan, 1, -np.inf, np.nan, 2]], np.float32)
    assert list(top_classes(rows, 5)) == ["2.0:4", "1.0:1", "nan:0", "-inf:2", "nan:3"]


def test_bfloat16_is_ranked_as_the_numbers_it_holds():
    rows = np.array([[1.5, -2, 3.25]], ml_dtypes.bfloat16)
    assert list(top_classes(rows, 3)) == ["3.25:2", "1.5:0", "-2.0:1"]


def test_a_vocabulary_is_not_sorted_whole():
    import time

    row = np.random.default_rng(0).standard_normal((1, 1_000_000)).astype(np.float32)
    start = time.perf_counter()
    found = list(top_classes(row, 5))
    partial = time.perf_counter() - start
    start = time.perf_counter()
    order = np.argsort(-row[0], kind="stable")[:5]
    assert [int(text.split(":")[1]) for text in found] == order.tolist()
    assert partial < time.perf_counter() - start


@pytest.mark.parametrize(
    ("shape", "count", "batched", "expected"),
    [
        ((4, 10), 3, True, (4, 3)),
        ((4, 10), 30, True, (4, 10)),
        ((4,), 3, True, (4, 1)),
        ((4, 2, 5), 3, True, (4, 3)),
        ((4, 10), 3, False, (3,)),
        ((), 3, False, (1,)),
        ((4, 0), 3, True, (4, 0)),
    ],
)
def test_the_shape_is_rows_by_count(shape, count, batched, expected):
    assert classes_shape(shape, count, batched=batched) == expected


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_tritonclient_reads_joined_elements(texts):
    utils = importlib.import_module("tritonclient.utils")
    assert [each.decode() for each in utils.deserialize_bytes_tensor(join_elements(map(str.encode, texts)))] == texts
