"""A residual CNN with batch norm in Flax Linen, in the shape of ResNet-20 (He et al. 2015, arXiv:1512.03385), on MNIST.

Three stages, as there, of two blocks in the place of three and of three times the channels: 48, 96 and 192. The first
convolution has a stride of 2, so that it trains on two cores in minutes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import traverse_util

import lepton_xla as lx
from models.base import MNIST_NOTE, BenchModel, cached, judge, mnist

WIDTHS = (48, 96, 192)
BLOCKS = 2
BATCH = 64
INPUTS = {"image": lx.TensorSpec(("batch", 28, 28, 1), "float32")}


class _Normed(nn.Module):
    """A convolution and a batch norm."""

    features: int
    window: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.features, (self.window, self.window), strides=self.stride, use_bias=False)(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


def _whole() -> tuple[int, ...]:
    """Channels of each convolution: the stem's, then each block's first, second and, where it has one, shortcut's."""
    blocks = [
        (features,) * (3 if stage and not block else 2)
        for stage, features in enumerate(WIDTHS)
        for block in range(BLOCKS)
    ]
    return (WIDTHS[0], *(features for block in blocks for features in block))


class ResidualNet(nn.Module):
    """Float32 [batch, 28, 28, 1] in [0, 1] to 10 logits.

    Attributes:
        channels: of each convolution, in the order in which they are called.
    """

    channels: tuple[int, ...] = _whole()

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        channels = iter(self.channels)
        x = nn.relu(_Normed(next(channels), 3, 2)(image, train))
        for stage in range(len(WIDTHS)):
            for block in range(BLOCKS):
                stride = 2 if stage and not block else 1
                y = nn.relu(_Normed(next(channels), 3, stride)(x, train))
                y = _Normed(next(channels), 3, 1)(y, train)
                x = _Normed(next(channels), 1, stride)(x, train) if stride > 1 else x
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


def model(*, quick: bool = False) -> BenchModel:
    """The trained network."""
    train_x, train_y, test_x, test_y = mnist()
    if quick:
        train_x, train_y, test_x, test_y = train_x[:512], train_y[:512], test_x[:200], test_y[:200]
    module, epochs = ResidualNet(), 1 if quick else 6
    shapes = jax.eval_shape(module.init, jax.random.key(0), train_x[:1])

    def learn() -> Any:
        start = jax.jit(module.init)(jax.random.key(0), train_x[:1])
        return _train(module, start, train_x, train_y, epochs)

    variables = cached(f"residual-{epochs}-{len(train_x)}", learn, shapes)
    spec = lx.ModelSpec(
        module=module,
        weights=variables,
        inputs=INPUTS,
        buckets={"batch": (1, 8, 32)},
        calibration=[{"image": train_x[start : start + 64]} for start in range(0, 256, 64)],
        evaluate=judge(test_x, test_y),
    )
    return BenchModel("residual", MNIST_NOTE, spec, (module, variables))


def training(weights: Mapping[str, jax.Array], image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits as in training, and the statistics of the batch norms after them; weights and statistics by path."""
    variables = traverse_util.unflatten_dict(dict(weights), sep="/")
    logits, updated = ResidualNet().apply(variables, image, train=True, mutable=["batch_stats"])
    return logits, traverse_util.flatten_dict(dict(updated), sep="/")


def trained_on(small: lx.Program, images: np.ndarray, labels: np.ndarray, epochs: int) -> lx.Program:
    """A shrunk program trained on: its weights are those of the same module with fewer channels."""
    start = traverse_util.unflatten_dict(dict(small.weights), sep="/")
    kernels = [start["params"][f"_Normed_{index}"]["Conv_0"]["kernel"] for index in range(len(ResidualNet.channels))]
    module = ResidualNet(tuple(kernel.shape[-1] for kernel in kernels))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(start))).hexdigest()[:8]
    name = f"residual-{len(images)}-shrunk-{epochs}-{digest}"
    return lx.from_linen(module, cached(name, lambda: _train(module, start, images, labels, epochs), start), INPUTS)


def _train(module: nn.Module, variables: Any, images: np.ndarray, labels: np.ndarray, epochs: int) -> Any:
    """As `base.train`, with statistics of batches beside the parameters."""
    params, stats = variables["params"], variables["batch_stats"]
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, epochs * (len(images) // BATCH)), weight_decay=1e-3)

    @jax.jit
    def step(params: Any, stats: Any, state: Any, image: jax.Array, label: jax.Array) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            given = {"params": params, "batch_stats": stats}
            logits, updated = module.apply(given, image, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), updated["batch_stats"]

        gradients, updated = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), updated, state

    random, state = np.random.default_rng(0), optimizer.init(params)
    for _ in range(epochs):
        order = random.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            moved = np.roll(images[rows], tuple(random.integers(-2, 3, 2)), axis=(1, 2))
            params, stats, state = step(params, stats, state, moved, labels[rows])
    return {"params": params, "batch_stats": stats}
