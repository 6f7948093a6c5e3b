"""Site discovery: which sites are found, their names, and the layout from the stored weight to the product."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lepton_xla.program as lp
from lepton_xla.adapters import from_linen, from_nnx
from lepton_xla.passes.core.layouts import lay_out
from lepton_xla.passes.core.sites import SITE_PRIMITIVES, find_sites, operand_value, rewrite_sites
from lepton_xla.program import TensorSpec, trace

ROWS = {"x": TensorSpec(("batch", 6), "float32")}
IMAGES = {"image": TensorSpec(("batch", 6, 6, 2), "float32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def names(program):
    return [site.name for site in find_sites(program)]


def operands_seen(program, *inputs, inline):
    """Every site's weight operand, each time its product ran on real arrays."""
    seen = {}

    def record(site, context, eqn, values):
        if site.weight_operand is not None:
            operand = operand_value(values[site.weight_operand])
            jax.debug.callback(lambda value: seen.setdefault(site.name, []).append(value), operand, ordered=True)

    jax.jit(rewrite_sites(program.fn, record, inline=inline))(program.weights, *inputs)
    jax.effects_barrier()
    return seen


def assert_layouts_match(program, *inputs):
    """`lay_out` of each stored weight is what its product gets, one step of a stack after the other."""
    sites = {site.name: site for site in find_sites(program) if site.path is not None}
    recorded = operands_seen(program, *inputs, inline=True)
    assert recorded.keys() == sites.keys()
    for name, site in sites.items():
        laid_out = np.asarray(lay_out(program.weights[site.path], site.layout))
        steps = laid_out.reshape(-1, *site.weight.shape)
        np.testing.assert_array_equal(steps, np.stack(recorded[name]), err_msg=name)
        assert laid_out.dtype == site.weight.dtype
        assert laid_out.ndim == len(site.weight.shape) + site.stacked


# Frameworks.


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.Conv(4, (3, 3), name="stem")(image)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = LinenBlock(name="block")(x.reshape(x.shape[0], -1, 4))
        return nn.Dense(3, name="head")(x.mean(1))


def test_linen():
    variables = LinenNet().init(jax.random.key(0), jnp.zeros((1, 6, 6, 2)))
    program = from_linen(LinenNet(), variables, IMAGES)
    sites = find_sites(program)
    assert [(site.name, site.kind, site.weight_operand) for site in sites] == [
        ("params/stem/kernel", "conv_general_dilated", 1),
        ("params/block/attention/query/kernel", "dot_general", 1),
        ("params/block/attention/key/kernel", "dot_general", 1),
        ("params/block/attention/value/kernel", "dot_general", 1),
        ("LinenNet/block/attention/...qhd,...khd->...hqk/dot_general#0", "dot_general", None),
        ("LinenNet/block/attention/...hqk,...khd->...qhd/dot_general#0", "dot_general", None),
        ("params/block/attention/out/kernel", "dot_general", 1),
        ("params/head/kernel", "dot_general", 1),
    ]
    assert sites[1].scope == "LinenNet/block/attention/query"
    assert [site.path for site in sites[4:6]] == [None, None]
    assert {site.repeats for site in sites} == {1}
    assert all(site.exclusive for site in sites)
    assert_layouts_match(program, array(2, 6, 6, 2))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)])
        self.embed = nnx.Embed(5, 6, rngs=rngs)

    def __call__(self, x, tokens):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.embed.attend(x + self.embed(tokens))


def test_nnx_with_a_table_used_twice():
    inputs = ROWS | {"tokens": TensorSpec(("batch",), "int32")}
    program = from_nnx(NNXNet(nnx.Rngs(0)), inputs)
    sites = find_sites(program)
    assert [(site.name, site.kind) for site in sites] == [
        ("layers/0/kernel", "dot_general"),
        ("layers/1/kernel", "dot_general"),
        ("embed/embedding", "gather"),
        ("embed/embedding#1", "dot_general"),
    ]
    assert [site.path for site in sites[2:]] == ["embed/embedding"] * 2
    assert (sites[2].weight.shape, sites[2].output.shape[1:]) == ((5, 6), (6,))
    assert sites[3].weight.shape == (6, 5) or sites[3].params["dimension_numbers"][0][1] == (1,)
    assert_layouts_match(program, array(2, 6), jnp.array([4, 0]))


def test_equinox_weights_are_on_the_left():
    model = eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(0))
    weights, rest = eqx.partition(model, eqx.is_array)
    program = trace(lambda weights, x: jax.vmap(eqx.combine(weights, rest))(x), weights, ROWS)
    sites = find_sites(program)
    assert [site.name for site in sites] == ["layers/0/weight", "layers/1/weight"]
    assert [site.weight.shape for site in sites] == [(8, 6), (3, 8)]
    assert all(site.activation.shape[-1] == site.weight.shape[-1] for site in sites)
    assert_layouts_match(program, array(2, 6))


def test_haiku():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3])(x)))
    program = trace(network.apply, network.init(jax.random.key(0), jnp.zeros((1, 6))), ROWS)
    assert names(program) == ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]
    assert_layouts_match(program, array(2, 6))


# Ways a weight reaches its product.

WAYS = {
    "plain": (lambda w, x: x @ w, (6, 4), (6, 4)),
    "stored transposed": (lambda w, x: x @ w.T, (4, 6), (6, 4)),
    "on the left": (lambda w, x: lax.dot_general(w, x, (((1,), (1,)), ((), ()))), (4, 6), (4, 6)),
    "einsum, on the left": (lambda w, x: jnp.einsum("of,bf->ob", w, x), (4, 6), (4, 6)),
    "fused heads": (lambda w, x: jnp.einsum("bf,fhd->bhd", x, w), (6, 2, 4), (6, 2, 4)),
    "heads, reshaped": (lambda w, x: x @ w.reshape(6, 8), (6, 2, 4), (6, 8)),
    "converted": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (6, 4), (6, 4)),
    "in a jit": (lambda w, x: jax.jit(lambda w: x @ w.T)(w), (4, 6), (6, 4)),
    "in a remat": (lambda w, x: jax.checkpoint(lambda x, w: x @ w)(x, w), (6, 4), (6, 4)),
    "one slice of several": (lambda w, x: x @ w[:, 4:8] + jnp.sum(w), (6, 12), (6, 4)),
    "one layer of a stack": (lambda w, x: x @ w[1] + jnp.sum(w), (3, 6, 4), (6, 4)),
    "expanded and squeezed": (lambda w, x: x @ jnp.squeeze(w[None], 0), (6, 4), (6, 4)),
    "in a loop": (lambda w, x: lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x @ w, x), (6, 6), (6, 6)),
    "in a branch": (lambda w, x: lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x), (6, 6), (6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_one_weight_one_site(way):
    fn, stored, seen = WAYS[way]
    program = trace(lambda weights, x: fn(weights["w"], x), {"w": array(*stored)}, ROWS)
    [site] = find_sites(program)
    assert (site.name, site.path, site.kind) == ("w", "w", "dot_general")
    assert sorted(site.weight.shape) == sorted(seen)
    assert site.weight.dtype == (jnp.bfloat16 if way == "converted" else jnp.float32)
    assert site.activation.shape[-1] == 6
    assert site.container == {"in a loop": "while", "in a branch": "cond"}.get(way, "")
    if way == "on the left":
        assert site.weight_operand == 0
    if site.container == "":
        assert_layouts_match(program, array(2, 6))


def test_a_weight_used_twice_is_numbered_the_same_each_time_it_is_traced():
    def fn(weights, x):
        for _ in range(3):
            x = jax.jit(lambda x, w: x @ w)(x, weights["w"])
        return x

    program = trace(fn, {"w": array(6, 6)}, ROWS)
    assert names(program) == ["w", "w#1", "w#2"]
    for inline in (False, True):
        assert list(operands_seen(program, array(2, 6), inline=inline)) == ["w", "w#1", "w#2"]


def test_a_stack_that_is_scanned():
    def fn(weights, x):
        def layer(x, w):
            with jax.named_scope("layer"):
                x = x.astype(jnp.bfloat16) @ w["k"].T.astype(jnp.bfloat16)
            return x.astype(jnp.float32) @ weights["shared"], None

        return lax.scan(layer, x, weights["stack"])[0]

    program = trace(fn, {"stack": {"k": array(3, 6, 6)}, "shared": array(6, 6, seed=1)}, ROWS)
    stacked, shared = find_sites(program)
    assert (stacked.name, stacked.stacked, stacked.repeats, stacked.container) == ("stack/k", 1, 3, "scan")
    assert (stacked.weight.shape, stacked.weight.dtype) == ((6, 6), jnp.bfloat16)
    assert stacked.scope == "layer"
    assert (shared.name, shared.stacked, shared.repeats) == ("shared", 0, 3)

    laid_out = lay_out(program.weights["stack/k"], stacked.layout)
    np.testing.assert_array_equal(laid_out, np.transpose(program.weights["stack/k"], (0, 2, 1)).astype(jnp.bfloat16))
    for inline in (False, True):
        steps = operands_seen(program, array(2, 6), inline=inline)["stack/k"]
        np.testing.assert_array_equal(np.stack(steps), laid_out)


def test_a_stack_of_stacks():
    def fn(weights, x):
        def inner(x, w):
            return jnp.tanh(x @ w), None

        return lax.scan(lambda x, ws: lax.scan(inner, x, ws), x, weights["w"].reshape(2, 3, 6, 6))[0]

    program = trace(fn, {"w": array(6, 6, 6)}, ROWS)
    [site] = find_sites(program)
    assert (site.stacked, site.repeats, site.weight.shape) == (2, 6, (6, 6))
    assert_layouts_match(program, array(2, 6))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(groups):
    weights = {"kernel": array(3, 3, 4 // groups, 8)}

    def fn(weights, image):
        numbers = ("NHWC", "HWIO", "NHWC")
        kernel = weights["kernel"]
        return lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    program = trace(fn, weights, {"image": TensorSpec(("batch", 5, 5, 4), "float32")})
    [site] = find_sites(program, sizes={"batch": 2})
    assert (site.name, site.kind, site.weight_operand) == ("kernel", "conv_general_dilated", 1)
    assert site.params["feature_group_count"] == groups
    assert (site.weight.shape, site.activation.shape) == ((3, 3, 4 // groups, 8), (2, 5, 5, 4))
    assert site.output.shape == (2, 5, 5, 8)


def test_ragged_dot():
    def fn(weights, x, sizes):
        return lax.ragged_dot(x, weights["experts"], sizes)

    program = trace(fn, {"experts": array(3, 6, 4)}, ROWS | {"sizes": TensorSpec((3,), "int32")})
    [site] = find_sites(program)
    assert (site.name, site.kind, site.weight_operand) == ("experts", "ragged_dot_general", 1)


def test_products_of_activations_are_named_by_scope_and_order():
    def fn(weights, x):
        with jax.named_scope("first"):
            x = (x @ x.T) @ (x @ weights["w"])
        with jax.named_scope("second"):
            return x @ x.T

    program = trace(fn, {"w": array(6, 6)}, {"x": TensorSpec((6, 6), "float32")})
    assert names(program) == ["first/dot_general#0", "w", "first/dot_general#1", "second/dot_general#0"]


def test_what_is_not_a_site():
    def fn(weights, x):
        folded = weights["a"] @ weights["b"]  # arithmetic on weights: no site, but a computed weight
        column = jnp.take(weights["table"], jnp.argmax(x, axis=1), axis=1)  # not whole rows of a table
        return x @ folded + column.T

    program = trace(fn, {"a": array(6, 5), "b": array(5, 4), "table": array(4, 6)}, ROWS)
    assert [(site.path, site.kind) for site in find_sites(program)] == [("dot_general:a+b", "dot_general")]


def test_a_weight_used_elsewhere_too_is_not_exclusive():
    def fn(weights, x):
        return x @ weights["w"] + weights["w"].sum() + x @ weights["v"]

    program = trace(fn, {"w": array(6, 4), "v": array(6, 4)}, ROWS)
    assert {site.name: site.exclusive for site in find_sites(program)} == {"w": False, "v": True}


def test_dead_products_are_not_sites():
    def fn(weights, x):
        _ = x @ weights["dead"]
        return x @ weights["w"]

    assert names(trace(fn, {"w": array(6, 4), "dead": array(6, 4)}, ROWS)) == ["w"]


def test_in_a_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def fn(weights, x):
        run = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
        return run(weights["w"], x)

    [site] = find_sites(trace(fn, {"w": array(6, 4)}, ROWS), sizes={"batch": 8})
    assert (site.name, site.container, site.activation.shape) == ("w", "shard_map", (4, 6))


def test_sizes_are_those_asked_for_and_may_be_symbolic():
    program = trace(lambda w, x: jnp.tanh(x @ w["w"]), {"w": array(6, 4)}, ROWS)
    [site] = find_sites(program, sizes={"batch": 13})
    assert (site.activation.shape, site.output.shape) == ((13, 6), (13, 4))

    (batch,) = jax.export.symbolic_shape("batch")
    [site] = find_sites(program, sizes={"batch": batch})
    assert (site.activation.shape, site.output.shape) == ((batch, 6), (batch, 4))
    doubled = rewrite_sites(program.fn, lambda site, context, eqn, values: [2 * context.bind(eqn, values)[0]])
    exported = jax.export.export(jax.jit(doubled))(
        lp.abstract(program.weights), *program.abstract_inputs({"batch": batch})
    )
    x = array(5, 6)
    np.testing.assert_allclose(exported.call(program.weights, x), np.tanh(2 * (x @ program.weights["w"])), rtol=1e-5)


def test_weights_of_another_kind_in_a_weights_place():
    """`like` is the shape the function was written for; the rule gets what stands in the weight's place."""
    program = trace(
        lambda w, x: x @ w["stack"][0].T + w["bias"][None], {"stack": array(2, 4, 6), "bias": array(4)}, ROWS
    )

    def rule(site, context, eqn, values):
        codes, scale = operand_value(values[1])
        assert [op.eqn.primitive.name for op in site.layout] == ["slice", "squeeze", "transpose"]
        dense = lay_out(codes.astype(jnp.float32) * scale, site.layout)
        return context.bind(eqn, [values[0], dense])

    codes = jnp.round(program.weights["stack"] * 10).astype(jnp.int8)
    weights = {"stack": (codes, jnp.float32(0.1)), "bias": program.weights["bias"]}
    run = rewrite_sites(program.fn, rule, like=lp.abstract(program.weights))
    x = array(3, 6)
    want = np.asarray(x) @ (np.asarray(codes[0], np.float32) * np.float32(0.1)).T + np.asarray(weights["bias"])
    np.testing.assert_allclose(jax.jit(run)(weights, x), want, rtol=1e-5)


def test_kinds_are_the_primitives_looked_for():
    assert SITE_PRIMITIVES == ("dot_general", "conv_general_dilated", "ragged_dot_general", "gather")
