"""Golden rows: inputs whose answers are known, which an artifact carries and answers before it is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.compiler.elements import from_words, to_words, words_of
from lepton_xla.compiler.manifest import GoldenEntry, Tensor
from lepton_xla.dtypes import classes_of, is_floating, is_inexact
from lepton_xla.errors import ArtifactError, CompileError
from lepton_xla.program import TensorSpec

FILE = "golden.bin"
# The name of the array that holds the right class of each row.
LABEL = "label"
# They are kept in memory while an artifact is made, and read whenever it is loaded.
_LIMIT_BYTES = 64 << 20

type Predict = Callable[..., Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Golden:
    """Rows and their known answers.

    Attributes:
        inputs: every input of the model, by name, in order.
        outputs: the known outputs, by name.
        tolerance: the largest difference from a known answer, relative to the largest of that output.
        label: the right class of each row, if it is known.

    >>> rows = Golden({"x": np.float32([[1.0, 2.0]])}, {"y": np.float32([[2.0, 4.0]])}, 1e-3)
    >>> rows.check(lambda x: {"y": 2 * x}, "double.lepton")
    >>> rows.check(lambda x: {"y": 3 * x}, "triple.lepton")
    Traceback (most recent call last):
    lepton_xla.errors.ArtifactError: triple.lepton: golden row 0 is answered wrong: output 'y' differs by 2, ...
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    tolerance: float
    label: np.ndarray | None = None

    @classmethod
    def made(
        cls,
        given: Mapping[str, Any],
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        predict: Predict,
        tolerance: float,
    ) -> Golden:
        """Take rows from a user: every input, and the outputs that are known; if none is, the model's own are taken.

        Args:
            given: arrays by the names of inputs and outputs; and `label`, the right class of each row, if the model has
                no input or output of that name.
            inputs, outputs: the model's.
            predict: the compiled model.
            tolerance: the largest difference allowed.

        Raises:
            CompileError: if a name, a dtype or a shape is wrong, there are no rows or too many, or the model answers
                otherwise.
            InputError: if the model does not take them.
        """
        label = None
        if LABEL in given and LABEL not in inputs and LABEL not in outputs:
            label = np.asarray(given[LABEL])
            given = {name: value for name, value in given.items() if name != LABEL}
        unknown = [name for name in given if name not in inputs and name not in outputs]
        if unknown:
            raise CompileError(
                f"golden rows: {unknown[0]!r} is neither an input ({', '.join(inputs)}) nor an output "
                f"({', '.join(outputs)}) of the model"
            )
        arrays = {name: np.asarray(value) for name, value in given.items()}
        asked = {name: arrays[name] for name in inputs if name in arrays}
        known = {name: arrays[name] for name in outputs if name in arrays and name not in inputs}
        size = sum(array.nbytes for array in arrays.values())
        if size > _LIMIT_BYTES:
            raise CompileError(f"golden rows: {size} bytes, more than the limit of {_LIMIT_BYTES}")
        answers = predict(**asked)
        if any(array.size == 0 for array in asked.values()):
            raise CompileError("golden rows: there are none")
        for name, array in known.items():
            if array.shape != answers[name].shape or array.dtype != answers[name].dtype:
                raise CompileError(
                    f"golden rows: output {name!r} is {array.dtype}{list(array.shape)}, and the model's is "
                    f"{answers[name].dtype}{list(answers[name].shape)}"
                )
        if label is not None:
            label = _checked_labels(label, answers)
        made = cls(asked, known or dict(answers), tolerance, label)
        try:
            made.check(predict, "the compiled model")
        except ArtifactError as error:
            raise CompileError(str(error)) from error
        return made

    def entry(self) -> GoldenEntry:
        """What the manifest says of them."""

        def tensors(arrays: Mapping[str, np.ndarray]) -> tuple[Tensor, ...]:
            return tuple(Tensor(name=name, shape=each.shape, dtype=each.dtype.name) for name, each in arrays.items())

        label = None if self.label is None else tensors({LABEL: self.label})[0]
        inputs, outputs = tensors(self.inputs), tensors(self.outputs)
        return GoldenEntry(file=FILE, inputs=inputs, outputs=outputs, tolerance=self.tolerance, label=label)

    def data(self) -> bytes:
        """The content of their file."""
        arrays = [*self.inputs.values(), *self.outputs.values(), *([] if self.label is None else [self.label])]
        return b"".join(to_words(each).tobytes() for each in arrays)

    @classmethod
    def read(cls, entry: GoldenEntry, data: bytes) -> Golden:
        """Read them from an artifact.

        Raises:
            ArtifactError: if the file has another size than the manifest says.
        """
        start = 0

        def taken(tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
            nonlocal start
            found: dict[str, np.ndarray] = {}
            for tensor in tensors:
                shape = tuple(int(size) for size in tensor.shape)
                words, word = words_of(shape, tensor.dtype)
                size = math.prod(words) * word.itemsize
                if start + size > len(data):
                    raise ArtifactError(f"{entry.file}: {len(data)} bytes are too few for its tensors")
                # A copy, because elements need not start where their dtype wants them.
                elements = np.frombuffer(data[start : start + size], word).reshape(words).copy()
                found[tensor.name] = from_words(elements, shape, tensor.dtype)
                start += size
            return found

        inputs, outputs = taken(entry.inputs), taken(entry.outputs)
        label = None if entry.label is None else taken([entry.label])[entry.label.name]
        read = cls(inputs, outputs, entry.tolerance, label)
        if start != len(data):
            raise ArtifactError(f"{entry.file}: {len(data)} bytes are more than its tensors have")
        return read

    def check(self, predict: Predict, what: str) -> None:
        """Ask a model for the rows, and compare its answers.

        Args:
            predict: the model.
            what: its name in errors.

        Raises:
            ArtifactError: naming the first row that is answered wrong.
            InputError: if the model does not take the rows.
        """
        answers = predict(**self.inputs)
        for name, expected in self.outputs.items():
            answer = np.asarray(answers[name])
            if answer.shape != expected.shape:
                raise ArtifactError(f"{what}: golden rows: output {name!r} is {answer.shape}, not {expected.shape}")
            wrong, gap, allowed = _differences(answer, expected, self.tolerance)
            if wrong.any():
                row = int(np.argwhere(wrong)[0][0]) if wrong.ndim else 0
                raise ArtifactError(
                    f"{what}: golden row {row} is answered wrong: output {name!r} differs by {gap:.3g}, and "
                    f"{allowed:.3g} is allowed"
                )

    def accuracy(self, predict: Predict) -> float | None:
        """The share of rows whose class is the right one; None without labels.

        Args:
            predict: the model.

        Raises:
            InputError: if the model does not take the rows.

        >>> rows = Golden({"x": np.float32([[1.0, 2.0], [3.0, 0.0]])}, {}, 1e-3, np.int32([1, 1]))
        >>> rows.accuracy(lambda x: {"y": x})
        0.5
        """
        if self.label is None:
            return None
        answers = predict(**self.inputs)
        judged = np.asarray(answers[_judged(answers)])
        return float((classes_of(judged) == self.label).mean())


def _judged(answers: Mapping[str, np.ndarray]) -> str:
    """The output whose largest element is a row's class: the first of floats with several a row; empty for none."""
    for name, answer in answers.items():
        if answer.ndim == 2 and answer.shape[1] > 1 and is_floating(answer.dtype):
            return name
    return ""


def _checked_labels(label: np.ndarray, answers: Mapping[str, np.ndarray]) -> np.ndarray:
    """Labels as they are kept, checked against the answers of the model.

    Raises:
        CompileError: if the model has no output with classes, or they are not one class for each row.
    """
    judged = _judged(answers)
    if not judged:
        raise CompileError(f"golden rows: {LABEL!r} is given, and no output of the model has classes")
    rows, classes = answers[judged].shape
    fits = label.shape == (rows,) and label.dtype.kind in "iu"
    if not fits or (rows and not 0 <= label.min() <= label.max() < classes):
        raise CompileError(
            f"golden rows: {LABEL!r} is {label.dtype}{list(label.shape)}; expected {rows} integers from 0 to "
            f"{classes - 1}"
        )
    return label.astype(np.int32)


def _differences(answer: np.ndarray, expected: np.ndarray, tolerance: float) -> tuple[np.ndarray, float, float]:
    """Which elements differ too much, the largest difference, and the one that is allowed.

    Elements that are not finite must be the same; integers and booleans too.
    """
    if not is_inexact(expected.dtype):
        wrong = answer != expected
        gap = np.abs(answer.astype(np.float64) - expected.astype(np.float64)).max() if answer.size else 0.0
        return wrong, float(gap), 0.0
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    one, two = answer.astype(wide), expected.astype(wide)
    finite = np.isfinite(two)
    allowed = tolerance * float(np.abs(two[finite]).max(initial=0.0))
    same = (one == two) | (np.isnan(one) & np.isnan(two))
    with np.errstate(invalid="ignore"):
        gaps = np.where(same, 0.0, np.abs(one - two))
    gaps = np.where(np.isfinite(gaps), gaps, math.inf)
    return gaps > allowed, float(gaps.max(initial=0.0)), allowed
