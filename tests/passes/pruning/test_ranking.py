"""Thresholds by counting, compared with a stable sort; order-independent sums, compared with float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lepton_xla.passes.pruning.ranking import Ranking, exact_mean, keep_largest, keep_largest_on_host, largest_of_each

jitted = jax.jit(keep_largest)


def stable(parts, dropped):
    """Masks without the `dropped` smallest of each row, the first of equal ones, over the parts in their order."""
    flat = np.concatenate([np.abs(part).reshape(len(part), -1) for part in parts], axis=1)
    keep = np.ones(flat.shape, bool)
    order = np.argsort(flat, axis=1, kind="stable")
    np.put_along_axis(keep, order[:, :dropped], values=False, axis=1)
    ends = np.cumsum([part[0].size for part in parts])[:-1]
    return [mask.reshape(part.shape) for mask, part in zip(np.split(keep, ends, axis=1), parts, strict=True)]


# Few values, so that there are ties; all that float32 has, so that every bit counts.
ELEMENTS = st.one_of(st.sampled_from([0.0, 1.0, 2.0, np.inf, np.nan, 1e-45]), st.floats(0, width=32))


@settings(max_examples=60)
@given(
    hnp.arrays(np.float32, (2, 3, 4), elements=ELEMENTS),
    hnp.arrays(np.float32, (2, 5), elements=ELEMENTS),
    st.integers(0, 17),
    st.integers(0, 24),
)
def test_kept_are_those_of_a_stable_sort_on_the_device_and_on_the_host(first, second, together, apart):
    def rankings(count):
        arrays = [jnp.asarray(first), jnp.asarray(second)]
        return [Ranking(arrays, count(together), 1), Ranking([arrays[0]], count(apart), 0)]

    expected = [*stable([first, second], together), *stable([first[None]], apart)]
    for found in (jitted(rankings(jnp.uint32)), keep_largest_on_host(rankings(int))):
        for mask, wanted in zip(jax.tree.leaves(found), expected, strict=True):
            np.testing.assert_array_equal(mask, np.reshape(wanted, mask.shape))


@settings(max_examples=60)
@given(hnp.arrays(np.float32, (2, 3, 4), elements=ELEMENTS))
def test_the_largest_of_each_step_is_what_is_dropped_last(scores):
    found = largest_of_each(jnp.asarray(scores), 1)
    np.testing.assert_array_equal(found, stable([scores], 11)[0])
    whole = largest_of_each(jnp.asarray(scores), 0)
    np.testing.assert_array_equal(whole, stable([scores[None]], 23)[0][0])


def test_each_step_may_drop_another_number():
    scores = np.random.default_rng(0).integers(0, 3, (3, 7)).astype(np.float32)
    ((mask,),) = jitted([Ranking([jnp.asarray(scores)], jnp.asarray([0, 3, 7], jnp.uint32), 1)])
    for row, dropped in enumerate((0, 3, 7)):
        np.testing.assert_array_equal(mask[row], stable([scores[row : row + 1]], dropped)[0][0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_floats_are_ranked_as_they_are(dtype):
    scores = np.abs(np.random.default_rng(1).standard_normal((1, 40))).astype(dtype)
    ((mask,),) = jitted([Ranking([jnp.asarray(scores)], jnp.uint32(13), 1)])
    np.testing.assert_array_equal(mask, stable([scores.astype(np.float64)], 13)[0])


@settings(max_examples=30)
@given(hnp.arrays(np.float32, (2, 6, 5), elements=st.floats(0, 2.0**100, width=32)))
def test_means_are_those_of_float64_and_do_not_depend_on_the_order(values):
    mean = jax.jit(lambda x: exact_mean(x, (1,), 1))
    found = mean(jnp.asarray(values))
    wanted = values.astype(np.float64).mean(1)
    scale = values.max((1, 2), keepdims=True)[..., 0]
    # XLA takes numbers smaller than the normal ones for zero.
    least = max(float(np.max(scale)) * 2**-30, float(np.finfo(np.float32).tiny))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=least)
    np.testing.assert_array_equal(found, mean(jnp.asarray(values[:, ::-1])))


def test_means_over_many_and_over_what_is_not_finite():
    values = np.random.default_rng(2).exponential(size=(70000, 2)).astype(np.float32)
    found = jax.jit(lambda x: exact_mean(x, (0,)))(jnp.asarray(values))
    np.testing.assert_allclose(found, values.astype(np.float64).mean(0), rtol=1e-6)
    broken = jnp.asarray([[1.0, jnp.nan], [2.0, jnp.inf], [3.0, 4.0], [0.0, 0.0]])
    assert exact_mean(broken, (1,)).tolist() == [np.inf, np.inf, 3.5, 0.0]
    assert exact_mean(jnp.zeros((2, 3)), (1,)).tolist() == [0.0, 0.0]
