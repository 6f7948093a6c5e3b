"""A Haiku MLP of the sizes of LeNet-300-100: another model that no Flax touches."""

from __future__ import annotations

from typing import Any

import jax

import lepton_xla as lx
from models.base import MNIST_NOTE, BenchModel, MissingError, cached, judge, mnist, train


def model(*, quick: bool = False) -> BenchModel:
    """The trained MLP."""
    try:
        import haiku as hk
    except ImportError as error:
        raise MissingError("the package dm-haiku is not installed") from error

    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([512, 512, 10])(x.reshape(x.shape[0], -1))))

    def apply(weights: Any, image: jax.Array) -> jax.Array:
        return net.apply(weights, image)

    train_x, train_y, test_x, test_y = mnist()
    if quick:
        train_x, train_y, test_x, test_y = train_x[:512], train_y[:512], test_x[:200], test_y[:200]
    start = net.init(jax.random.key(0), train_x[:1])
    epochs = 1 if quick else 20
    weights = cached(
        f"haiku-{epochs}-{len(train_x)}", lambda: train(apply, start, train_x, train_y, epochs=epochs, shift=2), start
    )
    spec = lx.ModelSpec(
        fn=apply,
        weights=weights,
        inputs={"image": lx.TensorSpec(("batch", 28, 28, 1), "float32")},
        buckets={"batch": (1, 8, 32)},
        calibration=[{"image": train_x[start : start + 64]} for start in range(0, 256, 64)],
        evaluate=judge(test_x, test_y),
    )
    return BenchModel("haiku", MNIST_NOTE, spec)
