"""Batches by step, over Grain."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from lepton_xla.data.rows import Rows, columns_of
from lepton_xla.environment.extras import Needs
from lepton_xla.errors import TrainingError

type Augment = Callable[[np.random.Generator, dict[str, np.ndarray]], dict[str, np.ndarray]]
"""`augment(random, batch) -> batch`; the generator is that of the step."""


def batches(
    rows: Rows, size: int, *, seed: int = 0, augment: Augment | None = None
) -> Callable[[int], dict[str, np.ndarray]]:
    """The batch of each step, for `lx.train.fit`: every row once, in a new order, before any comes again.

    A batch is a function of the step and the seed, so a run that goes on needs no position in the data. The extra
    `train` installs Grain.

    Args:
        rows: prepared columns, arrays `[rows, ...]`.
        size: rows of a batch.
        seed: of orders and augmentation.
        augment: changes a batch.

    Raises:
        TrainingError: if there are fewer rows than a batch has.
        MissingPackageError: if Grain is missing.
        InputError: if columns have other numbers of rows; names one.

    >>> from lepton_xla.data import batches
    >>> batch = batches({"x": np.arange(4)}, 2)
    >>> sorted([*batch(0)["x"].tolist(), *batch(1)["x"].tolist()]), batch(0)["x"].tolist() == batch(0)["x"].tolist()
    ([0, 1, 2, 3], True)
    """
    with Needs("train", "lx.data.batches"):
        grain: Any = importlib.import_module("grain")
    columns = columns_of(rows)
    count = len(next(iter(columns.values()), ()))
    if not 0 < size <= count:
        raise TrainingError(f"a batch of {size} rows of {count}: give fewer")
    order = grain.MapDataset.source(np.arange(count)).seed(seed).shuffle().repeat().batch(size)

    def batch(step: int) -> dict[str, np.ndarray]:
        chosen = np.asarray(order[step])
        found = {name: values[chosen] for name, values in columns.items()}
        return found if augment is None else augment(np.random.default_rng([seed, step]), found)

    return batch
