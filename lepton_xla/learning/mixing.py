"""Batches of old data and samples, mixed: a function of the step, so that a run that was interrupted goes on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lepton_xla.dtypes import classes_of
from lepton_xla.errors import LearningError
from lepton_xla.train.feeding import Data, Feed

# Old data is a sample itself: nothing is read for longer than this many batches.
_MOST_BATCHES = 1000
_JUDGES = 5


class OldData:
    """Rows of a model's own training data, kept in memory.

    Args:
        data: batches, as `fit` takes them.
        inputs: names of the model's inputs; the one other entry of a batch is the label. None for a model that
            generates, whose batches may have any entries.
        most_rows: that are read.

    Attributes:
        label: name of the entry with the labels; empty for a model that generates.
        batch_rows: rows of a batch.
        rows: entry -> array, to train on.
        judges: the same of rows that are not trained on here: about a fifth, chosen by what is in a row, since data may
            give a row again.

    Raises:
        LearningError: if a batch has no such entry, or labels are not one class a row.

    >>> old = OldData([{"x": np.arange(20.0)[:, None], "label": np.arange(20) % 2}], ["x"], most_rows=100)
    >>> old.label, old.batch_rows, set(old.rows["x"].ravel()) & set(old.judges["x"].ravel())
    ('label', 20, set())
    """

    def __init__(self, data: Data, inputs: Collection[str] | None, most_rows: int) -> None:
        feed = Feed(data)
        first = feed.next()
        self.label = "" if inputs is None else self._label(first, inputs)
        self.batch_rows = len(next(iter(first.values())))
        count = min(_MOST_BATCHES, math.ceil(most_rows / self.batch_rows))
        batches = [first, *(feed.next() for _ in range(count - 1))]
        whole = {name: np.concatenate([batch[name] for batch in batches])[:most_rows] for name in first}
        chosen = _digests(whole) % _JUDGES == 0
        chosen &= not chosen.all()
        self.rows = {name: array[~chosen] for name, array in whole.items()}
        self.judges = {name: array[chosen] for name, array in whole.items()}

    @staticmethod
    def _label(first: Mapping[str, np.ndarray], inputs: Collection[str]) -> str:
        others = [name for name in first if name not in inputs]
        if len(others) != 1 or any(name not in first for name in inputs):
            raise LearningError(
                f"a batch has the entries {', '.join(first)}; expected the inputs {', '.join(inputs)} and one more, "
                "the label, because feedback gives one class for each row"
            )
        label = others[0]
        if first[label].ndim != 1 or first[label].dtype.kind not in "iu":
            kind = f"{first[label].dtype}{list(first[label].shape)}"
            raise LearningError(f"the entry {label!r} of a batch is {kind}; expected one integer for each row")
        return label

    def fitting(self, samples: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
        """Check that rows of samples can be mixed with these, and give them with the same dtypes.

        Raises:
            LearningError: for other entries, entries of another shape or number of rows, or no rows; names the first.
        """
        if set(samples) != set(self.rows):
            raise LearningError(f"{what} has the entries {', '.join(samples)}; a batch has {', '.join(self.rows)}")
        shapes = {name: np.shape(samples[name]) for name in self.rows}
        for name, array in self.rows.items():
            if not shapes[name] or shapes[name][1:] != array.shape[1:]:
                given, wanted = list(shapes[name]), list(array.shape)
                raise LearningError(f"the entry {name!r} of {what} is {given}; of a batch it is {wanted}")
        rows = {name: shape[0] for name, shape in shapes.items()}
        if len(set(rows.values())) > 1 or 0 in rows.values():
            counts = ", ".join(f"{count} of {name!r}" for name, count in rows.items())
            raise LearningError(f"{what} has the rows {counts}; expected equally many of each entry, and some")
        return {name: np.asarray(samples[name]).astype(array.dtype) for name, array in self.rows.items()}

    def accuracy(self, predict: Any, output: str) -> float:
        """The share of the judging rows that a model gets right.

        Raises:
            LearningError: if there are none.
        """
        if not len(self.judges[self.label]):
            raise LearningError("the old data has too few rows to judge by: give the TrainSpec an `evaluate`")
        answers = predict(**{name: array for name, array in self.judges.items() if name != self.label})[output]
        return float((classes_of(np.asarray(answers)) == self.judges[self.label]).mean())


def _digests(entries: Mapping[str, np.ndarray]) -> np.ndarray:
    """A number for each row, uint64 [rows]: the same for the same row."""
    rows = zip(*(np.ascontiguousarray(array) for array in entries.values()), strict=True)
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(b"".join(each.tobytes() for each in row), digest_size=8).digest(), "little")
            for row in rows
        ],
        np.uint64,
    )


class Mixture:
    """Batches with a share of samples, the rest old data: `mixture(step) -> batch`.

    Args:
        old: the old data; gives shapes and dtypes.
        samples: rows to mix in, by entry.
        fresh: their share of a batch, rounded up.
        seed: of the choice of rows.

    >>> old = OldData([{"x": np.zeros((4, 1), np.float32), "label": np.int32([0] * 4)}], ["x"], most_rows=4)
    >>> new = {"x": np.ones((3, 1), np.float32), "label": np.int32([1, 1, 1])}
    >>> batch = Mixture(old, new, fresh=0.5)(step=0)
    >>> batch["x"].ravel().tolist(), batch["label"].tolist()
    ([1.0, 1.0, 0.0, 0.0], [1, 1, 0, 0])
    """

    def __init__(self, old: OldData, samples: Mapping[str, np.ndarray], fresh: float, seed: int = 0) -> None:
        self._old = old.rows
        self._new = old.fitting(samples, "a sample")
        self._new_rows = math.ceil(fresh * old.batch_rows)
        self._old_rows = old.batch_rows - self._new_rows
        self._seed = seed
        self._counts = tuple(len(next(iter(rows.values()))) for rows in (self._new, self._old))

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step."""
        random = np.random.default_rng([self._seed, step])
        fresh, old = (
            random.integers(0, max(count, 1), rows)
            for count, rows in zip(self._counts, (self._new_rows, self._old_rows), strict=True)
        )
        return {name: np.concatenate([self._new[name][fresh], array[old]]) for name, array in self._old.items()}
