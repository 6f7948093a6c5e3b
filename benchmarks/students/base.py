"""Shared by all students: training that can be interrupted, noise, and how much of a gap is closed."""

from __future__ import annotations

import functools
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
import numpy as np
import optax

import lepton_xla as lx
from lepton_xla import train

FOLDER = harness.ROOT / "build" / "benchmarks" / "students"
# Steps between checkpoints: what is lost at most if a run is killed.
EVERY = 60

type Batches = Callable[[int], dict[str, np.ndarray]]


def learn(
    model: train.Model | lx.Program,
    loss: Any,
    batches: Batches,
    *,
    steps: int,
    rate: float,
    decay: float,
    folder: pathlib.Path | None,
    seed: int = 0,
    compression: train.Compression | None = None,
) -> train.Result:
    """Train with `optimizer`.

    Args:
        folder: where checkpoints are, so that a run that ends early goes on; None for none.
    """
    return train.fit(
        model,
        loss,
        optimizer(steps, rate, decay),
        batches,
        steps=steps,
        clip_norm=1.0,
        compression=compression,
        checkpoint=None if folder is None else train.Checkpoints(folder, every=EVERY, keep=1),
        seed=seed,
        progress=False,
    )


def optimizer(steps: int, rate: float, decay: float) -> optax.GradientTransformation:
    """AdamW: the rate rises for a tenth of the steps, then falls as a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)
    return optax.adamw(schedule, weight_decay=decay)


def batches(arrays: Mapping[str, np.ndarray], batch: int, seed: int) -> Batches:
    """The batch of each step: every pass in an order of its own; the same order whoever asks with this seed."""
    rows = len(next(iter(arrays.values())))
    each = rows // batch

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(rows)

    def at(step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(step, each)
        chosen = order(epoch)[place * batch : (place + 1) * batch]
        return {name: leaf[chosen] for name, leaf in arrays.items()}

    return at


def noise(accuracies: Sequence[float]) -> float | None:
    """The standard error of the mean over seeds; None for one seed."""
    return statistics.stdev(accuracies) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else None


def binomial(accuracy: float, count: int) -> float:
    """The standard error of an accuracy that comes from `count` samples being a draw of all there could be."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


def closed(accuracy: float, alone: float, teacher: float) -> float:
    """The share of the gap between a student that learned alone and its teacher that a distilled one closes.

    NaN if the teacher is no better than that student.
    """
    return (accuracy - alone) / (teacher - alone) if teacher > alone else math.nan
