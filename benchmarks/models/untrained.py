"""Image networks with random weights, for their speed: what they answer means nothing, how it changes does."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import lepton_xla as lx
from models.base import BenchModel, cached, judge

SIZE = 224
# What one step adds to Flax's moving averages of a batch's statistics.
_SHARE = 1 - 0.99


class _Normed(nn.Module):
    """A convolution and a batch norm."""

    features: int
    window: int
    stride: int
    depthwise: bool
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        groups = self.features if self.depthwise else 1
        window = (self.window, self.window)
        x = nn.Conv(self.features, window, self.stride, feature_group_count=groups, use_bias=False)(x)
        return nn.BatchNorm(use_running_average=not train, epsilon=self.epsilon)(x)


def normed(
    features: int, window: int = 1, stride: int = 1, *, depthwise: bool = False, epsilon: float = 1e-5
) -> nn.Module:
    """A convolution and a batch norm, `module(x, train)`; with `depthwise`, one filter a channel."""
    return _Normed(features, window, stride, depthwise, epsilon)


def untrained(name: str, module: Any, *, quick: bool = False) -> BenchModel:
    """A Linen module for images with random weights, its batch norms with the statistics of some random images.

    Its `accuracy` is the share of other random images for which the largest logit is that of the float network.
    """
    random = np.random.default_rng(0)
    images = random.normal(size=(8 if quick else 40, SIZE, SIZE, 3)).astype(np.float32)
    images += random.normal(size=(len(images), 1, 1, 3)).astype(np.float32)  # colours differ, so that answers do
    settling, judged = images[:4] if quick else images[:8], images[4:] if quick else images[8:]
    shapes = jax.eval_shape(module.init, jax.random.key(0), images[:1])
    variables = cached(f"{name}-{len(settling)}", lambda: _settled(module, shapes, settling), shapes)
    predict = jax.jit(module.apply)
    answers = np.concatenate([np.argmax(predict(variables, image[None]), -1) for image in judged])
    spec = lx.ModelSpec(
        module=module,
        weights=variables,
        inputs={"image": lx.TensorSpec(("batch", SIZE, SIZE, 3), "float32")},
        buckets={"batch": (1, 8)},
        calibration=[{"image": settling[start : start + 4]} for start in range(0, len(settling), 4)],
        evaluate=judge(judged, answers, batch=8),
    )
    data = f"random weights and images; accuracy is agreement with float on {len(judged)} of them"
    return BenchModel(name, data, spec, (module, variables))


def _settled(module: Any, shapes: Any, images: np.ndarray) -> Any:
    """Random weights, and batch norms with the statistics that these images have under them."""
    random = np.random.default_rng(1)

    def drawn(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        kind = path[-1].key
        if kind == "kernel":
            return jnp.asarray(random.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), leaf.dtype)
        return jnp.full(leaf.shape, float(kind == "scale"), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(drawn, shapes["params"])
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["batch_stats"])
    step = jax.jit(lambda given: module.apply(given, images, train=True, mutable=["batch_stats"])[1])
    after = step({"params": params, "batch_stats": zero})["batch_stats"]
    settled = {"params": params, "batch_stats": jax.tree.map(lambda leaf: leaf / _SHARE, after)}
    # All images get nearly the same answer of a deep random network: what is left without it tells them apart.
    mean = jnp.mean(jax.jit(module.apply)(settled, images), 0)
    head = params["Dense_0"] | {"bias": params["Dense_0"]["bias"] - mean}
    return {**settled, "params": params | {"Dense_0": head}}
