"""Random small programs with weights of mixed dtypes, masks, gates, shared weights, residuals, norms and scans.

Float weights that meet a product hold integers of seven bits times a power of two, each column with one of 127: int8
with one scale a channel stores them exactly, so a pass that rounds them to int8 has nothing to lose.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla.program import Program, TensorSpec, trace

# The number of positions may equal that of channels, so that axes can be confused.
POSITIONS, WIDTHS = 4, (4, 6)
KINDS = (
    *["dense"] * 4, "add", "add", "scale", "scale", "act", "act", "max", "mask", "gate", "residual", "norm",
    "batch_norm", "scan", "cond", "shared", "carry", "loop", "floor", "sign", "where",
)  # fmt: skip


@dataclasses.dataclass
class Graph:
    """A program, whether all of its operations are continuous (so that a small error stays one), and their names."""

    program: Program
    continuous: bool
    steps: list[str]


class Builder:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.weights, self.steps, self.names = {}, [], []
        self.shapes = [(POSITIONS, 4)]

    # Weights.

    def name(self, array):
        name = f"{'wvabm'[self.rng.integers(5)]}{len(self.weights)}"
        self.weights[name] = array
        return name

    def matrix(self, *shape):
        """The name of a matrix `[..., K, N]`, and how the program reads it as float32."""
        dtype = self.rng.choice(["float32"] * 8 + ["bfloat16", "float16", "int8", "bool", "cast"])
        codes = self.rng.integers(-127, 128, shape)
        codes[..., 0, :] = 127
        values = codes * 2.0 ** self.rng.integers(-9, -6, (*shape[:-2], 1, shape[-1]))
        if dtype == "bool":
            return self.name(jnp.asarray(codes > 0)), _float
        if dtype == "int8":
            return self.name(jnp.asarray(codes, "int8")), lambda w: _float(w) / 256
        if dtype == "cast":  # a float that is read as an integer
            between = codes + 0.25 * np.sign(codes)
            return self.name(jnp.asarray(between, "float32")), lambda w: _float(w.astype("int32")) / 256
        return self.name(jnp.asarray(values, dtype)), _float

    def vector(self, size, lead=(), positive=False):
        """The name of a vector, and how the program reads it as float32."""
        dtype = self.rng.choice(["float32"] * 5 + ["bfloat16", "float16", "int32", "bool", "cast"])
        values = np.round(64 * self.rng.uniform(0.25 if positive else -3, 3, (*lead, size))) / 64
        if dtype == "bool":
            return self.name(jnp.asarray(values > (-9 if positive else 0))), _float
        if dtype == "int32":
            return self.name(jnp.asarray(np.ceil(values), dtype)), _float
        if dtype == "cast":
            return self.name(jnp.asarray(values + 2, "float32")), lambda w: _float(w.astype("int32"))
        return self.name(jnp.asarray(values, dtype)), _float

    # Steps.

    def add(self, kind, shape, step):
        self.names.append(kind)
        self.steps.append(step)
        self.shapes.append(shape)

    def pick(self, shape=None):
        """A value so far, the last ones more often."""
        found = [k for k, each in enumerate(self.shapes) if shape in (None, each)]
        return found[-1] if self.rng.random() < 0.7 else int(self.rng.choice(found))

    def layer(self):
        getattr(self, "make_" + self.rng.choice(KINDS))()

    def make_dense(self):
        k, made = self.pick(), int(self.rng.choice(WIDTHS))
        turned = self.rng.random() < 0.3
        width = self.shapes[k][-1]
        name, read = self.matrix(width, made)
        if turned:
            self.weights[name] = self.weights[name].T
        step = (lambda w, v: v[k] @ read(w[name]).T) if turned else (lambda w, v: v[k] @ read(w[name]))
        self.add("dense", (POSITIONS, made), step)

    def make_shared(self):
        """A square matrix used twice, or also read where no product is."""
        k = self.pick()
        width = self.shapes[k][-1]
        name, read = self.matrix(width, width)
        act = self.rng.choice([jax.nn.relu, jnp.negative])
        if self.rng.random() < 0.5:
            self.add("shared", self.shapes[k], lambda w, v: act(v[k] @ read(w[name])) @ read(w[name]))
        else:
            at = slice(None, POSITIONS) if width >= POSITIONS else None
            self.add("read", self.shapes[k], lambda w, v: v[k] @ read(w[name]) + read(w[name])[None, at])

    def along(self, k):
        """A vector along the channels, or along the positions of a value, as a function of the weights."""
        positions = self.rng.random() < 0.2
        name, read = self.vector(self.shapes[k][0] if positions else self.shapes[k][1])
        width = self.shapes[k][1]
        if positions:
            return lambda w: jnp.broadcast_to(read(w[name])[:, None], (POSITIONS, width))[None]
        return lambda w: read(w[name])[None, None]

    def make_add(self):
        k = self.pick()
        of, minus = self.along(k), self.rng.random() < 0.3
        self.add("add", self.shapes[k], lambda w, v: of(w) - v[k] if minus else v[k] + of(w))

    def make_scale(self):
        k = self.pick()
        of = self.along(k)
        self.add("scale", self.shapes[k], lambda w, v: v[k] * of(w))

    def make_max(self):
        k = self.pick()
        of = self.along(k)
        self.add("max", self.shapes[k], lambda w, v: jnp.maximum(v[k], of(w)))

    def make_act(self):
        k = self.pick()
        act = self.rng.choice([jax.nn.relu, jax.nn.relu, jnp.negative, jnp.tanh, jnp.abs, jax.nn.leaky_relu])
        self.add("act", self.shapes[k], lambda w, v: act(v[k]))

    def make_floor(self):
        k = self.pick()
        self.add("floor", self.shapes[k], lambda w, v: jnp.floor(v[k]) + v[k])

    def make_sign(self):
        k = self.pick()
        self.add("sign", self.shapes[k], lambda w, v: v[k] * 0.5 + jnp.sign(v[k]))

    def make_where(self):
        k = self.pick()
        j = self.pick(self.shapes[k])
        self.add("where", self.shapes[k], lambda w, v: jnp.where(v[k] > 0.1, v[k], v[j]))

    def make_mask(self):
        """A boolean weight chooses between values, or multiplies one."""
        k = self.pick()
        j = self.pick(self.shapes[k])
        name = self.name(jnp.asarray(self.rng.random(self.shapes[k][1]) < 0.6))
        if self.rng.random() < 0.5:
            self.add("mask", self.shapes[k], lambda w, v: jnp.where(w[name][None, None], v[k], v[j]))
        else:
            self.add("mask", self.shapes[k], lambda w, v: v[k] * _float(w[name])[None, None])

    def make_gate(self):
        k = self.pick()
        j = self.pick(self.shapes[k])
        self.add("gate", self.shapes[k], lambda w, v: v[k] * jax.nn.sigmoid(v[j]))

    def make_residual(self):
        k = self.pick()
        j = self.pick(self.shapes[k])
        self.add("residual", self.shapes[k], lambda w, v: v[k] + v[j])

    def make_norm(self):
        k = self.pick()
        (scale, read), (shift, read_shift) = self.vector(self.shapes[k][1]), self.vector(self.shapes[k][1])

        def step(w, v):
            centred = v[k] - jnp.mean(v[k], -1, keepdims=True)
            unit = centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 0.1)
            return unit * read(w[scale])[None, None] + read_shift(w[shift])[None, None]

        self.add("norm", self.shapes[k], step)

    def make_batch_norm(self):
        k = self.pick()
        parts = [self.vector(self.shapes[k][1], positive=index == 1) for index in range(4)]

        def step(w, v):
            mean, spread, scale, shift = (read(w[name])[None, None] for name, read in parts)
            return (v[k] - mean) / jnp.sqrt(spread + 0.1) * scale + shift

        self.add("batch_norm", self.shapes[k], step)

    def make_scan(self):
        k = self.pick()
        width = self.shapes[k][1]
        (first, read), (second, read_second) = self.matrix(2, width, width), self.matrix(2, width, width)
        (bias, read_bias), (mask, read_mask) = self.vector(width, (2,)), self.vector(width, (2,))

        def layer(x, step):
            a, b, c, d = step
            hidden = jax.nn.relu(x @ read(a) + read_bias(c)[None, None]) * read_mask(d)[None, None]
            return jnp.tanh(hidden @ read_second(b)), None

        self.add("scan", self.shapes[k], lambda w, v: lax.scan(layer, v[k], (w[first], w[second], w[bias], w[mask]))[0])

    def make_carry(self):
        """A vector that a product's bias is, and that a scan carries and changes."""
        k = self.pick()
        width = self.shapes[k][1]
        (name, read), (bias, read_bias), (last, read_last) = (
            self.matrix(width, width), self.vector(width), self.matrix(width, width)
        )  # fmt: skip

        def step(w, v):
            hidden = v[k] @ read(w[name]) + read_bias(w[bias])[None, None]
            carried, _ = lax.scan(lambda c, _: (c * 0.5 + 1, None), read_bias(w[bias]), None, length=2)
            return hidden @ read_last(w[last]) + carried[None, None]

        self.add("carry", self.shapes[k], step)

    def make_loop(self):
        k = self.pick()
        width = self.shapes[k][1]
        (name, read), (bias, read_bias) = self.matrix(width, width), self.vector(width)

        def step(w, v):
            body = lambda _, x: jnp.tanh(x @ read(w[name]) + read_bias(w[bias])[None, None])  # noqa: E731
            return lax.fori_loop(0, 2, body, v[k]) if width == 4 else body(0, v[k])

        self.add("loop", self.shapes[k], step)

    def make_cond(self):
        k = self.pick()
        of, other = self.along(k), self.along(k)

        def step(w, v):
            return lax.cond(jnp.max(v[0]) > 100, lambda x: x + of(w), lambda x: x * other(w), v[k])

        self.add("cond", self.shapes[k], step)

    def graph(self):
        name, read = self.matrix(self.shapes[-1][1], 3)
        head = len(self.shapes) - 1
        steps = list(self.steps)

        def fn(weights, x):
            values = [x]
            for step in steps:
                values.append(step(weights, values))
            return values[head] @ read(weights[name])

        program = trace(fn, self.weights, {"x": TensorSpec(("batch", *self.shapes[0]), "float32")})
        return Graph(program, not set(self.names) & {"floor", "sign", "where"}, self.names)


def _float(array):
    return array.astype("float32")


def random_graph(seed, *, layers=6):
    builder = Builder(seed)
    for _ in range(layers):
        builder.layer()
    return builder.graph()


def inputs(seed, rows=3):
    return np.random.default_rng(seed).normal(size=(rows, POSITIONS, 4)).astype(np.float32)
