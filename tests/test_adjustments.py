"""The rule by which weights move towards others."""

import ml_dtypes
import numpy as np
import pytest

from lepton_xla.adjustments import move_weights
from lepton_xla.errors import InputError


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_steps_follow_the_formula_in_float64(dtype):
    random = np.random.default_rng(0)
    one, two = ({"w": random.standard_normal((7, 5)).astype(dtype)} for _ in range(2))
    exact = np.asarray(one["w"], np.float64)
    moved = one
    for _ in range(3):
        moved = move_weights(moved, two, 0.3)
        exact = exact + 0.3 * (np.asarray(two["w"], np.float64) - exact)
        exact = exact.astype(dtype).astype(np.float64)
    assert moved["w"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(moved["w"], np.float64), exact)


def test_one_gives_the_target_bit_for_bit_and_equal_infinities_stay():
    one = {"w": np.float32([1.0, -np.inf, 0.1]), "n": np.int32([3])}
    two = {"w": np.float32([1e30, -np.inf, -0.0]), "n": np.int32([3])}
    moved = move_weights(one, two, 1)
    assert moved["w"].tobytes() == two["w"].tobytes()
    assert move_weights(one, two, 0.5)["w"].tolist()[1] == -np.inf
    assert move_weights(one, two, 0.5)["n"].tolist() == [3]


@pytest.mark.parametrize("alpha", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_alpha_is_above_0_and_at_most_1(alpha):
    with pytest.raises(InputError, match="above 0 and at most 1"):
        move_weights({}, {}, alpha)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({}, "weight 'w' is only in one of both"),
        ({"w": np.ones(2, np.float32), "v": np.ones(1)}, "weight 'v' is only in one of both"),
        ({"w": np.ones(3, np.float32)}, r"float32\[2\], and is to be float32\[3\]"),
        ({"w": np.ones(2, np.float16)}, r"is to be float16\[2\]"),
        ({"w": np.float32([1, np.nan])}, "weight 'w' holds NaN"),
    ],
)
def test_what_cannot_be_moved_to_is_refused_by_name(target, said):
    with pytest.raises(InputError, match=said):
        move_weights({"w": np.ones(2, np.float32)}, target, 0.5)


def test_integers_cannot_move():
    with pytest.raises(InputError, match="int32, which cannot move in steps"):
        move_weights({"n": np.int32([1])}, {"n": np.int32([2])}, 1)
