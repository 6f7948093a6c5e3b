"""Fake quantization at a site against float64, its gradient, and where it composes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lepton_xla.errors import CalibrationError, ModelError, UnsupportedError
from lepton_xla.passes import calibrate, fake_quant, masked, quantize
from lepton_xla.passes.planning import resolve
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 6), "float32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def recipe(options="", sites=".*"):
    return Recipe.parse(f'on_unsupported = "keep"\n[[quantize]]\nsites = "{sites}"\n{options}', name="test")


def rounded(values, axes=None, scale=None):
    values = np.asarray(values, np.float64)
    if scale is None:
        scale = np.max(np.abs(values), axis=axes, keepdims=True) / 127
    return np.clip(np.rint(values / scale), -127, 127) * scale


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("activations", ["dynamic", "static", "none"])
def test_one_product(granularity, activations):
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 5)}, ROWS)
    options = f'granularity = "{granularity}"\n'
    options += {"dynamic": "", "static": "dynamic = false", "none": 'activations = "none"'}[activations]
    plan = resolve(recipe(options), program)
    x = array(4, 6, seed=3)
    ranges = {"w": jnp.float32(1.5)} if activations == "static" else None
    act = {
        "dynamic": lambda: rounded(x, 1),
        "static": lambda: rounded(x, scale=1.5 / 127),
        "none": lambda: np.asarray(x, np.float64),
    }[activations]()
    expected = act @ rounded(program.weights["w"], 0 if granularity == "channel" else None)
    got = fake_quant(program.fn, plan, ranges)(program.weights, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_static_without_a_range_names_the_site():
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 5)}, ROWS)
    plan = resolve(recipe("dynamic = false"), program)
    for ranges in (None, {}, {"other": jnp.float32(1)}):
        with pytest.raises(CalibrationError, match="site 'w' has static activation scales"):
            fake_quant(program.fn, plan, ranges)(program.weights, array(3, 6))


def test_unplanned_sites_stay_float():
    program = trace(lambda w, x: (x @ w["a"]) @ w["b"], {"a": array(6, 5), "b": array(5, 4)}, ROWS)
    plan = resolve(recipe(sites="b"), program)
    x = array(3, 6, seed=2)
    hidden = np.asarray(x, np.float64) @ np.asarray(program.weights["a"], np.float64)
    expected = rounded(hidden, 1) @ rounded(program.weights["b"], 0)
    np.testing.assert_allclose(fake_quant(program.fn, plan)(program.weights, x), expected, rtol=1e-4, atol=1e-4)


def test_what_a_plan_keeps_stays_float():
    """A weight used in two layouts is kept by the plan, so it is not rounded in training either."""
    tied = trace(
        lambda w, ids: jnp.take(w["t"], ids, axis=0) @ w["t"],
        {"t": array(9, 9)},
        {"ids": TensorSpec(("b",), "int32")},
    )
    ids = jnp.asarray([1, 5, 2])
    np.testing.assert_array_equal(
        fake_quant(tied.fn, resolve(recipe(), tied))(tied.weights, ids), tied(tied.weights, ids)
    )


@pytest.mark.parametrize("static", [False, True])
def test_a_scan_has_a_scale_a_step(static):
    def fn(w, x):
        return lax.scan(lambda x, w: (2.0 * jnp.sin(x @ w), None), x, w["stack"])[0]

    program = trace(fn, {"stack": array(3, 6, 6) * jnp.asarray([1.0, 10.0, 0.1]).reshape(3, 1, 1)}, ROWS)
    plan = resolve(recipe("dynamic = false" if static else ""), program)
    x = array(4, 6, seed=3)
    ranges = calibrate(program, plan, [{"x": x}]) if static else None
    got = fake_quant(fn, plan, ranges)(program.weights, x)
    expected = np.asarray(x, np.float64)
    for step, w in enumerate(program.weights["stack"]):
        act = rounded(expected, scale=float(ranges["stack"][step]) / 127) if static else rounded(expected, 1)
        expected = 2 * np.sin(act @ rounded(w, 0))
    # A code may fall on the other side of a tie; most of the result must agree to rounding.
    assert np.median(np.abs(got - expected)) < 1e-4
    assert np.abs(got - expected).max() < 0.1


def test_gradient_is_straight_through():
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 5)}, ROWS)
    plan = resolve(recipe(), program)
    x, upstream = array(4, 6, seed=3), array(4, 5, seed=4)
    quantized = fake_quant(program.fn, plan)
    by_weight, by_input = jax.grad(lambda w, x: jnp.sum(quantized(w, x) * upstream), (0, 1))(program.weights, x)
    g = np.asarray(upstream, np.float64)
    np.testing.assert_allclose(by_weight["w"], rounded(x, 1).T @ g, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_input, g @ rounded(program.weights["w"], 0).T, rtol=1e-4, atol=1e-5)


def test_static_gradient_is_zero_where_saturated():
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 5)}, ROWS)
    plan = resolve(recipe("dynamic = false"), program)
    x = array(4, 6, seed=3)
    quantized = fake_quant(program.fn, plan, {"w": jnp.float32(1.0)})
    by_input = jax.grad(lambda x: jnp.sum(quantized(program.weights, x)))(x)
    inside = np.abs(np.asarray(x)) < 127.5 / 127
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(np.asarray(by_input) != 0, inside)


def test_composes_with_jit_vmap_grad_and_remat():
    def fn(w, x):
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ w["a"]))(x) @ w["b"])

    program = trace(fn, {"a": array(6, 5), "b": array(5, 4)}, ROWS)
    quantized = fake_quant(fn, resolve(recipe(), program))
    xs = array(3, 4, 6, seed=5)
    one_by_one = [jax.grad(quantized)(program.weights, x)["a"] for x in xs]
    together = jax.jit(jax.vmap(jax.grad(quantized), (None, 0)))(program.weights, xs)["a"]
    np.testing.assert_allclose(together, jnp.stack(one_by_one), rtol=1e-5, atol=1e-6)
    assert np.isfinite(together).all()
    assert "remat" in str(jax.make_jaxpr(quantized)(program.weights, xs[0]))


def test_trains_to_where_it_is_quantized():
    """Gradient descent through the rounding lowers the quantized loss."""
    x, target = array(32, 6, seed=1), array(32, 3, seed=2)
    program = trace(lambda w, x: x @ w["w"], {"w": jnp.zeros((6, 3))}, ROWS)
    quantized = fake_quant(program.fn, resolve(recipe(), program))
    loss = jax.jit(jax.value_and_grad(lambda w: jnp.mean((quantized(w, x) - target) ** 2)))
    weights, first = program.weights, None
    for _ in range(60):
        value, gradient = loss(weights)
        first = value if first is None else first
        weights = jax.tree.map(lambda w, g: w - 0.3 * g, weights, gradient)
    best = np.linalg.lstsq(np.asarray(x), np.asarray(target), rcond=None)[1].sum() / target.size
    assert loss(weights)[0] < 1.02 * best < first


# The product of codes, forward; that of floats, backward.

EINSUMS = {
    "dense": ("bi,io->bo", (4, 6), (6, 5)),
    "transposed": ("bi,oi->bo", (4, 6), (5, 6)),
    "places": ("bsi,io->bso", (4, 3, 6), (6, 5)),
    "heads": ("bshd,hdo->bso", (4, 3, 2, 6), (2, 6, 5)),
    "experts": ("bei,eio->beo", (4, 3, 6), (3, 6, 5)),
    "weight on the left": ("oi,bi->ob", (5, 6), (4, 6)),
    "weight on the left, summed over its first axis": ("io,bi->ob", (6, 5), (4, 6)),
    "first axes": ("io,ib->ob", (6, 5), (6, 4)),
}


def einsum_model(name, dtype="float32"):
    """A program of one einsum, an example of its activation, and the axes that share a scale of both."""
    spec, left, right = EINSUMS[name]
    weight_first = name.startswith(("weight", "first"))
    w, x = (left, right) if weight_first else (right, left)
    terms = spec.split("->")[0].split(",")
    summed = [[k for k, axis in enumerate(term) if axis not in spec.split("->")[1]] for term in terms]
    axes = summed[::-1] if weight_first else summed
    shape = (*x[:-1], "batch") if name == "first axes" else ("batch", *x[1:])

    def fn(weights, x):
        operands = [x.astype(dtype), weights["w"].astype(dtype)]
        return jnp.einsum(spec, *(operands[::-1] if weight_first else operands))

    weights = {"w": array(*w)}
    program = trace(fn, weights, {"x": TensorSpec(shape, "float32")})
    return program, array(*x, seed=3), [tuple(a) for a in axes]


@pytest.mark.parametrize("name", [*EINSUMS])
def test_the_value_is_that_of_codes_and_the_gradient_that_of_floats(name):
    spec = EINSUMS[name][0]
    program, x, (act_axes, weight_axes) = einsum_model(name)
    quantized = fake_quant(program.fn, resolve(recipe(), program))
    left_first = name.startswith(("weight", "first"))
    operands = [rounded(x, act_axes), rounded(program.weights["w"], weight_axes)]
    value = np.einsum(spec, *(operands[::-1] if left_first else operands))
    got, pullback = jax.vjp(quantized, program.weights, x)
    np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)
    upstream = array(*value.shape, seed=4)
    terms, out = spec.split("->")
    first, second = terms.split(",")[::-1] if left_first else terms.split(",")
    by_weight, by_input = pullback(upstream)
    expected = [np.einsum(f"{out},{second}->{first}", upstream, operands[1])]
    expected.append(np.einsum(f"{out},{first}->{second}", upstream, operands[0]))
    np.testing.assert_allclose(by_input, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_weight["w"], expected[1], rtol=1e-4, atol=1e-5)
    # Forward mode is the same linear map.
    moved = ({"w": array(*program.weights["w"].shape, seed=5)}, array(*x.shape, seed=6))
    _, along = jax.jvp(quantized, (program.weights, x), moved)
    inner = float(jnp.vdot(by_weight["w"], moved[0]["w"]) + jnp.vdot(by_input, moved[1]))
    np.testing.assert_allclose(jnp.vdot(upstream, along), inner, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in EINSUMS if name != "first axes"])
@pytest.mark.parametrize("options", ["", 'weights = "int4"\nactivations = "int4"', "dynamic = false"])
def test_what_is_trained_is_what_is_served_bit_for_bit(name, options):
    program, x, _ = einsum_model(name, "bfloat16" if name == "dense" else "float32")
    plan = resolve(recipe(options), program)
    ranges = calibrate(program, plan, [{"x": x}]) if "false" in options else None
    small = quantize(program, plan, ranges)
    trained = jax.jit(fake_quant(program.fn, plan, ranges))(program.weights, x)
    np.testing.assert_array_equal(trained, jax.jit(small.fn)(small.weights, x))


def attention(weights, x):
    """x: [batch, places, heads, width]."""
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", x @ weights["q"], x))
    return jnp.einsum("bhqk,bkhd->bqhd", scores, x)


def test_products_of_two_activations():
    program = trace(attention, {"q": array(6, 6)}, {"x": TensorSpec(("batch", 4, 2, 6), "float32")})
    x = array(3, 4, 2, 6, seed=2)
    plan = resolve(recipe('products = "all"'), program)
    quantized = fake_quant(attention, plan)
    total = lambda x: jnp.sum(quantized(program.weights, x) ** 2)  # noqa: E731
    small = quantize(program, plan)
    got, gradient = jax.jit(lambda x: (quantized(program.weights, x), jax.grad(total)(x)))(x)
    # Through the softmax, which compilers may fuse otherwise, not bit for bit.
    np.testing.assert_allclose(got, small.fn(small.weights, x), rtol=1e-5, atol=1e-6)
    query = np.einsum("bqhd,de->bqhe", rounded(x, 3), rounded(program.weights["q"], 0))
    logits = np.einsum("bqhd,bkhd->bhqk", rounded(query, 3), rounded(x, 3))
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores = rounded(scores / scores.sum(-1, keepdims=True), 3)
    value = np.einsum("bhqk,bkhd->bqhd", scores, rounded(x, 1))
    assert np.median(np.abs(got - value)) < 1e-5  # a code may fall on the other side of a tie
    only_weights = fake_quant(attention, resolve(recipe(), program))(program.weights, x)
    assert np.abs(np.asarray(only_weights) - value).max() > 1e-3
    assert np.isfinite(gradient).all()
    assert np.abs(np.asarray(gradient)).min() > 0


def test_codes_are_made_once_and_are_all_that_is_kept_for_the_backward_pass():
    def fn(w, x):
        return lax.scan(lambda x, w: (x @ w, None), x, w["stack"])[0]

    weights = {"stack": array(3, 64, 64)}
    program = trace(fn, weights, {"x": TensorSpec(("batch", 64), "float32")})
    quantized = fake_quant(fn, resolve(recipe(), program))
    x = array(32, 64, seed=1)
    _, pullback = jax.vjp(quantized, weights, x)
    kept = {(str(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(pullback)}
    assert {("int8", (3, 32, 64)), ("int8", (3, 64, 64))} <= kept
    assert not [shape for dtype, shape in kept if dtype == "float32" and np.prod(shape) >= 3 * 32 * 64]
    value = jax.jit(quantized).lower(weights, x).as_text()
    assert re.findall(r"stablehlo.dot_general.*tensor<32x64x(\w+)>$", value, re.MULTILINE) == ["i32"]
    step = jax.jit(jax.grad(lambda w, x: jnp.sum(quantized(w, x) ** 2), (0, 1))).lower(weights, x).compile().as_text()
    assert len(re.findall(r" round-nearest-even\(", step)) == 2  # once for the weight, once for the activation


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("split", ["batch", "weights"])
def test_shards_as_the_float_program_does(kind, split):
    mesh = jax.make_mesh((2,), ("m",), axis_types=(kind,))
    out = P() if kind is AxisType.Explicit and split == "weights" else None

    def model(out):
        return lambda w, x: jnp.sum(jnp.einsum("bsk,kn->bsn", jnp.tanh(x @ w["w"]), w["v"], out_sharding=out) ** 2)

    weights, x = {"w": array(8, 6), "v": array(6, 8, seed=1)}, array(4, 3, 8, seed=2)
    program = trace(model(None), weights, {"x": TensorSpec(("batch", 3, 8), "float32")})
    plan = resolve(recipe(), program)
    expected = jax.jit(jax.value_and_grad(fake_quant(model(None), plan)))(weights, x)
    specs = {"w": P(None, "m"), "v": P("m", None)} if split == "weights" else {"w": P(), "v": P()}
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})
        rows = jax.device_put(x, NamedSharding(mesh, P("m") if split == "batch" else P()))
        got = jax.jit(jax.value_and_grad(fake_quant(model(out), plan)))(placed, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_before_its_step_the_gradient_is_the_float_one():
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 5)}, ROWS)
    quantized = fake_quant(program.fn, resolve(recipe(), program), start=7)
    x = array(4, 6, seed=3)
    at = jax.jit(jax.grad(lambda w, step: jnp.sum(quantized(w, x, step=step) ** 2)))
    plain = jax.grad(lambda w: jnp.sum(program.fn(w, x) ** 2))(program.weights)["w"]
    np.testing.assert_allclose(at(program.weights, 6)["w"], plain, rtol=1e-6)
    assert np.abs(np.asarray(at(program.weights, 7)["w"] - plain)).max() > 1e-3


# Masks, and what else may be between a weight and its product.


def stacked_and_shared(w, x):
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w["stack"])[0]
    x = jax.checkpoint(lambda x: jnp.tanh(x @ w["w"].T))(x)
    return x @ w["w"].T


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("options", ["", 'weights = "int4"\nactivations = "none"\ngranularity = "group:3"'])
def test_masks_may_be_inside_or_outside(straight_through, options):
    weights, x = {"stack": array(2, 6, 6), "w": array(6, 6, seed=1)}, array(4, 6, seed=2)
    masks = {name: array(*leaf.shape, seed=7) > 0 for name, leaf in weights.items()}
    plan = resolve(recipe(options), trace(stacked_and_shared, weights, ROWS))
    hold = lambda fn: masked(fn, masks, straight_through=straight_through)  # noqa: E731

    def trained(fn):
        return jax.jit(jax.value_and_grad(lambda w: jnp.sum(fn(w, x) ** 2)))(weights)

    inside, outside = (
        trained(fake_quant(hold(stacked_and_shared), plan)),
        trained(hold(fake_quant(stacked_and_shared, plan))),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), inside, outside)
    assert abs(inside[0] - trained(hold(stacked_and_shared))[0]) > 1e-2
    gone = ~np.asarray(masks["w"])
    assert (np.asarray(inside[1]["w"])[gone] != 0).mean() == (1 if straight_through else 0)


@pytest.mark.parametrize("change", [lambda w: 2 * w, lambda w: w * (w > 0).astype(w.dtype), jnp.tanh])
def test_a_weight_that_is_changed_before_its_product_is_refused(change):
    program = trace(lambda w, x: x @ w["w"].T @ w["w"].T, {"w": array(6, 6)}, ROWS)
    plan = resolve(recipe(), program)
    with pytest.raises(
        UnsupportedError, match=r"weight 'w' is changed before it reaches its product, .* as in masked\("
    ):
        fake_quant(lambda w, x: program.fn({"w": change(w["w"])}, x), plan)(program.weights, array(3, 6))
    with pytest.raises(UnsupportedError, match="weight 'w' is changed before it reaches site 'w#1'") as caught:
        fake_quant(lambda w, x: x @ w["w"].T @ change(w["w"]).T, plan)(program.weights, array(3, 6))
    assert "\n" not in str(caught.value)
    # Used elsewhere besides, it is quantized at its site all the same.
    decayed = lambda w, x: jnp.sum(program.fn(w, x)) + jnp.sum(change(w["w"]))  # noqa: E731
    expected = jnp.sum(fake_quant(program.fn, plan)(program.weights, array(3, 6))) + jnp.sum(
        change(program.weights["w"])
    )
    np.testing.assert_allclose(fake_quant(decayed, plan)(program.weights, array(3, 6)), expected, rtol=1e-5)


def test_weights_of_another_tree_are_refused():
    program = trace(lambda w, x: x @ w["layer"]["w"], {"layer": {"w": array(6, 5)}}, ROWS)
    plan = resolve(recipe(), program)
    with pytest.raises(ModelError, match="the plan quantizes weight 'layer/w', which is not among w; give the tree"):
        fake_quant(lambda w, x: x @ w["w"], plan)({"w": array(6, 5)}, array(3, 6))
