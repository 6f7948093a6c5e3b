"""Activation statistics compared with NumPy in float64, in every container and layout of a product."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lepton_xla.adapters import from_linen
from lepton_xla.errors import CalibrationError
from lepton_xla.passes import find_sites
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.statistics import collect_statistics
from lepton_xla.program import TensorSpec, trace

ROWS = {"x": TensorSpec(("batch", 6), "float32")}
IMAGES = {"x": TensorSpec(("batch", 6, 5, 4), "float32")}


def array(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


def measured(program, *inputs, **options):
    sites = [site for site in find_sites(program) if site.path is not None]
    return collect_statistics(program, sites, [{"x": x} for x in inputs], gram=True, **options)


def assert_statistics(found, *rows, steps=()):
    """`rows`: for each step, the matrices [B, M, K] that met the site, all in float64."""
    assert found.rows.shape == steps
    whole = [np.asarray(part, np.float64) for part in rows]
    grams = [np.einsum("bmk,bml->bkl", part, part) / max(part.shape[1], 1) for part in whole]
    counts = [part.shape[1] for part in whole]
    np.testing.assert_array_equal(np.ravel(found.rows), counts)
    for got, want in (
        (found.absmax, [np.max(np.abs(part), axis=1, initial=0) for part in whole]),
        (found.mean, [part.sum(1) / max(part.shape[1], 1) for part in whole]),
        (found.mean_abs, [np.abs(part).sum(1) / max(part.shape[1], 1) for part in whole]),
        (found.mean_square, [(part**2).sum(1) / max(part.shape[1], 1) for part in whole]),
        (found.gram, grams),
    ):
        want = np.reshape(np.stack(want), (*steps, *want[0].shape))
        assert got.shape == want.shape
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5 * max(1, np.abs(want).max()))


def test_over_batches_and_repeated_use():
    w = array(6, 6, seed=1)
    program = trace(lambda w, x: jnp.tanh(x @ w["w"]) @ w["w"], {"w": w}, ROWS)
    batches = array(3, 6), array(5, 6, seed=2, scale=4.0)
    found = measured(program, *batches)
    x = np.concatenate([np.asarray(batch, np.float64) for batch in batches])
    assert_statistics(found["w"], x[None])
    assert_statistics(found["w#1"], np.tanh(x @ np.asarray(w, np.float64))[None])


LAYOUTS = {
    "transposed": (lambda x, w: x @ w.T, (7, 6), "mk->mk"),
    "weight first": (lambda x, w: w @ x.T, (7, 6), "mk->mk"),
    "heads": (lambda x, w: jnp.einsum("mk,khd->mhd", x, w), (6, 2, 3), "mk->mk"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_a_dot(name):
    fn, shape, _ = LAYOUTS[name]
    program = trace(lambda w, x: fn(x, w["w"]), {"w": array(*shape, seed=1)}, ROWS)
    x = array(4, 6)
    assert_statistics(measured(program, x)["w"], np.asarray(x)[None])


def test_batch_axes_and_several_contracted_axes():
    program = trace(
        lambda w, x: jnp.einsum("mgij,gijn->gmn", x.reshape(-1, 3, 2, 2), w["w"]),
        {"w": array(3, 2, 2, 5, seed=1)},
        {"x": TensorSpec(("batch", 12), "float32")},
    )
    x = array(4, 12)
    found = measured(program, x)["w"]
    assert_statistics(found, np.moveaxis(np.asarray(x).reshape(4, 3, 4), 1, 0))


def patches(x, window, stride, groups):
    """The windows of an image [N, H, W, C] padded by one: [groups, M, C / groups * window]."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = []
    for image in x:
        for top in range(0, image.shape[0] - window + 1, stride):
            for left in range(0, image.shape[1] - window + 1, stride):
                cut = image[top : top + window, left : left + window]
                split = cut.reshape(window, window, groups, -1)
                rows.append(np.moveaxis(split, 2, 0).reshape(groups, -1))
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_sees_patches(groups):
    x, w = array(2, 6, 5, 4), array(3, 3, 4 // groups, 8, seed=1)

    def fn(w, x):
        return lax.conv_general_dilated(
            x, w["w"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    program = trace(fn, {"w": w}, IMAGES)
    rows = patches(x, 3, 2, groups)
    assert_statistics(measured(program, x)["w"], rows)
    # The product of the matrices is the convolution, so K is in the same order on both sides.
    (site,) = find_sites(program)
    product = np.einsum("gmk,gkn->mgn", rows, np.asarray(matrix.stored_matrix(site, w), np.float64))
    want = np.asarray(program.fn({"w": w}, x))
    np.testing.assert_allclose(product.reshape(want.shape), want, rtol=1e-4, atol=1e-4)


def test_a_scanned_stack_has_statistics_of_each_step():
    ws = array(3, 6, 6, seed=1, scale=0.4)
    program = trace(lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w["w"])[0], {"w": ws}, ROWS)
    x = array(4, 6)
    rows = [np.asarray(x, np.float64)]
    for w in np.asarray(ws, np.float64)[:2]:
        rows.append(np.tanh(rows[-1] @ w))
    assert_statistics(measured(program, x)["w"], *(row[None] for row in rows), steps=(3,))


def test_scans_in_scans_only_split_what_they_step_over():
    ws = array(2, 6, 6, seed=1, scale=0.4)

    def fn(w, x):
        def layers(x, _):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w["w"])[0], None

        return lax.scan(layers, x, length=3)[0]

    x = array(4, 6)
    seen, state = [[], []], np.asarray(x, np.float64)
    for _ in range(3):
        for step in range(2):
            seen[step].append(state)
            state = np.tanh(state @ np.asarray(ws[step], np.float64))
    found = measured(trace(fn, {"w": ws}, ROWS), x)["w"]
    assert_statistics(found, *(np.concatenate(rows)[None] for rows in seen), steps=(2,))


def test_a_loop_counts_every_round():
    w = array(6, 6, seed=1, scale=0.4)
    fn = lambda w, x: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ w["w"]), (0, x))[1]  # noqa: E731
    x = array(4, 6)
    rows = [np.asarray(x, np.float64)]
    for _ in range(2):
        rows.append(rows[-1] @ np.asarray(w, np.float64))
    assert_statistics(measured(trace(fn, {"w": w}, ROWS), x)["w"], np.concatenate(rows)[None])


def test_a_branch_not_taken_counts_nothing():
    weights = {"a": array(6, 6, seed=1), "b": array(6, 6, seed=2)}
    fn = lambda w, x: lax.cond(x[0, 0] > 0, lambda x: x @ w["a"], lambda x: x @ w["b"], x)  # noqa: E731
    x = jnp.abs(array(4, 6))
    found = measured(trace(fn, weights, ROWS), x, 2 * x)
    assert_statistics(found["a"], np.concatenate([x, 2 * x])[None])
    assert_statistics(found["b"], np.zeros((1, 0, 6)))


@pytest.mark.parametrize("check", [False, True])
def test_shard_map_adds_the_devices(check):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    body = lambda x, w: x @ w  # noqa: E731
    fn = jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=check)
    program = trace(lambda w, x: fn(x, w["w"]), {"w": array(6, 3, seed=1)}, ROWS)
    x = array(4, 6)
    assert_statistics(measured(program, x)["w"], np.asarray(x)[None])


def test_sharded_inputs():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 3, seed=1)}, ROWS)
    x = array(4, 6)
    found = measured(program, jax.device_put(x, NamedSharding(mesh, P("data"))))["w"]
    assert_statistics(found, np.asarray(x)[None])


def test_linen_and_half_precision():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, dtype=jnp.bfloat16)(x)

    x = array(4, 6)
    program = from_linen(Net(), Net().init(jax.random.key(0), x), ROWS)
    (found,) = measured(program, x).values()
    assert_statistics(found, np.asarray(x.astype(jnp.bfloat16), np.float64)[None])


def test_a_memory_limit_changes_the_passes_not_the_figures():
    program = trace(lambda w, x: x @ w["a"] @ w["b"], {"a": array(6, 6, seed=1), "b": array(6, 6, seed=2)}, ROWS)
    x = array(4, 6)
    for one, other in zip(measured(program, x).values(), measured(program, x, limit_bytes=1).values(), strict=True):
        np.testing.assert_array_equal(one.gram, other.gram)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration data is empty: .* a generator gives its batches only once"),
        (None, "calibration data is a NoneType, not a list of batches"),
        ([{"x": np.zeros((0, 6), np.float32)}], "input 'x' is empty"),
        ([{"x": np.full((2, 6), np.nan, np.float32)}], "holds NaN or infinity"),
        ([{"y": np.zeros((2, 6), np.float32)}], "has inputs"),
        ([{"x": np.ones((2, 6), np.float32), "z": 1}], "has inputs"),
    ],
)
def test_unusable_data(batches, message):
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 3)}, ROWS)
    with pytest.raises(CalibrationError, match=message):
        collect_statistics(program, find_sites(program), batches)


def test_an_activation_that_is_not_finite_is_named():
    program = trace(lambda w, x: jnp.log(x) @ w["w"], {"w": array(6, 3)}, ROWS)
    with pytest.raises(CalibrationError, match="the activation of site 'w' is not finite"):
        measured(program, -jnp.ones((2, 6)))


@pytest.mark.parametrize(("fn", "shape"), [(fn, shape) for fn, shape, _ in LAYOUTS.values()], ids=list(LAYOUTS))
@pytest.mark.parametrize("stacked", [False, True])
def test_a_stored_weight_comes_back_from_its_matrix(fn, shape, stacked):
    w = array(*((2,) if stacked else ()), *shape, seed=1)
    run = (lambda w, x: lax.map(lambda v: fn(x, v), w["w"])) if stacked else (lambda w, x: fn(x, w["w"]))
    (site,) = find_sites(trace(run, {"w": w}, ROWS))
    np.testing.assert_array_equal(matrix.stored_weight(site, matrix.stored_matrix(site, w), w), w)
