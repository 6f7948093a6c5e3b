"""Golden rows: inputs whose answers are known, which an artifact carries and answers before it is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lepton_xla.compiler.elements import from_words, to_words, words_of
from lepton_xla.compiler.manifest import GoldenEntry, Tensor
from lepton_xla.errors import ArtifactError, CompileError
from lepton_xla.program import TensorSpec

FILE = "golden.bin"
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

    >>> rows = Golden({"x": np.float32([[1.0, 2.0]])}, {"y": np.float32([[2.0, 4.0]])}, 1e-3)
    >>> rows.check(lambda x: {"y": 2 * x}, "double.lepton")
    >>> rows.check(lambda x: {"y": 3 * x}, "triple.lepton")
    Traceback (most recent call last):
    lepton_xla.errors.ArtifactError: triple.lepton: golden row 0 is answered wrong: output 'y' differs by 2, ...
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    tolerance: float

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
            given: arrays by the names of inputs and outputs.
            inputs, outputs: the model's.
            predict: the compiled model.
            tolerance: the largest difference allowed.

        Raises:
            CompileError: if a name, a dtype or a shape is wrong, there are no rows or too many, or the model answers
                otherwise.
            InputError: if the model does not take them.
        """
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
        made = cls(asked, known or dict(answers), tolerance)
        try:
            made.check(predict, "the compiled model")
        except ArtifactError as error:
            raise CompileError(str(error)) from error
        return made

    def entry(self) -> GoldenEntry:
        """What the manifest says of them."""

        def tensors(arrays: Mapping[str, np.ndarray]) -> tuple[Tensor, ...]:
            return tuple(Tensor(name=name, shape=each.shape, dtype=each.dtype.name) for name, each in arrays.items())

        return GoldenEntry(
            file=FILE, inputs=tensors(self.inputs), outputs=tensors(self.outputs), tolerance=self.tolerance
        )

    def data(self) -> bytes:
        """The content of their file."""
        return b"".join(to_words(each).tobytes() for each in (*self.inputs.values(), *self.outputs.values()))

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

        read = cls(taken(entry.inputs), taken(entry.outputs), entry.tolerance)
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


def _differences(answer: np.ndarray, expected: np.ndarray, tolerance: float) -> tuple[np.ndarray, float, float]:
    """Which elements differ too much, the largest difference, and the one that is allowed.

    Elements that are not finite must be the same; integers and booleans too.
    """
    if not jnp.issubdtype(expected.dtype, jnp.inexact):
        wrong = answer != expected
        gap = np.abs(answer.astype(np.float64) - expected.astype(np.float64)).max() if answer.size else 0.0
        return wrong, float(gap), 0.0
    wide = np.complex128 if jnp.issubdtype(expected.dtype, jnp.complexfloating) else np.float64
    one, two = answer.astype(wide), expected.astype(wide)
    finite = np.isfinite(two)
    allowed = tolerance * float(np.abs(two[finite]).max(initial=0.0))
    same = (one == two) | (np.isnan(one) & np.isnan(two))
    with np.errstate(invalid="ignore"):
        gaps = np.where(same, 0.0, np.abs(one - two))
    gaps = np.where(np.isfinite(gaps), gaps, math.inf)
    return gaps > allowed, float(gaps.max(initial=0.0)), allowed
