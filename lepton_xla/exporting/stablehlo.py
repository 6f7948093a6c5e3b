"""StableHLO with its weights, which needs JAX alone to run, or any tool that reads StableHLO."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes  # noqa: F401 # pyright: ignore[reportUnusedImport] (with it NumPy knows bfloat16 and others by name)
import numpy as np

from lepton_xla.compiler.portable_model import PortableModel

PROGRAM = "model.jax_export"
MODULE = "model.stablehlo"
WEIGHTS = "weights.bin"
SIGNATURE = "signature.json"


def write(model: PortableModel, path: pathlib.Path) -> Any:
    """Write a folder: the program for JAX (all platforms) and for others (CPU), weights, and what they are.

    Returns:
        The function that runs what is in the folder.
    """
    module = model.module()
    path.mkdir()
    offset = 0
    weights: list[dict[str, Any]] = []
    with (path / WEIGHTS).open("wb") as file:
        for array in model.weights:
            data = np.ascontiguousarray(array).tobytes()
            weights.append({"offset": offset, "dtype": str(array.dtype), "shape": list(array.shape)})
            offset += file.write(data)
    (path / PROGRAM).write_bytes(bytes(model.exported.serialize()))
    (path / MODULE).write_bytes(module)
    servable = model.servable
    signature = {
        "name": servable.name,
        "version": servable.version,
        "arguments": "weights in this order, then inputs",
        "weights": weights,
        "inputs": [{"name": name, "dtype": s.dtype, "shape": list(s.shape)} for name, s in servable.inputs.items()],
        "outputs": [{"name": name, "dtype": s.dtype, "shape": list(s.shape)} for name, s in servable.outputs.items()],
    }
    (path / SIGNATURE).write_text(json.dumps(signature, indent=1) + "\n")
    return lambda inputs: run(path, inputs)


def run(path: pathlib.Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run what `write` wrote, with JAX and NumPy alone."""
    from jax import export

    signature = json.loads((path / SIGNATURE).read_text())
    program = export.deserialize(bytearray((path / PROGRAM).read_bytes()))
    data = (path / WEIGHTS).read_bytes()
    weights: list[np.ndarray] = []
    for entry in signature["weights"]:
        dtype, shape = np.dtype(entry["dtype"]), entry["shape"]
        count = int(np.prod(shape, dtype=np.int64))
        weights.append(np.frombuffer(data, dtype, count, entry["offset"]).reshape(shape))
    outputs = jax.jit(program.call)(*weights, *(inputs[entry["name"]] for entry in signature["inputs"]))
    return {entry["name"]: np.asarray(out) for entry, out in zip(signature["outputs"], outputs, strict=True)}
