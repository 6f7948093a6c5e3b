"""The walker keeps values, derivatives, shardings, names and effects of a function."""

import dataclasses
import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lepton_xla import _compat
from lepton_xla.errors import UnsupportedError
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.walker import Context, TracedValue

either_way = pytest.mark.parametrize("inline", [False, True])


def same(context, eqn, values):
    return context.bind(eqn, values)


def twice(context, eqn, values):
    return [2 * out for out in context.bind(eqn, values)]


def tap(context, eqn, values):
    out = context.bind(eqn, values)
    context.tap("peak", jnp.max(jnp.abs(out[0])))
    return out


IDENTITY = {"dot_general": same, "conv_general_dilated": same}
TWICE = {"dot_general": twice}
TAP = {"dot_general": tap}


def array(*shape, seed=0, scale=0.5):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


def plain_dot(x, w):
    return x @ w


def double_dot(x, w):
    return 2 * (x @ w)


def close(got, want, rtol=2e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def primitives(jaxpr):
    """Names of all primitives of a jaxpr and what is inside, with repeats."""
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in _compat.inner_jaxprs(eqn):
            yield from primitives(inner)


def equations(jaxpr, name):
    """Every equation of a primitive in a jaxpr and what is inside."""
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in _compat.inner_jaxprs(eqn):
            yield from equations(inner, name)


# Whole models.


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.dense = nnx.Linear(4 * 36, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.norm(self.conv(x)))
        return self.dense(x.reshape(x.shape[0], -1))


def linen_model():
    images = array(3, 6, 6, 1)
    variables = LinenNet().init(jax.random.key(0), images)
    return LinenNet().apply, variables, images


def nnx_model():
    graph, state = nnx.split(NNXNet(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state, array(3, 6, 6, 1)


def equinox_model():
    model = eqx.nn.MLP(6, 5, 8, 2, activation=jax.nn.silu, key=jax.random.key(0))
    weights, rest = eqx.partition(model, eqx.is_array)
    return lambda weights, x: jax.vmap(eqx.combine(weights, rest))(x), weights, array(3, 6)


def haiku_model():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 5])(x)))
    x = array(3, 6)
    return network.apply, network.init(jax.random.key(0), x), x


@either_way
@pytest.mark.parametrize("make", [linen_model, nnx_model, equinox_model, haiku_model])
def test_models_keep_values_and_gradients(make, inline):
    fn, weights, x = make()
    rewritten = rewrite(fn, IDENTITY, inline=inline)
    close(jax.jit(rewritten)(weights, x), jax.jit(fn)(weights, x))

    def loss(run, weights):
        return jnp.sum(run(weights, x) ** 2)

    # Batch norm's running statistics have gradients too: every leaf is compared.
    close(
        jax.jit(jax.grad(functools.partial(loss, rewritten)))(weights),
        jax.jit(jax.grad(functools.partial(loss, fn)))(weights),
        rtol=2e-5,
    )


def attention(dot, weights, x):
    """One pre-norm transformer block; `dot` multiplies by a weight."""

    def normed(x):
        return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

    h = normed(x)
    q, k, v = (dot(h, weights[name]).reshape(*x.shape[:-1], 2, -1) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape)
    x = x + dot(mixed, weights["o"])
    return x + dot(jax.nn.gelu(dot(normed(x), weights["up"])), weights["down"])


def stack_of_blocks(layers=3, width=8):
    shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
    shapes |= {"up": (width, 2 * width), "down": (2 * width, width)}
    return {name: array(layers, *shape, seed=i, scale=0.2) for i, (name, shape) in enumerate(shapes.items())}


@either_way
@pytest.mark.parametrize("remat", [False, True])
def test_scanned_transformer_keeps_values_and_gradients(inline, remat):
    weights, x = stack_of_blocks(), array(2, 5, 8, seed=9)

    def model(weights, x):
        def block(x, layer):
            return attention(plain_dot, layer, x), None

        return lax.scan(jax.checkpoint(block) if remat else block, x, weights)[0]

    rewritten = rewrite(model, IDENTITY, inline=inline)
    close(jax.jit(rewritten)(weights, x), jax.jit(model)(weights, x))
    assert list(primitives(jax.make_jaxpr(rewritten)(weights, x))).count("scan") == 1
    want = jax.jit(jax.grad(lambda w: jnp.sum(model(w, x) ** 2)))(weights)
    close(jax.jit(jax.grad(lambda w: jnp.sum(rewritten(w, x) ** 2)))(weights), want, rtol=1e-4)


# Containers: each function is written over the product it uses, so that the rule that doubles every product has an
# independent reference, the same function over a doubled product.


def in_jit(dot, x, w):
    return jax.jit(lambda x, w: jnp.tanh(dot(x, w)))(x, w) + dot(x, w)


def in_scan(dot, x, w):
    ws = jnp.stack([w, 2 * w, -w])
    carry, ys = lax.scan(lambda c, step: (jnp.tanh(dot(c, step[0])), dot(step[1], w)), x, (ws, jnp.stack([x] * 3)))
    return {"carry": carry, "ys": ys}


def in_reverse_scan(dot, x, w):
    carry, ys = lax.scan(lambda c, f: (jnp.sin(dot(c, w)) * f, c), x, jnp.arange(4.0), reverse=True, unroll=2)
    return carry, ys


def in_scan_without_xs(dot, x, w):
    return lax.scan(lambda c, _: (jnp.tanh(dot(c, w)), None), x, length=3)


def in_while(dot, x, w):
    def body(state):
        count, x = state
        return count + 1, jnp.tanh(dot(x, w))

    return lax.while_loop(lambda state: (state[0] < 4) & (jnp.sum(dot(state[1], w)) > -1e6), body, (0, x))


def in_fori(dot, x, w):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(dot(x, w) + i), x)


def in_dynamic_fori(dot, x, w):
    return lax.fori_loop(0, jnp.argmax(x[0]) + 2, lambda i, x: jnp.tanh(dot(x, w)), x)


def in_cond(dot, x, w):
    return lax.cond(x[0, 0] > 0, lambda x: dot(x, w), lambda x: x, x)


def in_switch(dot, x, w):
    branches = [lambda x: x, lambda x: dot(x, w), lambda x: jnp.sin(dot(dot(x, w), w))]
    return [lax.switch(i, branches, x) for i in range(3)] + [lax.switch(jnp.argmax(x[1]), branches, x)]


def in_remat(dot, x, w):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(lambda x: jnp.sin(dot(jnp.tanh(dot(x, w)), w)), policy=policy)(x)


def in_custom_jvp(dot, x, w):
    @jax.custom_jvp
    def act(x, w):
        return jnp.tanh(dot(x, w))

    act.defjvp(lambda primals, tangents: (act(*primals), tangents[0] * 3))
    return act(x, w)


def in_custom_vjp(dot, x, w):
    @jax.custom_vjp
    def act(x, w):
        return jnp.tanh(dot(x, w))

    act.defvjp(lambda x, w: (act(x, w), w), lambda w, g: (g * 3, w))
    return act(x, w)


def in_shard_map(dot, x, w):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = jnp.concatenate([x, x])
    return jax.shard_map(
        lambda x, w: (dot(x, w), lax.psum(dot(x, w).sum(), "data")),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=(P("data"), P()),
    )(rows, w)


def in_everything(dot, x, w):
    @jax.custom_vjp
    def act(x, w):
        return dot(x, w)

    act.defvjp(lambda x, w: (act(x, w), w), lambda w, g: (g, w))

    def body(x, flag):
        inner = jax.jit(lambda x: lax.fori_loop(0, 2, lambda _, x: jnp.tanh(act(x, w)), x))
        return lax.cond(flag, jax.checkpoint(inner), lambda x: dot(x, w), x), flag

    return jax.jit(lambda x: lax.scan(body, x, jnp.array([True, False, True])))(x)


def in_vmap(dot, x, w):
    return jax.vmap(lambda row: jax.jit(dot)(row, w), out_axes=1)(x)


def in_vmapped_while(dot, x, w):
    def run(limit, row):
        return lax.while_loop(lambda s: s[0] < limit, lambda s: (s[0] + 1, jnp.tanh(dot(s[1], w))), (0, row))

    return jax.vmap(run)(jnp.array([1, 4, 0, 2]), x)


def in_grad(dot, x, w):
    return jax.value_and_grad(lambda x: jnp.sum(jnp.tanh(dot(x, w)) ** 2))(x)


CONTAINERS = [
    in_jit, in_scan, in_reverse_scan, in_scan_without_xs, in_while, in_fori, in_dynamic_fori, in_cond, in_switch,
    in_remat, in_custom_jvp, in_custom_vjp, in_shard_map, in_everything, in_vmap, in_vmapped_while, in_grad,
]  # fmt: skip
# Reverse-mode differentiation through a `while` is not defined, whoever writes it.
DIFFERENTIABLE = [fn for fn in CONTAINERS if fn not in (in_while, in_vmapped_while, in_dynamic_fori)]
OWN_DERIVATIVE = (in_custom_jvp, in_custom_vjp, in_everything)


@either_way
@pytest.mark.parametrize("fn", CONTAINERS)
def test_containers_keep_their_values(fn, inline):
    x, w = array(4, 4), array(4, 4, seed=1)
    model = functools.partial(fn, plain_dot)
    close(jax.jit(rewrite(model, IDENTITY, inline=inline))(x, w), jax.jit(model)(x, w))


@either_way
@pytest.mark.parametrize("fn", [fn for fn in CONTAINERS if fn is not in_grad])
def test_a_rule_reaches_inside_every_container(fn, inline):
    x, w = array(4, 4), array(4, 4, seed=1)
    got = jax.jit(rewrite(functools.partial(fn, plain_dot), TWICE, inline=inline))(x, w)
    close(got, jax.jit(functools.partial(fn, double_dot))(x, w))
    with pytest.raises(AssertionError):
        close(got, jax.jit(functools.partial(fn, plain_dot))(x, w))


@either_way
def test_a_rule_reaches_the_products_of_a_derivative(inline):
    x, w = array(4, 4), array(4, 4, seed=1)
    got = rewrite(lambda x: jax.grad(lambda x: jnp.sum(x @ w))(x), TWICE, inline=inline)(x)
    close(got, 2 * jnp.broadcast_to(w.sum(1), (4, 4)))


# Inlining drops a function's own derivative, by definition.
@pytest.mark.parametrize(
    ("fn", "inline"),
    [(fn, inline) for fn in DIFFERENTIABLE for inline in (False, True) if not (inline and fn in OWN_DERIVATIVE)],
)
def test_containers_keep_their_gradients(fn, inline):
    x, w = array(4, 4), array(4, 4, seed=1)

    def loss(run, x, w):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(run(plain_dot, x, w)) if leaf.dtype == x.dtype)

    want = jax.jit(jax.grad(functools.partial(loss, fn), argnums=(0, 1)))(x, w)
    rewritten = lambda dot, x, w: rewrite(functools.partial(fn, dot), IDENTITY, inline=inline)(x, w)  # noqa: E731
    close(jax.jit(jax.grad(functools.partial(loss, rewritten), argnums=(0, 1)))(x, w), want, rtol=1e-5)


@pytest.mark.parametrize("fn", [in_jit, in_scan, in_cond, in_remat, in_custom_jvp])
def test_forward_mode_of_a_rewritten_function(fn):
    x, w, t = array(4, 4), array(4, 4, seed=1), array(4, 4, seed=2)
    model = functools.partial(fn, plain_dot)
    want = jax.jvp(lambda x: model(x, w), (x,), (t,))[1]
    close(jax.jvp(lambda x: rewrite(model, IDENTITY)(x, w), (x,), (t,))[1], want, rtol=1e-5)


@either_way
@pytest.mark.parametrize("fn", [in_jit, in_scan, in_while, in_cond, in_remat, in_custom_jvp, in_custom_vjp])
def test_vmap_of_a_rewritten_function(fn, inline):
    xs, w = array(3, 4, 4), array(4, 4, seed=1)
    want = jax.vmap(functools.partial(fn, double_dot), in_axes=(0, None))(xs, w)
    close(jax.vmap(rewrite(functools.partial(fn, plain_dot), TWICE, inline=inline), in_axes=(0, None))(xs, w), want)


def test_own_derivatives_stay_while_the_value_changes():
    x, w, g = array(4, 4), array(4, 4, seed=1), array(4, 4, seed=2)
    for fn, tangent_of_w in ((in_custom_jvp, 0 * w), (in_custom_vjp, w)):
        value, pullback = jax.vjp(rewrite(functools.partial(fn, plain_dot), TWICE), x, w)
        close(value, jnp.tanh(2 * (x @ w)))
        close(pullback(g), (3 * g, tangent_of_w))


def test_custom_vjp_with_integer_and_nondifferentiable_arguments():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def pick(power, table, index):
        return (table @ table)[index] ** power

    pick.defvjp(
        lambda power, table, index: (pick(power, table, index), index),
        lambda power, index, g: (jnp.zeros((4, 4)).at[index].add(power * g), None),
    )
    table, index = array(4, 4), jnp.array([2, 0])
    model = lambda table, index: pick(2, table, index)  # noqa: E731
    close(rewrite(model, IDENTITY)(table, index), model(table, index))
    got = jax.grad(lambda t: rewrite(model, TWICE)(t, index).sum())(table)
    np.testing.assert_array_equal(got, np.array([[2.0] * 4, [0] * 4, [2] * 4, [0] * 4]))


def test_remat_policy_stays():
    model = functools.partial(in_remat, plain_dot)
    x, w = array(4, 4), array(4, 4, seed=1)
    before, after = (
        next(equations(jax.make_jaxpr(fn)(x, w), "remat2")).params for fn in (model, rewrite(model, IDENTITY))
    )
    assert after["policy"] is before["policy"] is not None
    assert after["prevent_cse"] == before["prevent_cse"]
    saved, kept = (
        list(primitives(jax.make_jaxpr(jax.grad(lambda x, fn=fn: fn(x, w).sum()))(x)))
        for fn in (model, rewrite(model, IDENTITY))
    )
    assert kept.count("dot_general") == saved.count("dot_general")
    assert kept.count("tanh") == saved.count("tanh")


def test_remat_of_a_derivative_taken_inside():
    """Rewriting a training step: the recomputation must stay behind its barrier."""
    x, w = array(4, 4), array(4, 4, seed=1)

    def step(w):
        return jax.grad(lambda w: jnp.sum(jax.checkpoint(lambda w: jnp.sin(jnp.sin(x @ w) @ w))(w)))(w)

    before, after = (
        [eqn.params["differentiated"] for eqn in equations(jax.make_jaxpr(fn)(w), "remat2")]
        for fn in (step, rewrite(step, IDENTITY))
    )
    assert before == after == [True]
    close(jax.jit(rewrite(step, IDENTITY))(w), jax.jit(step)(w), rtol=1e-5)


# `jit` parameters and sharding.


def test_jit_parameters_stay():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def product(x, w, unused):
        return {"y": x @ w}

    inner = jax.jit(
        product,
        in_shardings=(rows, whole, None),
        out_shardings=rows,
        donate_argnums=(0,),
        keep_unused=True,
    )
    x, w = array(4, 4), array(4, 4, seed=1)
    args = (x, w, jnp.zeros(4))
    before = next(equations(jax.make_jaxpr(inner)(*args), "jit")).params
    after = next(equations(jax.make_jaxpr(rewrite(inner, TWICE))(*args), "jit")).params
    kept = ("name", "in_shardings", "out_shardings", "donated_invars", "keep_unused", "inline")
    for name in kept:
        assert after[name] == before[name], name
    assert after["donated_invars"] == (True, False, False)
    assert after["in_shardings"][0] == rows

    constrained = jax.make_jaxpr(rewrite(inner, TWICE, inline=True))(*args)
    shardings = [eqn.params["sharding"] for eqn in equations(constrained, "sharding_constraint")]
    assert shardings == [rows, whole, rows]
    close(rewrite(inner, TWICE, inline=True)(*args), {"y": 2 * (x @ w)})


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(fn, *args):
    text = jax.jit(fn).lower(*args).compile().as_text()
    return {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in COLLECTIVES}


@either_way
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_function_keeps_numbers_and_collectives(kind, inline):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x = jax.device_put(array(4, 8), NamedSharding(mesh, P(None, None)))
        up = jax.device_put(array(8, 8, seed=1), NamedSharding(mesh, P(None, "model")))
        down = jax.device_put(array(8, 8, seed=2), NamedSharding(mesh, P("model", None)))

        def model(x, up, down):
            def block(x, _):
                hidden = jax.nn.relu(x @ up)
                out = P(None, None) if kind is AxisType.Explicit else None
                x = x + jnp.einsum("bh,ho->bo", hidden, down, out_sharding=out)
                return x / (1 + jnp.max(jnp.abs(x))), None

            return lax.scan(block, x, length=2)[0]

        rewritten = rewrite(model, IDENTITY, inline=inline)
        close(jax.jit(rewritten)(x, up, down), jax.jit(model)(x, up, down))
        want = collectives(model, x, up, down)
        assert want["all-reduce"] >= 1
        assert collectives(rewritten, x, up, down) == want

        specs = [
            [str(eqn.params["out_sharding"]) for eqn in equations(jax.make_jaxpr(fn)(x, up, down), "dot_general")]
            for fn in (model, rewritten)
        ]
        assert specs[0] == specs[1]
        assert any(spec != "None" for spec in specs[0]) == (kind is AxisType.Explicit)

        def loss(fn):
            return lambda up: jnp.sum(fn(x, up, down) ** 2)

        close(jax.jit(jax.grad(loss(rewritten)))(up), jax.jit(jax.grad(loss(model)))(up), rtol=1e-4)
        assert collectives(jax.grad(loss(rewritten)), up) == collectives(jax.grad(loss(model)), up)


def test_shard_map_parameters_stay():
    x, w = array(4, 4), array(4, 4, seed=1)
    model = functools.partial(in_shard_map, plain_dot)
    before, after = (
        next(equations(jax.make_jaxpr(fn)(x, w), "shard_map")).params for fn in (model, rewrite(model, IDENTITY))
    )
    for name in ("mesh", "in_specs", "out_specs", "check_vma", "manual_axes", "newly_manual_axes"):
        if name in before:
            assert after[name] == before[name], name


@either_way
def test_shard_map_over_one_of_two_axes(inline):
    mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, w = array(4, 4), array(4, 4, seed=1)

    @jax.jit
    def model(x, w):
        return jax.shard_map(
            lambda x, w: lax.psum(x.T @ x @ w, "data"),
            mesh=mesh,
            in_specs=(P("data"), P()),
            out_specs=P(),
            axis_names={"data"},
        )(x, w)

    close(jax.jit(rewrite(model, IDENTITY, inline=inline))(x, w), model(x, w))
    want = jax.grad(lambda w: model(x, w).sum())(w)
    close(jax.grad(lambda w: rewrite(model, IDENTITY, inline=inline)(x, w).sum())(w), want)


# Names, effects, keys and the odd values.


def scoped(x, w):
    with jax.named_scope("outer"):

        def body(x, _):
            with jax.named_scope("layer"):
                return jnp.tanh(x @ w), None

        with jax.named_scope("loop"):
            x, _ = lax.scan(body, x, length=2)
        with jax.named_scope("head"):
            return jax.jit(lambda x: x @ w)(x)


def name_stacks(fn, *args):
    return [str(eqn.source_info.name_stack) for eqn in equations(jax.make_jaxpr(fn)(*args), "dot_general")]


def test_name_stacks_stay():
    x, w = array(4, 4), array(4, 4, seed=1)
    assert name_stacks(scoped, x, w) == ["layer", ""]
    assert name_stacks(rewrite(scoped, IDENTITY), x, w) == ["layer", ""]
    assert name_stacks(rewrite(scoped, IDENTITY, inline=True), x, w) == ["layer", "outer/head"]

    def op_names(fn):
        text = jax.jit(fn).lower(x, w).as_text(debug_info=True)
        return [name for name in ("outer/loop/while/body/closed_call/layer/dot_general", "outer/head") if name in text]

    assert op_names(rewrite(scoped, IDENTITY)) == op_names(scoped)
    assert op_names(scoped)


@either_way
def test_what_a_rule_adds_carries_the_names_of_what_it_replaces(inline):
    x, w = array(4, 4), array(4, 4, seed=1)

    def named(x, w):
        with jax.named_scope("head"):
            return x @ w

    [product] = equations(jax.make_jaxpr(rewrite(named, TWICE, inline=inline))(x, w), "mul")
    assert str(product.source_info.name_stack) == "head"


@either_way
def test_a_rule_sees_where_it_is(inline):
    seen = []

    def look(context: Context, eqn, values):
        seen.append((context.scope, context.repeats, context.container))

    x, w = array(4, 4), array(4, 4, seed=1)
    jax.eval_shape(rewrite(scoped, {"dot_general": look}, inline=inline), x, w)
    assert list(dict.fromkeys(seen)) == [("outer/loop/layer", 2, "scan"), ("outer/head", 1, "")]


@either_way
def test_random_keys_pass_through(inline):
    def model(key, x):
        def body(key, _):
            key, sub = jax.random.split(key)
            return key, (x @ x) * jax.random.normal(sub, x.shape)

        return lax.scan(body, key, length=3)

    key, x = jax.random.key(3), array(4, 4)
    (got_key, got), (want_key, want) = rewrite(model, IDENTITY, inline=inline)(key, x), model(key, x)
    assert got_key.dtype == want_key.dtype
    np.testing.assert_array_equal(jax.random.key_data(got_key), jax.random.key_data(want_key))
    close(got, want)


@either_way
def test_effects_keep_their_order(inline):
    seen = []

    def model(x):
        jax.debug.callback(lambda v: seen.append(("first", float(v))), x[0, 0], ordered=True)

        def body(x, step):
            jax.debug.callback(lambda v: seen.append(("step", float(v))), step, ordered=True)
            return x @ x, None

        x, _ = lax.scan(body, x, jnp.arange(2.0))
        jax.debug.callback(lambda v: seen.append(("last", float(v))), x[0, 0], ordered=True)
        return x

    eye = jnp.eye(2)
    jax.block_until_ready(jax.jit(rewrite(model, IDENTITY, inline=inline))(eye))
    jax.effects_barrier()
    assert seen == [("first", 1), ("step", 0), ("step", 1), ("last", 1)]


@either_way
def test_closed_over_tracers(inline):
    x, w = array(4, 4), array(4, 4, seed=1)

    def outer(run, w):
        return jnp.sum(run(lambda x: lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=2)[0])(x))

    transform = functools.partial(rewrite, rules=IDENTITY, inline=inline)
    want = jax.jit(jax.grad(functools.partial(outer, lambda fn: fn)))(w)
    close(jax.jit(jax.grad(functools.partial(outer, transform)))(w), want)


@either_way
def test_trees_keywords_and_plain_numbers(inline):
    def model(tree, scale, *, bias):
        y = tree["x"] @ tree["w"][0]
        return {"y": y * scale + bias["b"], "none": None, "n": (y > 0).sum(), "sign": y > 0, "fixed": 3 * scale}

    tree = {"x": array(2, 3), "w": (array(3, 4, seed=1),)}
    for scale in (2.0, jnp.float32(2), np.float32(2)):
        got = rewrite(model, IDENTITY, inline=inline)(tree, scale, bias={"b": 0.5})
        close(got, jax.jit(model)(tree, scale, bias={"b": 0.5}))
    assert got["n"].dtype == jnp.int32
    assert got["sign"].dtype == jnp.bool_


@either_way
def test_weak_types_in_loops(inline):
    def model(x):
        def body(state):
            i, total, x = state
            return i + 1, total + 1.5, x @ x

        scanned, _ = lax.scan(lambda c, _: ((c[0] + 1, c[1] @ c[1]), None), (0.0, x), length=2)
        return lax.while_loop(lambda state: state[0] < 3, body, (0, 0.0, x)), scanned

    close(rewrite(model, IDENTITY, inline=inline)(array(2, 2)), model(array(2, 2)))
    close(jax.jit(rewrite(model, IDENTITY, inline=inline))(array(2, 2)), model(array(2, 2)))


@either_way
def test_rewriting_twice(inline):
    x, w = array(4, 4), array(4, 4, seed=1)
    once = rewrite(functools.partial(in_everything, plain_dot), TWICE, inline=inline)
    want = in_everything(lambda x, w: 4 * (x @ w), x, w)
    close(rewrite(once, TWICE, inline=inline)(x, w), want)


@either_way
def test_a_rule_for_every_primitive_leaves_scatters_and_reductions_alone(inline):
    seen = []

    def look(context, eqn, values):
        seen.append(eqn.primitive.name)

    def model(x):
        total = lax.reduce(x, jnp.float32(0), lambda a, b: a + b * b, (0,))
        return jax.jit(lambda x: x.at[0].add(1.0))(x) + total[None]

    x = array(4, 4)
    close(rewrite(model, {"*": look}, inline=inline)(x), model(x))
    assert {"scatter-add", "reduce", "add"} <= set(seen)
    assert not {"jit", "mul"} & set(seen)


# Containers that the walker does not know.


def linear_solve(x, w):
    def solve(_, b):
        return jnp.linalg.solve(w, b)

    return lax.custom_linear_solve(lambda v: w @ v, x, solve, transpose_solve=lambda _, b: jnp.linalg.solve(w.T, b))


def batched_by_hand(x, w):
    @jax.custom_batching.custom_vmap
    def product(x, w):
        return x @ w

    product.def_vmap(lambda _size, _batched, x, w: (x @ w, True))
    return product(x, w)


@either_way
@pytest.mark.parametrize(("fn", "name"), [(linear_solve, "custom_linear_solve"), (batched_by_hand, "custom_vmap_call")])
def test_an_unknown_container_is_refused_by_name_or_kept(fn, name, inline):
    x, w = array(4), array(4, 4) + 3 * jnp.eye(4)

    def model(x, w):
        with jax.named_scope("solver"):
            return fn(x, w) if fn is linear_solve else fn(x[None], w)[0]

    with pytest.raises(UnsupportedError, match=rf"`{name}`, which holds a `dot_general`"):
        rewrite(model, TWICE, inline=inline)(x, w)
    with pytest.raises(UnsupportedError, match="solver"):
        rewrite(model, TWICE, inline=inline)(x, w)
    close(rewrite(model, TWICE, inline=inline, on_unknown="keep")(x, w), model(x, w), rtol=1e-5)
    # Nothing in it that this rule is for: passed through.
    close(rewrite(model, {"conv_general_dilated": twice}, inline=inline)(x, w), model(x, w), rtol=1e-5)


@either_way
def test_what_stands_around_a_kept_container_is_rewritten(inline):
    x, w = array(4, 4), array(4, 4, seed=1)
    got = rewrite(lambda x, w: batched_by_hand(x @ w, w), TWICE, inline=inline, on_unknown="keep")(x, w)
    close(got, 2 * (x @ w) @ w)


# Taps.


def tapped(fn, *args, inline=True):
    return jax.jit(rewrite(fn, TAP, inline=inline, with_taps=True))(*args)


@either_way
def test_taps_at_the_top_take_the_largest(inline):
    x, w = array(4, 4), array(4, 4, seed=1)
    _, taps = tapped(lambda x, w: (x @ w, jax.jit(lambda x: 3 * (x @ w) @ w)(x)), x, w, inline=inline)
    first = np.asarray(x) @ np.asarray(w)
    np.testing.assert_allclose(taps["peak"], max(abs(first).max(), abs(3 * first @ np.asarray(w)).max()), rtol=1e-6)


@either_way
def test_taps_out_of_a_scan_are_stacked(inline):
    x, ws = array(4, 4), array(3, 4, 4, seed=1)
    for reverse in (False, True):
        model = lambda x, ws: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws, reverse=reverse)[0]  # noqa: B023, E731
        _, taps = tapped(model, x, ws, inline=inline)
        want, state = np.zeros(3), np.asarray(x, np.float64)
        for step in range(3)[:: -1 if reverse else 1]:
            product = state @ np.asarray(ws[step], np.float64)
            want[step], state = abs(product).max(), np.tanh(product)
        np.testing.assert_allclose(taps["peak"], want, rtol=1e-5)


@either_way
def test_taps_out_of_a_while_take_the_largest(inline):
    x, w = array(4, 4), array(4, 4, seed=1)
    model = lambda x, w: lax.while_loop(lambda s: s[0] < 5, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]  # noqa: E731
    _, taps = tapped(model, x, w, inline=inline)
    powers = [np.asarray(x, np.float64)]
    for _ in range(5):
        powers.append(powers[-1] @ np.asarray(w, np.float64))
    np.testing.assert_allclose(taps["peak"], max(abs(power).max() for power in powers[1:]), rtol=1e-5)


@either_way
def test_taps_out_of_the_condition_of_a_while(inline):
    x, w = array(4, 4), array(4, 4, seed=1)
    model = lambda x, w: lax.while_loop(lambda x: jnp.max(jnp.abs(x @ w)) < 10, lambda x: 2 * x, x)  # noqa: E731
    out, taps = tapped(model, x, w, inline=inline)
    np.testing.assert_allclose(taps["peak"], abs(np.asarray(out) @ np.asarray(w)).max(), rtol=1e-6)
    assert taps["peak"] >= 10


@either_way
def test_a_tap_in_a_branch_not_taken_is_zero(inline):
    x, w = array(4, 4), array(4, 4, seed=1)
    for flag, peak in ((True, abs(np.asarray(x) @ np.asarray(w)).max()), (False, 0)):
        model = lambda flag, x: lax.cond(flag, lambda x: x @ w, lambda x: x, x)  # noqa: E731
        _, taps = tapped(model, flag, x, inline=inline)
        np.testing.assert_allclose(taps["peak"], peak, rtol=1e-6)


@either_way
@pytest.mark.parametrize("spec", [P("data"), P()])
def test_taps_out_of_a_shard_map_take_the_largest(spec, inline):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, w = array(4, 4).at[3].mul(10), array(4, 4, seed=1)
    model = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
    _, taps = tapped(model, x, w, inline=inline)
    assert taps["peak"].shape == ()
    np.testing.assert_allclose(taps["peak"], abs(np.asarray(x) @ np.asarray(w)).max(), rtol=1e-6)


def test_taps_out_of_remat_and_out_of_custom_derivatives():
    x, w = array(4, 4), array(4, 4, seed=1)
    remat = lambda x, w: jax.checkpoint(plain_dot)(x, w)  # noqa: E731
    want = abs(np.asarray(x) @ np.asarray(w)).max()
    for inline in (False, True):
        np.testing.assert_allclose(tapped(remat, x, w, inline=inline)[1]["peak"], want, rtol=1e-6)
    custom = functools.partial(in_custom_vjp, plain_dot)
    np.testing.assert_allclose(tapped(custom, x, w)[1]["peak"], want, rtol=1e-6)
    with pytest.raises(UnsupportedError, match="`custom_vjp_call` cannot be tapped"):
        tapped(custom, x, w, inline=False)


# TracedValue values.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halved(TracedValue):
    """Stands for twice the array it holds."""

    half: jax.Array

    def materialize(self):
        return 2 * self.half


@either_way
def test_carried_values_go_through_containers_and_materialize_where_no_rule_is(inline):
    w = array(4, 4, seed=1)
    seen = []

    def product(context, eqn, values):
        seen.append(isinstance(values[1], Halved))
        return context.bind(eqn, values)

    def run(fn, x):
        new = rewrite(
            functools.partial(fn, plain_dot),
            {"dot_general": product},
            inline=inline,
            prepare=lambda x, w: (x, Halved(w / 2)),
        )
        return jax.jit(new)(x, w)

    x = array(4, 4)
    for fn in (in_jit, in_fori, in_cond, in_remat, in_custom_jvp, in_custom_vjp, in_everything, in_scan):
        seen.clear()
        close(run(fn, x), jax.jit(functools.partial(fn, plain_dot))(x, w))
        assert any(seen), fn.__name__


# Taps that are added up: here the number of products and the sum of what they give.


def tap_sum(context, eqn, values):
    out = context.bind(eqn, values)
    context.tap("total", jnp.sum(out[0], axis=0), "sum")
    context.tap("count", jnp.int32(1), "sum")
    context.tap("peak", jnp.max(jnp.abs(out[0])))
    return out


def totals(fn, *args, inline=True):
    return jax.jit(rewrite(fn, {"dot_general": tap_sum}, inline=inline, with_taps=True))(*args)[1]


def assert_totals(taps, products, count=None):
    want = sum(np.asarray(product, np.float64).sum(0) for product in products)
    np.testing.assert_allclose(taps["total"], want, rtol=1e-5, atol=1e-5)
    assert int(taps["count"]) == (len(products) if count is None else count)
    np.testing.assert_allclose(np.max(taps["peak"]), max(abs(np.asarray(p)).max() for p in products), rtol=1e-5)


def chain(x, ws, between=lambda y: y):
    """The products of `x @ w` for one `w` after the other, in float64."""
    products, state = [], np.asarray(x, np.float64)
    for w in ws:
        products.append(state @ np.asarray(w, np.float64))
        state = between(products[-1])
    return products


@either_way
def test_sums_of_repeated_taps_and_of_calls(inline):
    x, w = array(4, 4), array(4, 4, seed=1)
    model = lambda x, w: jax.checkpoint(lambda x: jax.jit(plain_dot)(x, w) @ w)(x) @ w  # noqa: E731
    assert_totals(totals(model, x, w, inline=inline), chain(x, [w, w, w]))


@either_way
@pytest.mark.parametrize("reverse", [False, True])
def test_sums_out_of_scans_keep_their_shape(reverse, inline):
    x, ws = array(4, 4), array(3, 4, 4, seed=1)

    def layers(x, w):
        return lax.scan(lambda x, v: (jnp.tanh(x @ (v * w)), None), x, ws, reverse=reverse)[0], None

    taps = totals(lambda x, scales: lax.scan(layers, x, scales)[0], x, jnp.ones(2), inline=inline)
    assert taps["peak"].shape == (2, 3)
    order = ws[::-1] if reverse else ws
    assert_totals(taps, chain(x, [*order, *order], np.tanh))


def test_sums_out_of_a_scan_without_steps_are_zero():
    taps = totals(lambda x, ws: lax.scan(lambda x, w: (x @ w, None), x, ws)[0], array(4, 4), jnp.zeros((0, 4, 4)))
    assert int(taps["count"]) == 0
    np.testing.assert_array_equal(taps["total"], np.zeros(4))


@either_way
def test_sums_out_of_a_while_and_its_condition(inline):
    x, w = array(4, 4), array(4, 4, seed=1)
    model = lambda x, w: lax.while_loop(lambda s: s[0] < 5, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]  # noqa: E731
    assert_totals(totals(model, x, w, inline=inline), chain(x, [w] * 5))
    tested = lambda x, w: lax.while_loop(lambda x: jnp.max(jnp.abs(x @ w)) < 10, lambda x: 2 * x, x)  # noqa: E731
    rounds, states = 0, [np.asarray(x, np.float64)]
    while abs(states[-1] @ np.asarray(w, np.float64)).max() < 10:
        states.append(2 * states[-1])
        rounds += 1
    assert rounds > 1
    assert_totals(totals(tested, x, w, inline=inline), [state @ np.asarray(w, np.float64) for state in states])


@either_way
def test_a_sum_in_a_branch_not_taken_is_zero(inline):
    xs, w = array(3, 4, 4), array(4, 4, seed=1)
    flags = jnp.asarray([True, False, True])

    def model(xs, flags):
        return lax.map(lambda item: lax.cond(item[1], lambda x: x @ w, lambda x: x, item[0]), (xs, flags))

    assert_totals(totals(model, xs, flags, inline=inline), [np.asarray(xs[k]) @ np.asarray(w) for k in (0, 2)])


@either_way
@pytest.mark.parametrize("check", [False, True])
def test_sums_out_of_a_shard_map_add_the_devices(check, inline):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, w = array(4, 4), array(4, 4, seed=1)

    def body(x, w):
        return lax.scan(lambda x, _: (lax.cond(x.shape[0] > 0, plain_dot, plain_dot, x, w), None), x, length=2)[0]

    model = jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=check)
    assert_totals(totals(model, x, w, inline=inline), chain(x, [w, w]), count=4 if not check else 2)


def test_a_sum_of_what_all_devices_of_an_axis_share_counts_once():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, w = array(4, 4), array(4, 4, seed=1)
    model = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    assert_totals(totals(model, x, w), chain(x, [w]))
