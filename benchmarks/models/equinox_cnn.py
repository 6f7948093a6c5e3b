"""An Equinox CNN, channels first and vmapped: a model that no Flax touches."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp

import lepton_xla as lx
from models.base import ROOT, BenchModel, MissingError, cached, judge, train


def model(*, quick: bool = False) -> BenchModel:
    """A CNN on scikit-learn's handwritten digits."""
    try:
        import equinox as eqx
    except ImportError as error:
        raise MissingError("the package equinox is not installed") from error
    sys.path.insert(0, str(ROOT / "examples"))
    import digits

    class Net(eqx.Module):
        first: eqx.nn.Conv2d
        second: eqx.nn.Conv2d
        hidden: eqx.nn.Linear
        head: eqx.nn.Linear

        def __init__(self, key: jax.Array) -> None:
            keys = jax.random.split(key, 4)
            self.first = eqx.nn.Conv2d(1, 32, 3, padding=1, key=keys[0])
            self.second = eqx.nn.Conv2d(32, 64, 3, padding=1, key=keys[1])
            self.hidden = eqx.nn.Linear(1024, 64, key=keys[2])
            self.head = eqx.nn.Linear(64, 10, key=keys[3])

        def __call__(self, image: jax.Array) -> jax.Array:
            x = jax.nn.relu(self.first(jnp.moveaxis(image, -1, 0)))
            x = jax.nn.relu(self.second(x))
            x = x.reshape(64, 4, 2, 4, 2).max((2, 4)).reshape(-1)
            return self.head(jax.nn.relu(self.hidden(x)))

    weights, static = eqx.partition(Net(jax.random.key(0)), eqx.is_array)

    def apply(weights: Any, image: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(weights, static))(image)

    train_x, train_y, test_x, test_y = digits.data()
    epochs = 1 if quick else 25
    weights = cached(
        f"equinox-{epochs}", lambda: train(apply, weights, train_x, train_y, epochs=epochs, batch=32), weights
    )
    spec = lx.ModelSpec(
        fn=apply,
        weights=weights,
        inputs={"image": lx.TensorSpec(("batch", 8, 8, 1), "float32")},
        buckets={"batch": (1, 8, 32)},
        calibration=[{"image": train_x[start : start + 64]} for start in range(0, 256, 64)],
        evaluate=judge(test_x, test_y),
    )
    note = "1,797 UCI handwritten digits of 8 x 8 pixels (scikit-learn's copy): 1,347 for training, 450 for testing"
    return BenchModel("equinox", note, spec)
