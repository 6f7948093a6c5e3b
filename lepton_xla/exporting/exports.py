"""Writes one format, reads it again, and compares."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.compiler.exchange import exchange
from lepton_xla.compiler.portable_model import PortableModel
from lepton_xla.errors import ArtifactError, InputError, UnsupportedError
from lepton_xla.exporting import onnx_models, stablehlo, tensorflow_models

type Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Runs what was written, read from the disk, on inputs by name."""

_WRITERS: dict[str, Callable[[PortableModel, pathlib.Path], Run]] = {
    "stablehlo": stablehlo.write,
    "saved-model": tensorflow_models.write_saved_model,
    "tflite": tensorflow_models.write_tflite,
    "onnx": onnx_models.write_onnx,
    "qonnx": onnx_models.write_qonnx,
}
FORMATS = tuple(_WRITERS)
# Rows that are drawn where none are given.
_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written, and how far its answers are from the artifact's.

    Attributes:
        format: one of `FORMATS`.
        path: the file or folder.
        rows: number of rows that were compared.
        differences: largest absolute difference by output.
        largest: largest absolute value by output, of the artifact.

    >>> Export("tflite", "digits.tflite", 8, {"output": 1e-6}, {"output": 12.0}).differences["output"] < 1e-5
    True
    """

    format: str
    path: str
    rows: int
    differences: dict[str, float]
    largest: dict[str, float]


@takes(artifact=(str, os.PathLike), path=(str, os.PathLike), to=str, rows=Mapping)
def export(
    artifact: str | os.PathLike[str],
    path: str | os.PathLike[str],
    to: str,
    *,
    rows: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Export:
    """Write what an artifact computes in another format, read it again, and compare the answers.

    The weights are those of the artifact, quantized or not. Sizes of batches stay symbolic, up to the largest that was
    compiled; QONNX has that size alone. Steps on the host before and after the compiled part, such as tokenizers, are
    not exported.

    Args:
        artifact: a local folder, or a `gs://` or `s3://` prefix.
        path: where to write: a folder for `stablehlo` and `saved-model`, else a file.
        to: `stablehlo`; `saved-model` or `tflite`, which need the extra `tensorflow`; `onnx` or `qonnx`, which need the
            extra `onnx`.
        rows: inputs by name to compare on; by default up to eight rows are drawn, integers as zeros.
        overwrite: whether to replace what is there.

    Raises:
        UnsupportedError: if there is no such format, or it cannot hold the model.
        MissingPackageError: if the format's packages are not installed.
        ArtifactError: if the artifact cannot be read, or `path` exists.
        InputError: if rows do not fit the model, or are more than the largest size that was compiled.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> _ = lx.compile(program, {"batch": (1, 8)}).save("tiny.lepton")
    >>> found = lx.export("tiny.lepton", "tiny", "stablehlo")
    >>> found.rows, found.differences
    (8, {'output': 0.0})
    """
    if to not in _WRITERS:
        raise UnsupportedError(f"there is no format {to!r}: expected {', '.join(FORMATS)}")
    target = pathlib.Path(path)
    if os.path.lexists(target) and not overwrite:
        raise ArtifactError(f"{target} exists; give another path, or overwrite it")
    model = PortableModel.read(artifact)
    inputs = _drawn(model) if rows is None else {name: np.asarray(value) for name, value in rows.items()}
    _check_sizes(model, inputs)
    expected = model.servable.compute(**inputs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # What is there stays until the new is whole and its answers were compared.
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
            written = pathlib.Path(folder) / "new"
            found = _WRITERS[to](model, written)(inputs)
            if set(found) != set(expected):
                raise UnsupportedError(f"{to}: outputs are {sorted(found)}, and should be {sorted(expected)}")
            if not os.path.lexists(target):
                written.rename(target)
            elif not exchange(written, target):
                target.rename(pathlib.Path(folder) / "old")
                written.rename(target)
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written: {error.strerror or error}") from error
    return Export(
        to,
        str(target),
        max((len(array) for array in inputs.values() if array.ndim), default=1),
        {name: _difference(found[name], array) for name, array in expected.items()},
        {
            name: float(np.abs(np.nan_to_num(array.astype(np.float64))).max(initial=0))
            for name, array in expected.items()
        },
    )


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference; infinite if shapes differ, or one is NaN where the other is not."""
    first, second = np.asarray(found).astype(np.float64), expected.astype(np.float64)
    if first.shape != second.shape or (np.isnan(first) != np.isnan(second)).any():
        return float("inf")
    with np.errstate(invalid="ignore"):
        return float(np.nan_to_num(np.abs(first - second)).max(initial=0))


def _check_sizes(model: PortableModel, inputs: Mapping[str, np.ndarray]) -> None:
    """Refuse sizes above the largest that was compiled: the program is only for those below."""
    for name, spec in model.servable.inputs.items():
        shape = inputs[name].shape if name in inputs else ()
        for dimension, size in zip(spec.shape, shape, strict=False):
            if isinstance(dimension, str) and size > (largest := model.servable.buckets[dimension][-1]):
                raise InputError(f"input {name!r}: {dimension} is {size}; the program is for at most {largest}")


def _drawn(model: PortableModel) -> dict[str, np.ndarray]:
    """Rows of normal numbers, and zeros where a model takes integers, which may be places in a table."""
    draw = np.random.default_rng(0)
    servable = model.servable
    sizes = {name: compiled[-1] for name, compiled in servable.buckets.items()}
    if servable.row_symbol is not None:
        sizes[servable.row_symbol] = min(_ROWS, sizes[servable.row_symbol])
    return {
        name: draw.normal(size=spec.shape_at(sizes)).astype(spec.dtype)
        if np.dtype(spec.dtype).kind not in "iub"
        else np.zeros(spec.shape_at(sizes), spec.dtype)
        for name, spec in servable.inputs.items()
    }
