"""Batches for training: from iterables, functions of the step, or Grain, with a position that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lepton_xla.errors import TrainingError, first_line

type Batch = dict[str, np.ndarray]
type Data = Iterable[Mapping[str, Any]] | Callable[[int], Mapping[str, Any]]
"""Batches: `data(step) -> batch`, or an iterable of batches, which may be a Grain dataset."""


class Feed:
    """Gives batches one after another, and can go back to a position.

    - A function `data(step)`: the position is the number of the batch. Nothing is read again on resuming.
    - A sequence with a length, such as a list or a Grain `MapDataset`: it begins again when it ends. Nothing is read
      again on resuming.
    - A Grain `IterDataset` or `DataLoader`: its own state is kept.
    - Any other iterable is begun again when it ends. On resuming, the batches of the current pass that were used are
      read and dropped.
    - An iterator or generator, which can only be read once, must last for all steps. On resuming, it must begin as it
      did the first time.

    Raises:
        TrainingError: if it is none of these, is empty or ends too early, or a batch is not a mapping of arrays with
            equal numbers of rows and the shapes and dtypes of the first batch.

    >>> feed = Feed([{"x": np.zeros((2, 3))}, {"x": np.ones((2, 3))}])
    >>> [float(feed.next()["x"][0, 0]) for _ in range(3)], feed.position()
    ([0.0, 1.0, 0.0], {'batches': 3})
    """

    def __init__(self, data: Data) -> None:
        self._batches = 0
        self._first: Batch | None = None
        self._source = _source(data)

    def next(self) -> Batch:
        """Read the next batch."""
        try:
            found = self._source.read(self._batches)
        except StopIteration:
            raise TrainingError(
                "the data is empty"
                if self._batches == 0
                else f"the data ended after {self._batches} batches; give a sequence or a function of the step, which "
                "can be read again, or ask for fewer steps"
            ) from None
        batch = self._checked(found)
        self._batches += 1
        return batch

    def position(self) -> dict[str, Any]:
        """Where the next batch is read from, as JSON."""
        return {"batches": self._batches, **self._source.position()}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to a position that `position` returned.

        Raises:
            TrainingError: if the data is of another kind, or too short.
        """
        try:
            self._batches = int(position["batches"])
            self._source.seek(self._batches, position)
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise TrainingError(
                f"the data cannot go on at {dict(position)}: it is not the data of the run that was interrupted "
                f"({first_line(error)})"
            ) from error

    def _checked(self, found: Any) -> Batch:
        where = f"batch {self._batches} of the data"
        if not isinstance(found, Mapping) or not found:
            raise TrainingError(f"{where} is a {type(found).__name__}; expected a mapping of names to arrays")
        batch = {str(name): np.asarray(leaf) for name, leaf in found.items()}
        for name, leaf in batch.items():
            if leaf.dtype == object or leaf.ndim == 0:
                raise TrainingError(f"{where}: {name!r} is no array with rows, but {leaf.dtype} of shape {leaf.shape}")
        rows = {name: leaf.shape[0] for name, leaf in batch.items()}
        if len(set(rows.values())) != 1 or 0 in rows.values():
            raise TrainingError(f"{where} has these numbers of rows: {rows}; expected equal numbers above 0")
        if self._first is None:
            self._first = batch
        kinds, wanted = ({name: (leaf.shape, leaf.dtype) for name, leaf in b.items()} for b in (batch, self._first))
        for name in sorted(kinds.keys() | wanted.keys()):
            if kinds.get(name) != wanted.get(name):
                raise TrainingError(
                    f"{where}: {name!r} is {_kind(kinds.get(name))}, in the first batch {_kind(wanted.get(name))}; all "
                    "batches need the same shapes, so drop or fill up the last one of a pass"
                )
        return batch


def _kind(kind: Any) -> str:
    return "missing" if kind is None else f"{kind[1]}{list(kind[0])}"


class _Function:
    """Reads `data(step)`."""

    def __init__(self, data: Callable[[int], Any]) -> None:
        self._data = data

    def read(self, index: int) -> Any:
        return self._data(index)

    def position(self) -> dict[str, Any]:
        return {}

    def seek(self, index: int, position: Mapping[str, Any]) -> None:
        pass


class _Sequence(_Function):
    """Reads `data[index]`, again from the start after the last."""

    def __init__(self, data: Any) -> None:
        self._items = data

    def read(self, index: int) -> Any:
        if len(self._items) == 0:
            raise StopIteration
        return self._items[index % len(self._items)]


class _Passes:
    """Reads an iterable again and again; keeps the iterator's own state, as Grain's have one."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self._begin()

    def _begin(self) -> None:
        self._iterator = iter(self._data)
        self._taken = 0

    def read(self, index: int) -> Any:
        try:
            found = next(self._iterator)
        except StopIteration:
            if self._taken == 0 or isinstance(self._data, Iterator):
                raise
            self._begin()
            found = next(self._iterator)
        self._taken += 1
        return found

    def position(self) -> dict[str, Any]:
        own = getattr(self._iterator, "get_state", None)
        if own is None:
            return {"taken": self._taken}
        state = own()
        return {"taken": self._taken, "state": state.decode() if isinstance(state, bytes) else state}

    def seek(self, index: int, position: Mapping[str, Any]) -> None:
        if not isinstance(self._data, Iterator) or self._taken:
            self._begin()
        if "state" in position:
            state = position["state"]
            before = self._iterator.get_state()  # pyright: ignore[reportAttributeAccessIssue]
            self._iterator.set_state(state.encode() if isinstance(before, bytes) else state)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            for _ in range(int(position["taken"])):
                next(self._iterator)
        self._taken = int(position["taken"])


def _source(data: Any) -> _Function | _Passes:
    if isinstance(data, Mapping | str | bytes):
        raise TrainingError(f"the data is a {type(data).__name__}; expected batches: a list of mappings, say")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _Sequence(data)
    if isinstance(data, Iterable):
        return _Passes(data)
    if callable(data):
        return _Function(data)
    raise TrainingError(
        f"the data is a {type(data).__name__}; expected an iterable of batches, a function of the step, or a Grain "
        "dataset"
    )
