import pytest

from lepton_xla.compiler.buckets import bucket_name, check_bucket_sizes, combinations, next_size
from lepton_xla.errors import CompileError
from lepton_xla.program import TensorSpec
from lepton_xla.rows import row_symbol


def test_ladders_come_in_the_order_of_the_symbols() -> None:
    bucket_sizes = check_bucket_sizes(("batch", "seq"), {"seq": [16, 64], "batch": [1, 8]})
    assert list(bucket_sizes.items()) == [("batch", (1, 8)), ("seq", (16, 64))]
    assert combinations(bucket_sizes) == [
        {"batch": 1, "seq": 16}, {"batch": 1, "seq": 64}, {"batch": 8, "seq": 16}, {"batch": 8, "seq": 64},
    ]  # fmt: skip


def test_a_model_without_symbols_has_one_bucket() -> None:
    assert combinations(check_bucket_sizes((), {})) == [{}]
    assert bucket_name({}) == "fixed"


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ({}, "lack the dimension 'batch'"),
        ({"batch": (1,), "seq": (8,)}, "name 'seq', which is not a dimension of any input"),
        ({"batch": ()}, r"buckets\['batch'\] is \(\)"),
        ({"batch": 8}, r"buckets\['batch'\] is 8"),
        ({"batch": "18"}, r"buckets\['batch'\] is '18'"),
        ({"batch": (0, 1)}, r"buckets\['batch'\] holds 0"),
        ({"batch": (True,)}, r"buckets\['batch'\] holds True"),
        ({"batch": (1.0,)}, r"buckets\['batch'\] holds 1.0"),
        ({"batch": (8, 1)}, "must ascend"),
        ({"batch": (1, 1)}, "must ascend"),
    ],
)
def test_bad_ladders_are_refused_by_name(buckets: dict, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        check_bucket_sizes(("batch",), buckets)


def test_next_size() -> None:
    assert [next_size((1, 8, 32), size) for size in (0, 1, 2, 8, 9, 32, 33)] == [1, 1, 8, 8, 32, 32, None]


@pytest.mark.parametrize(
    ("shapes", "symbol"),
    [
        ([("batch", 3), ("batch", "seq")], "batch"),
        ([("batch", 3), (7,)], "batch"),
        ([("batch", "seq"), ("seq",)], None),
        ([("batch", "batch")], None),
        ([(3, "seq")], None),
        ([(3,)], None),
    ],
)
def test_row_symbol_leads_every_input_that_varies(shapes: list, symbol: str | None) -> None:
    inputs = {f"x{index}": TensorSpec(shape, "float32") for index, shape in enumerate(shapes)}
    assert row_symbol(inputs) == symbol
