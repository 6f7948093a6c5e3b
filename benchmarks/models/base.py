"""What every benchmark model is made of, the data folder, and a training loop that caches what it learned."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import inspect
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_xla as lx

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "benchmarks"
MNIST_NOTE = (
    "MNIST's 10,000 test images: rows 0-7999 for training, 8000-9999 for testing, so figures are not comparable with "
    "papers that train on all 60,000"
)


class MissingError(Exception):
    """Data or a package that a model needs is not here."""


@dataclasses.dataclass(frozen=True)
class BenchModel:
    """A model and what it is judged on.

    Attributes:
        name: as in `MODELS`.
        data: one line: what it was trained and is judged on.
        spec: the model; `evaluate` gives `accuracy`, or `accuracy` and `cosine`.
        linen: the same weights as a Flax Linen module and its variables, for libraries that take nothing else.
        stacked: modules of `linen` whose parameters have a leading axis that a scan steps over.
    """

    name: str
    data: str
    spec: lx.ModelSpec
    linen: tuple[Any, Any] | None = None
    stacked: tuple[str, ...] = ()


def data_folder(name: str) -> pathlib.Path:
    """The folder with a data set.

    Raises:
        MissingError: if it is not there.
    """
    folder = pathlib.Path(os.environ.get("LEPTON_DATA", ROOT.parent / "shared" / "data")) / name
    if not folder.is_dir():
        raise MissingError(f"no folder {name} with the data; LEPTON_DATA names the folder that holds it")
    return folder


@functools.cache
def mnist() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, then the ones to judge on: 8,000 and 2,000, float32 [n, 28, 28, 1] in [0, 1]."""
    folder = data_folder("mnist10k")
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28, 1)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int32)
    scaled = (images / 255).astype(np.float32)
    return scaled[:8000], labels[:8000], scaled[8000:], labels[8000:]


def judge(images: np.ndarray, labels: np.ndarray, *, batch: int = 500) -> Callable[[Any], dict[str, float]]:
    """An `evaluate` for a classifier whose only input is `image`."""

    def evaluate(predict: Any) -> dict[str, float]:
        right = 0
        for start in range(0, len(images), batch):
            answers = predict(image=images[start : start + batch])["output"].argmax(-1)
            right += int((np.asarray(answers) == labels[start : start + batch]).sum())
        return {"accuracy": right / len(images)}

    return evaluate


def train(
    apply: Callable[..., jax.Array],
    weights: Any,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int,
    rate: float = 2e-3,
    batch: int = 64,
    shift: int = 0,
    seed: int = 0,
) -> Any:
    """Trains a classifier with AdamW, a cosine schedule and a fixed seed.

    Args:
        apply: `apply(weights, images) -> logits`.
        weights: pytree of float arrays to start from.
        shift: training images are moved by up to so many pixels each way, a new draw each time.
    """
    steps = epochs * (len(images) // batch)
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=1e-3)

    @jax.jit
    def step(weights: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def loss(weights: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(apply(weights, images), labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    random = np.random.default_rng(seed)
    weights = jax.tree.map(jnp.asarray, weights)
    state = optimizer.init(weights)
    for _ in range(epochs):
        order = random.permutation(len(images))
        for start in range(0, len(order) - batch + 1, batch):
            rows = order[start : start + batch]
            drawn = images[rows]
            if shift:
                drawn = np.roll(drawn, tuple(random.integers(-shift, shift + 1, 2)), axis=(1, 2))
            weights, state = step(weights, state, drawn, labels[rows])
    return weights


def cached(name: str, make: Callable[[], Any], like: Any) -> Any:
    """What `make` gives, from the cache where the code that calls this has not changed since.

    Args:
        name: the file's name.
        make: gives a pytree of arrays.
        like: a pytree of the same structure.
    """
    caller = inspect.stack()[1].filename
    code = pathlib.Path(caller).read_bytes() + pathlib.Path(__file__).read_bytes()
    path = CACHE / f"{name}-{hashlib.sha256(code).hexdigest()[:12]}.npz"
    treedef = jax.tree.structure(like)
    if path.is_file():
        with np.load(path) as stored:
            return jax.tree.unflatten(treedef, [jnp.asarray(stored[f"arr_{k}"]) for k in range(treedef.num_leaves)])
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, *(np.asarray(leaf) for leaf in jax.tree.leaves(made)))
    return made
