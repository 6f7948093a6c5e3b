"""A small Flax CNN on real handwritten digits, trained in seconds.

The images are scikit-learn's bundled copy of the UCI optical digits (1,797 of 8 x 8 pixels), so nothing is downloaded.

    leptonx compile examples/digits.py:model --recipe int8-prune50 -o digits.lepton
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import lepton_xla as lx

EPOCHS = 30
BATCH = 64


class DigitsNet(nn.Module):
    """8 x 8 grey images, float32 [batch, 8, 8, 1] in [0, 1], to 10 logits."""

    @nn.compact
    def __call__(self, image, train: bool = False):
        x = image
        for features in (32, 64):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        # Dropout spreads information over the weights, so that pruning costs less accuracy.
        x = nn.Dropout(0.3, deterministic=not train)(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.Dense(64)(x))
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(10)(x)


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels (1,347), then held-out images and labels (450), always the same split."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels.astype(np.int32), test_size=0.25, random_state=0, stratify=labels
    )
    return train_x, train_y, test_x, test_y


def train(epochs: int = EPOCHS) -> dict:
    """Train from a fixed seed; return the variables (`params` and `batch_stats`)."""
    train_x, train_y, _, _ = data()
    net = DigitsNet()
    key = jax.random.key(2)
    variables = net.init(key, train_x[:1])
    steps = epochs * (len(train_x) // BATCH)
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-3)

    def loss_fn(params, stats, key, images, labels):
        variables = {"params": params, "batch_stats": stats}
        logits, updated = net.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated["batch_stats"]

    @jax.jit
    def step(params, stats, state, key, images, labels):
        grads, stats = jax.grad(loss_fn, has_aux=True)(params, stats, key, images, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    params, stats = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)
    shuffle = np.random.default_rng(0)
    for _ in range(epochs):
        order = shuffle.permutation(len(train_x))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            key, dropout_key = jax.random.split(key)
            images, labels = jnp.asarray(train_x[rows]), jnp.asarray(train_y[rows])
            params, stats, state = step(params, stats, state, dropout_key, images, labels)
    return {"params": params, "batch_stats": stats}


def evaluate(predict: lx.modelspec.Predict) -> dict[str, float]:
    """Accuracy on the held-out images."""
    _, _, test_x, test_y = data()
    return {"accuracy": float((predict(image=test_x)["output"].argmax(-1) == test_y).mean())}


def rows() -> dict[str, np.ndarray]:
    """The held-out images with their digits, for `leptonx eval`."""
    _, _, test_x, test_y = data()
    return {"image": test_x, "label": test_y}


@functools.cache
def model() -> lx.ModelSpec:
    """The trained model for `leptonx`."""
    train_x, _, _, _ = data()
    return lx.ModelSpec(
        module=DigitsNet(),
        weights=train(),
        inputs={"image": lx.TensorSpec(("batch", 8, 8, 1), "float32")},
        buckets={"batch": (1, 8, 32)},
        calibration=[{"image": train_x[:256]}],
        evaluate=evaluate,
        rows=rows,
    )
