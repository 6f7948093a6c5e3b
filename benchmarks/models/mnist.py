"""LeNet-5 (LeCun et al. 1998, in the sizes of Caffe's) and LeNet-300-100 in Flax Linen, on MNIST."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

import lepton_xla as lx
from models.base import MNIST_NOTE, BenchModel, cached, judge, mnist, train


class LeNet5(nn.Module):
    """Float32 [batch, 28, 28, 1] in [0, 1] to 10 logits; 431,080 parameters."""

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = image
        for features in (20, 50):
            x = nn.max_pool(nn.Conv(features, (5, 5), padding="VALID")(x), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(500)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class LeNet300(nn.Module):
    """Float32 [batch, 28, 28, 1] in [0, 1] to 10 logits; 266,610 parameters."""

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = image.reshape(image.shape[0], -1)
        for features in (300, 100):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


def lenet5(*, quick: bool = False) -> BenchModel:
    """The trained LeNet-5."""
    return _make("lenet5", LeNet5(), epochs=1 if quick else 12, quick=quick)


def lenet300(*, quick: bool = False) -> BenchModel:
    """The trained LeNet-300-100."""
    return _make("lenet300", LeNet300(), epochs=1 if quick else 30, quick=quick)


def _make(name: str, module: nn.Module, *, epochs: int, quick: bool) -> BenchModel:
    train_x, train_y, test_x, test_y = mnist()
    if quick:
        train_x, train_y, test_x, test_y = train_x[:512], train_y[:512], test_x[:200], test_y[:200]

    def learn() -> Any:
        start = module.init(jax.random.key(0), train_x[:1])
        return train(module.apply, start, train_x, train_y, epochs=epochs, shift=2)

    shapes = jax.eval_shape(module.init, jax.random.key(0), train_x[:1])
    variables = cached(f"{name}-{epochs}-{len(train_x)}", learn, shapes)
    spec = lx.ModelSpec(
        module=module,
        weights=variables,
        inputs={"image": lx.TensorSpec(("batch", 28, 28, 1), "float32")},
        buckets={"batch": (1, 8, 32)},
        calibration=[{"image": train_x[start : start + 64]} for start in range(0, 256, 64)],
        evaluate=judge(test_x, test_y),
    )
    return BenchModel(name, MNIST_NOTE, spec, (module, variables))
