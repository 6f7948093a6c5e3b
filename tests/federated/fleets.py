"""A small federation that the tests share, and the same training in NumPy, float64."""

import jax.numpy as jnp
import numpy as np
import optax

import lepton_xla as lx

CLASSES, WIDTH, RATE = 3, 4, 0.5


def program():
    weights = {"body": jnp.linspace(-0.3, 0.3, WIDTH * CLASSES).reshape(WIDTH, CLASSES), "head": jnp.zeros(CLASSES)}
    fn = lambda w, x: x @ w["body"] + w["head"][None]  # noqa: E731
    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", WIDTH), "float32")})


def table(count, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    x = random.normal(size=(count, WIDTH)) + np.eye(CLASSES, WIDTH)[labels] * 2
    return {"x": x.astype(np.float32), "label": labels.astype(np.int32)}


def spec(rate=RATE, **fields):
    return lx.federated.FederatedSpec(program(), table(96), optax.sgd(rate), **fields)


def start():
    return {path: np.asarray(leaf, np.float64) for path, leaf in program().weights.items()}


def gradients(weights, rows):
    """Of each row's cross-entropy: path -> [rows, ...]."""
    x = rows["x"].astype(np.float64)
    logits = x @ weights["body"] + weights["head"]
    shares = np.exp(logits - logits.max(1, keepdims=True))
    wrong = shares / shares.sum(1, keepdims=True) - np.eye(CLASSES)[rows["label"]]
    return {"body": x[:, :, None] * wrong[:, None, :], "head": wrong}


def local(weights, rows, steps=1, proximal=0.0):
    """A client's round: full batches, plain gradient descent."""
    now = dict(weights)
    for _ in range(steps):
        grads = gradients(now, rows)
        now = {
            path: leaf - RATE * (grads[path].mean(0) + proximal * (leaf - weights[path])) for path, leaf in now.items()
        }
    return now


def averaged(weights, clients, **options):
    """A round of FedAvg."""
    rows = [len(part["label"]) for part in clients]
    ends = [local(weights, part, **options) for part in clients]
    return {path: np.average([end[path] for end in ends], axis=0, weights=rows) for path in weights}
