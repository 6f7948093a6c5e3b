"""ONNX, and QONNX for tool chains of FPGAs. Need the extra `onnx`."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from lepton_xla.compiler.portable_model import PortableModel
from lepton_xla.environment.extras import Needs
from lepton_xla.errors import UnsupportedError, first_line
from lepton_xla.exporting.onnx_conversion import to_onnx

# Protocol buffers hold no more, and weights lie in the file.
_MOST_BYTES = 2**31 - 2**20


def write_onnx(model: PortableModel, path: pathlib.Path) -> Any:
    """Write one file of ONNX's own operations, with symbolic sizes.

    Returns:
        The function that runs it with ONNX Runtime.
    """
    with Needs("onnx", "an export to onnx"):
        import onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # pyright: ignore[reportMissingImports]
    _write(onnx, model, path, codes=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            found = session.run(None, dict(inputs))
        except Exception as error:  # its errors have types of their own
            raise UnsupportedError(
                f"onnx: ONNX Runtime cannot run {model.servable.name!r}: {first_line(error)}"
            ) from error
        return dict(zip(model.servable.outputs, map(np.asarray, found), strict=True))

    return run


def write_qonnx(model: PortableModel, path: pathlib.Path) -> Any:
    """Write one file in QONNX, for the largest sizes that were compiled: integers are floats behind Quant nodes.

    Returns:
        The function that runs it with QONNX's executor; rows that are lacking are zeros.
    """
    with Needs("onnx", "an export to qonnx"):
        import onnx  # pyright: ignore[reportMissingImports]
        from qonnx.core.modelwrapper import ModelWrapper  # pyright: ignore[reportMissingImports]
        from qonnx.core.onnx_exec import execute_onnx  # pyright: ignore[reportMissingImports]
        from qonnx.transformation.infer_shapes import InferShapes  # pyright: ignore[reportMissingImports]
    _write(onnx, model, path, codes=True)
    servable = model.servable

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        sizes = {symbol: compiled[-1] for symbol, compiled in servable.buckets.items()}
        whole: dict[str, np.ndarray] = {}
        given: dict[str, int] = {}
        for name, spec in servable.inputs.items():
            whole[name] = np.zeros(spec.shape_at(sizes), spec.dtype)
            whole[name][tuple(slice(size) for size in inputs[name].shape)] = inputs[name]
            given |= {
                symbol: size
                for symbol, size in zip(spec.shape, inputs[name].shape, strict=True)
                if isinstance(symbol, str)
            }
        try:
            with warnings.catch_warnings():  # of shapes that it could not tell
                warnings.simplefilter("ignore")
                found = execute_onnx(ModelWrapper(str(path)).transform(InferShapes()), whole)
        except Exception as error:  # its errors have no type of their own
            raise UnsupportedError(f"qonnx: its executor cannot run {servable.name!r}: {first_line(error)}") from error
        return {
            name: np.asarray(found[name])[tuple(slice(size) for size in spec.shape_at(given))]
            for name, spec in servable.outputs.items()
        }

    return run


def _write(onnx: Any, model: PortableModel, path: pathlib.Path, *, codes: bool) -> None:
    servable = model.servable
    if sum(array.nbytes for array in model.stored) > _MOST_BYTES:
        raise UnsupportedError(f"onnx: the weights of {servable.name!r} are more than the 2 GB that one file holds")
    sizes = {symbol: compiled[-1] for symbol, compiled in servable.buckets.items()} if codes else None
    inputs, outputs = (
        {name: spec.shape if sizes is None else spec.shape_at(sizes) for name, spec in specs.items()}
        for specs in (servable.inputs, servable.outputs)
    )
    made = to_onnx(onnx, model.operations(sizes), model.stored, inputs, outputs, codes=codes, name=servable.name)
    try:
        if not codes:  # the checker knows no operations of others
            onnx.checker.check_model(made, full_check=True)
    except Exception as error:  # its errors have types of their own
        raise UnsupportedError(f"onnx: {servable.name!r} does not pass ONNX's check: {first_line(error)}") from error
    path.write_bytes(made.SerializeToString())
