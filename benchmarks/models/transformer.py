"""A hand-written transformer whose layers are stacked and stepped over by `lax.scan`, on MNIST cut into patches."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import lepton_xla as lx
from models.base import MNIST_NOTE, BenchModel, cached, judge, mnist, train

PATCH = 7


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the transformer: layers, width, heads, and width of what comes in for each of `seq` places."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    seq: int = 16
    inputs: int = PATCH * PATCH


def init(size: Size, seed: int = 0) -> dict[str, Any]:
    """Random weights; those of the layers have a leading axis of `layers`."""
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float | None = None) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape) * (scale or shape[-2] ** -0.5), jnp.float32)

    width, layers = size.width, size.layers
    kernels = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    return {
        "patch": {"kernel": normal(size.inputs, width), "bias": jnp.zeros(width)},
        "place": normal(size.seq, width, scale=0.1),
        "layers": {
            name: {"kernel": normal(layers, *shape), "bias": jnp.zeros((layers, shape[1]))}
            for name, shape in kernels.items()
        },
        "head": {"kernel": normal(width, 10), "bias": jnp.zeros(10)},
    }


def _normalize(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def block(x: jax.Array, linear: Any, heads: int) -> jax.Array:
    """One layer; `linear(name, x)` is a dense layer of its own. x: float32 [batch, seq, width]."""
    batch, seq, width = x.shape
    qkv = linear("qkv", _normalize(x)).reshape(batch, seq, 3, heads, width // heads)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // heads) ** -0.5, -1)
    x = x + linear("out", jnp.einsum("bhqk,bkhd->bqhd", scores, value).reshape(batch, seq, width))
    return x + linear("down", jax.nn.gelu(linear("up", _normalize(x))))


def encode(weights: Any, x: jax.Array, heads: int) -> jax.Array:
    """Logits of float32 [batch, seq, inputs]."""
    dense = lambda layer, x: x @ layer["kernel"] + layer["bias"]  # noqa: E731
    x = dense(weights["patch"], x) + weights["place"]
    x, _ = jax.lax.scan(
        lambda x, layer: (block(x, lambda name, x: dense(layer[name], x), heads), None), x, weights["layers"]
    )
    return dense(weights["head"], _normalize(x).mean(1))


class _Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        sizes = {"qkv": 3 * width, "out": width, "up": 4 * width, "down": width}
        return block(x, lambda name, x: nn.Dense(sizes[name], name=name)(x), self.heads), None


class LinenTransformer(nn.Module):
    """The same in Flax Linen, with the same names of the weights."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = self.size
        x = patches(x) if x.ndim == 4 else x
        place = self.param("place", nn.initializers.zeros_init(), (size.seq, size.width))
        x = nn.Dense(size.width, name="patch")(x) + place
        layers = nn.scan(_Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=size.layers)
        x, _ = layers(size.heads, name="layers")(x, None)
        return nn.Dense(10, name="head")(_normalize(x).mean(1))


def patches(image: jax.Array) -> jax.Array:
    """Float32 [batch, 28, 28, 1] to [batch, 16, 49]."""
    side = 28 // PATCH
    cut = image.reshape(image.shape[0], side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4)
    return cut.reshape(image.shape[0], side * side, PATCH * PATCH)


def classify(weights: Any, image: jax.Array) -> jax.Array:
    """Logits of images."""
    return encode(weights, patches(image), Size.heads)


def model(*, quick: bool = False) -> BenchModel:
    """The trained transformer."""
    train_x, train_y, test_x, test_y = mnist()
    if quick:
        train_x, train_y, test_x, test_y = train_x[:512], train_y[:512], test_x[:200], test_y[:200]
    start = init(Size())
    epochs = 1 if quick else 6
    weights = cached(
        f"transformer-{epochs}-{len(train_x)}",
        lambda: train(classify, start, train_x, train_y, epochs=epochs, rate=1e-3, shift=1),
        start,
    )
    spec = lx.ModelSpec(
        fn=classify,
        weights=weights,
        inputs={"image": lx.TensorSpec(("batch", 28, 28, 1), "float32")},
        buckets={"batch": (1, 8, 32)},
        calibration=[{"image": train_x[start : start + 64]} for start in range(0, 256, 64)],
        evaluate=judge(test_x, test_y),
    )
    return BenchModel("transformer", MNIST_NOTE, spec, (LinenTransformer(Size()), {"params": weights}), ("layers",))
