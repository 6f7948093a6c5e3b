"""A classifier that is trained in a second, its data, and how the data shift. A user's model file, and the tests'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_xla as lx
from lepton_xla import train

CLASSES, FEATURES = 4, 8
CENTRES = np.float32(2.5) * np.random.default_rng(1).normal(size=(CLASSES, FEATURES)).astype(np.float32)


def rows(count, seed, sign=1.0):
    """Points around the centre of their class; the shift turns their signs."""
    random = np.random.default_rng([7, seed])
    labels = random.integers(0, CLASSES, count).astype(np.int32)
    x = CENTRES[labels] + random.normal(size=(count, FEATURES)).astype(np.float32)
    return np.float32(sign) * x, labels


def fn(weights, x):
    hidden = jnp.maximum(x @ weights["hidden"] + weights["bias"][None], 0)
    return hidden @ weights["head"]


def program(weights=None):
    if weights is None:
        keys = jax.random.split(jax.random.key(0))
        weights = {
            "hidden": 0.3 * jax.random.normal(keys[0], (FEATURES, 64)),
            "bias": jnp.zeros((64,)),
            "head": 0.3 * jax.random.normal(keys[1], (64, CLASSES)),
        }
    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", FEATURES), "float32")})


def batch(step):
    x, labels = rows(64, 1000 + step)
    return {"x": x, "label": labels}


@functools.cache
def trained():
    model = program()
    return train.fit(
        model, train.supervised(model), optax.sgd(0.05, momentum=0.9), batch, steps=150, progress=False
    ).program


def evaluate(predict):
    x, labels = rows(400, 5)
    return {"accuracy": float((predict(x=x)["output"].argmax(-1) == labels).mean())}


def spec(**changes):
    """What `leptonx learn` gets."""
    given = {
        "model": trained,
        "data": batch,
        "steps": 150,
        "optimizer": optax.sgd(0.05, momentum=0.9),
        "evaluate": evaluate,
    }
    return train.TrainSpec(**(given | changes))
