"""What server and clients send each other, as Flower's records. Nothing in a record is pickled."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from lepton_xla.environment.extras import Needs
from lepton_xla.errors import FederatedError, first_line
from lepton_xla.federated.members import Answer
from lepton_xla.tables import printable

_TASK, _UPDATE, _NUMBERS, _REFUSED = "task", "update", "numbers", "refused"
# Of a NumPy file around its numbers.
_HEADER_BYTES = 512
# Characters of what a client says.
_SHOWN = 300


def flower(module: str) -> Any:
    """A module of Flower.

    Raises:
        MissingPackageError: if Flower is not installed.

    >>> flower("no_such_module")
    Traceback (most recent call last):
    lepton_xla.errors.MissingPackageError: a federation needs the package flwr: pip install 'lepton-xla[federated]'
    """
    with Needs("federated", "a federation"), warnings.catch_warnings():  # of its dependencies about each other
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"flwr.{module}")


def write_task(vector: np.ndarray, task: Mapping[str, Any]) -> Any:
    """A round's task for a client: a `RecordDict`. `task` has `settings`, `round` and `model`."""
    app = flower("app")
    return app.RecordDict(
        {_TASK: app.ConfigRecord(dict(task)), _UPDATE: app.ArrayRecord({"values": app.Array(ndarray=vector)})}
    )


def read_task(content: Any) -> tuple[np.ndarray, Mapping[str, Any]]:
    """The vector of weights and the rest of a task.

    Raises:
        FederatedError: if it is none.
    """
    try:
        return _numbers_of(content.array_records[_UPDATE]["values"]), content.config_records[_TASK]
    except (KeyError, TypeError, ValueError) as error:
        raise FederatedError(f"the server sent no task that this version understands: {first_line(error)}") from error


def write_answer(answer: Answer) -> Any:
    """A client's answer: a `RecordDict`."""
    app = flower("app")
    arrays = {name: app.Array(ndarray=np.ascontiguousarray(leaf)) for name, leaf in answer.update.items()}
    numbers = {"rows": answer.rows, **{f"metric:{name}": value for name, value in answer.metrics.items()}}
    return app.RecordDict({_UPDATE: app.ArrayRecord(arrays), _NUMBERS: app.MetricRecord(numbers)})


def write_refusal(why: str) -> Any:
    """What a client says that cannot take part: a `RecordDict`."""
    app = flower("app")
    return app.RecordDict({_REFUSED: app.ConfigRecord({"why": why})})


def read_answer(content: Any, shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> Answer | str:
    """A client's answer, or why there is none. Sizes are checked before numbers are read.

    Args:
        content: a `RecordDict`.
        shapes: of `Codec.shapes`.
    """
    if _REFUSED in content.config_records:
        return printable(content.config_records[_REFUSED].get("why", ""))[:_SHOWN]
    try:
        arrays, numbers = content.array_records[_UPDATE], content.metric_records[_NUMBERS]
        update: dict[str, np.ndarray] = {}
        for name, array in arrays.items():
            if name not in shapes:
                return f"{printable(name[:80])!r} is not asked for"
            shape, dtype = shapes[name]
            most = int(np.prod(shape)) * dtype.itemsize + _HEADER_BYTES
            if len(array.data) > most:
                return f"{name!r} has {len(array.data)} bytes; expected at most {most}"
            update[name] = _numbers_of(array)
        prefix = "metric:"
        metrics = {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}
        return Answer(update, numbers["rows"], metrics)
    except (KeyError, TypeError, ValueError) as error:
        return f"it sent no answer that can be read: {printable(first_line(error))}"


def _numbers_of(array: Any) -> np.ndarray:
    """What one of Flower's arrays holds.

    Raises:
        ValueError: if it is none, or its bytes are no NumPy file of an array.
    """
    try:
        # Not `numpy.load`, which takes other files too, and gives other things than arrays.
        return np.lib.format.read_array(io.BytesIO(array.data), allow_pickle=False)
    except Exception as error:  # a header is Python, and says how much memory to take: nearly anything can be raised
        raise ValueError(f"an array that NumPy cannot read, {first_line(error)}") from error
