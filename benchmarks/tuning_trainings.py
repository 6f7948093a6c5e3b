"""Trainings that go on from a benchmark model's weights, for searches that train candidates."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import harness
import numpy as np
import optax
from models.base import mnist

from lepton_xla.train import TrainSpec

_STEPS, _BATCH, _SHIFT = 250, 64, 2


def digits() -> TrainSpec:
    """The training of `examples/train_digits.py`, a sixth as long."""
    sys.path.insert(0, str(harness.ROOT / "examples"))
    return dataclasses.replace(importlib.import_module("train_digits").training(), steps=100)


def residual() -> TrainSpec:
    """Two epochs of MNIST, moved by up to two pixels, as the model was trained."""
    images, labels, _, _ = mnist()

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng([1, step])
        rows = random.integers(0, len(images), _BATCH)
        moved = np.roll(images[rows], tuple(random.integers(-_SHIFT, _SHIFT + 1, 2)), axis=(1, 2))
        return {"image": moved, "label": labels[rows]}

    def updates(steps: int) -> optax.GradientTransformation:
        return optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-3)

    return TrainSpec(lambda: None, batch, _STEPS, updates)  # pyright: ignore[reportArgumentType] (the model is not used)


TRAININGS = {"digits": digits, "residual": residual}
