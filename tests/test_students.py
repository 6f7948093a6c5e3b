"""What the distillation benchmark computes from accuracies, and the batches that its students see."""

import importlib
import math
import pathlib
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("students.base")


def test_noise_is_the_standard_error_over_seeds(base: Any) -> None:
    assert base.noise([0.90, 0.92, 0.94]) == pytest.approx(0.02 / math.sqrt(3))
    assert base.noise([0.9]) is None


def test_a_test_set_of_a_hundred_has_three_points_of_noise_at_nine_in_ten(base: Any) -> None:
    assert base.binomial(0.9, 100) == pytest.approx(0.03)


def test_the_share_of_a_gap_is_none_where_the_teacher_is_no_better(base: Any) -> None:
    assert base.closed(0.95, 0.90, 1.00) == pytest.approx(0.5)
    assert base.closed(0.89, 0.90, 1.00) == pytest.approx(-0.1)
    assert math.isnan(base.closed(0.95, 0.90, 0.90))
    assert math.isnan(base.closed(0.95, 0.90, 0.85))


def test_each_pass_has_every_row_once_in_an_order_of_its_own_that_the_seed_gives(base: Any) -> None:
    rows = {"row": np.arange(12), "square": np.arange(12) ** 2}
    first, again, other = (base.batches(rows, 4, seed) for seed in (0, 0, 1))
    passes = [[first(step)["row"] for step in range(start, start + 3)] for start in (0, 3)]
    for each in passes:
        np.testing.assert_array_equal(np.sort(np.concatenate(each)), np.arange(12))
    assert not np.array_equal(*map(np.concatenate, passes))
    for step in range(6):
        np.testing.assert_array_equal(first(step)["square"], first(step)["row"] ** 2)
        np.testing.assert_array_equal(first(step)["row"], again(step)["row"])
    assert any((first(step)["row"] != other(step)["row"]).any() for step in range(3))
