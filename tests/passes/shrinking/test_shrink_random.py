"""Random networks with joins, splits, reshapes and sums: the shrunk network equals the masked one in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_xla.passes import find_groups, shrink
from lepton_xla.program import TensorSpec, trace

SIDE = 4

_same = jax.jit(lambda x: x)


@jax.custom_jvp
def _own(x):
    return x


_own.defjvp(lambda primals, tangents: (primals[0], tangents[0]))

# What hands a value on as it is, or moves its channels; `[batch, ..., channels]` to the same shape.
PASSING = [
    _same,
    jax.jit(lambda x: _same(x)),
    jax.checkpoint(lambda x: x),
    _own,
    jax.shard_map(_own, mesh=jax.make_mesh((1,), ("x",)), in_specs=jax.P(), out_specs=jax.P()),
    lambda x: sum(jax.jit(lambda y: (y, y))(x)),
    lambda x: jax.jit(lambda y: (y + 1, y))(x)[1],
    lambda x: jnp.multiply(*jax.jit(lambda y: (y, 2.0))(x)),
    lambda x: jnp.roll(x, 1, -1),
    lambda x: x + jnp.roll(x, 2, -1),
    lambda x: jnp.flip(x, -1),
    lambda x: jnp.clip(jnp.atleast_1d(x)),
    lambda x: jnp.concatenate(jnp.split(x, [1], -1), -1),
    lambda x: jnp.where(x > 0.1, x, 0.5),
    lambda x: jax.lax.cond(x.sum() > 0, lambda y: y, lambda y: y, x),
    lambda x: jax.lax.scan(lambda c, _: (c, None), x, None, length=2)[0],
    lambda x: jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1]), (0, x))[1],
]


class Builder:
    """Draws a network as a list of steps, each a function of the weights and the values so far."""

    def __init__(self, data):
        self.draw = data.draw
        self.rng = np.random.default_rng(self.draw(st.integers(0, 2**16)))
        self.weights, self.steps, self.shapes = {}, [], [(SIDE, SIDE, 3)]

    def weight(self, *shape):
        name = f"w{len(self.weights)}"
        self.weights[name] = self.rng.standard_normal(shape)
        return name

    def add(self, shape, step):
        self.steps.append(step)
        self.shapes.append(shape)

    def pick(self, wanted=lambda shape: True):
        found = [k for k, shape in enumerate(self.shapes) if wanted(shape)]
        return self.draw(st.sampled_from(found)) if found else None

    def layer(self):
        kind = self.draw(
            st.sampled_from(
                ["dense", "conv", "grouped", "depthwise", "add", "concat", "norm", "act", "heads", "slice", "gate",
                 "pool", "pad", "attend", "flatten", "passing"]
            )
        )  # fmt: skip
        getattr(self, f"make_{kind}")()

    def make_dense(self):
        k = self.pick()
        made = self.draw(st.sampled_from([4, 6, 8]))
        name = self.weight(self.shapes[k][-1], made)
        self.add((*self.shapes[k][:-1], made), lambda w, v: v[k] @ w[name])

    def convolve(self, groups, multiple):
        k = self.pick(lambda shape: len(shape) == 3 and shape[-1] % groups == 0)
        if k is None:
            return
        channels = self.shapes[k][-1]
        groups = channels if groups == 1 and multiple else groups
        made = groups * (multiple or self.draw(st.sampled_from([4, 6])))
        name = self.weight(3, 3, channels // groups, made)

        def step(w, v):
            return jax.lax.conv_general_dilated(
                v[k], w[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
            )

        self.add((*self.shapes[k][:-1], made), step)

    def make_conv(self):
        self.convolve(1, 0)

    def make_grouped(self):
        self.convolve(2, self.draw(st.sampled_from([2, 3])))

    def make_depthwise(self):
        self.convolve(1, self.draw(st.sampled_from([1, 2])))

    def pair(self):
        k = self.pick()
        return k, self.pick(lambda shape: shape == self.shapes[k])

    def make_add(self):
        k, j = self.pair()
        self.add(self.shapes[k], lambda w, v: v[k] + v[j])

    def make_gate(self):
        k, j = self.pair()
        self.add(self.shapes[k], lambda w, v: v[k] * jax.nn.sigmoid(v[j]))

    def make_concat(self):
        k = self.pick()
        j = self.pick(lambda shape: shape[:-1] == self.shapes[k][:-1])
        size = self.shapes[k][-1] + self.shapes[j][-1]
        self.add((*self.shapes[k][:-1], size), lambda w, v: jnp.concatenate([v[k], v[j]], -1))

    def make_norm(self):
        k = self.pick()
        names = [self.weight(self.shapes[k][-1]) for _ in range(4)]

        def step(w, v):
            mean, scale, bias, spread = (w[n].reshape((1,) * len(self.shapes[k]) + (-1,)) for n in names)
            return (v[k] - mean) / jnp.sqrt(spread**2 + 0.1) * scale + bias

        self.add(self.shapes[k], step)

    def make_act(self):
        k = self.pick()
        act = self.draw(st.sampled_from([jax.nn.relu, jnp.tanh, jax.nn.gelu, jax.nn.softplus]))
        self.add(self.shapes[k], lambda w, v: act(v[k]))

    def make_heads(self):
        """A different view of the channels for a while: heads normalized by themselves, or their order changed."""
        k = self.pick(lambda shape: shape[-1] % 2 == 0)
        if k is None:
            return
        swap = self.draw(st.booleans())

        def step(w, v):
            heads = v[k].reshape(*v[k].shape[:-1], 2, -1)
            heads = heads.swapaxes(-1, -2) if swap else jax.nn.softmax(heads, -1)
            return heads.reshape(v[k].shape)

        self.add(self.shapes[k], step)

    def make_slice(self):
        k = self.pick(lambda shape: shape[-1] > 3)
        if k is None:
            return
        size = self.shapes[k][-1]
        start = self.draw(st.integers(0, 2))
        limit = self.draw(st.integers(start + 1, size))
        self.add((*self.shapes[k][:-1], limit - start), lambda w, v: v[k][..., start:limit])

    def make_pool(self):
        k = self.pick(lambda shape: len(shape) == 3)
        self.add(
            self.shapes[k],
            lambda w, v: jax.lax.reduce_window(v[k], -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1,) * 4, "SAME"),
        )

    def make_pad(self):
        k = self.pick()
        before, after = self.draw(st.integers(0, 2)), self.draw(st.integers(0, 2))
        widths = [(0, 0)] * len(self.shapes[k]) + [(before, after)]
        size = self.shapes[k][-1] + before + after
        self.add((*self.shapes[k][:-1], size), lambda w, v: jnp.pad(v[k], widths))

    def make_attend(self):
        k = self.pick(lambda shape: len(shape) == 3)
        size = self.shapes[k][-1]
        names = [self.weight(size, 8) for _ in range(3)]

        def step(w, v):
            rows = v[k].reshape(v[k].shape[0], SIDE * SIDE, size)
            q, key, value = (jnp.reshape(rows @ w[n], (rows.shape[0], SIDE * SIDE, 2, 4)) for n in names)
            scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, key) / 10, -1)
            return jnp.einsum("bhqk,bkhd->bqhd", scores, value).reshape(rows.shape[0], SIDE, SIDE, 8)

        self.add((SIDE, SIDE, 8), step)

    def make_passing(self):
        k, passing = self.pick(), self.draw(st.sampled_from(PASSING))
        self.add(self.shapes[k], lambda w, v: passing(v[k]))

    def make_flatten(self):
        k = self.pick(lambda shape: len(shape) == 3 and shape[-1] <= 8)
        if k is None:
            return
        self.add((int(np.prod(self.shapes[k])),), lambda w, v: v[k].reshape(v[k].shape[0], -1))

    def program(self):
        last = [k for k, shape in enumerate(self.shapes) if k][-2:] or [0]
        heads = [(k, self.weight(self.shapes[k][-1], 2)) for k in last]
        steps = list(self.steps)

        def fn(weights, image):
            values = [image]
            for step in steps:
                values.append(step(weights, values))
            return [values[k] @ weights[name] for k, name in heads]

        return trace(fn, self.weights, {"image": TensorSpec((2, SIDE, SIDE, 3), "float64")})


@settings(max_examples=16)
@given(st.data())
def test_shrunk_equals_masked(data):
    with jax.enable_x64(True):
        builder = Builder(data)
        for _ in range(data.draw(st.integers(2, 9))):
            builder.layer()
        program = builder.program()
        sparsity = data.draw(st.sampled_from([0.25, 0.5, 0.7]))
        small = shrink(program, sparsity=sparsity)
        image = np.random.default_rng(0).standard_normal((2, SIDE, SIDE, 3))
        masked = {}
        for path, weight in program.weights.items():
            stays = np.isin(weight, small.weights[path])
            assert stays.sum() == small.weights[path].size
            masked[path] = jnp.where(stays, weight, 0.0)
        for a, b in zip(small.fn(small.weights, image), program.fn(masked, image), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * (1 + float(jnp.max(jnp.abs(b)))))
        lost = any(int(sparsity * group.units) for group in find_groups(program).removable)
        assert (small.weights_bytes < program.weights_bytes) == lost
