"""Models for `serving.py`, a request for each, and the executable without a server."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import harness
import models
import numpy as np

import lepton_xla as lx


@dataclasses.dataclass(frozen=True)
class Payload:
    """A request, in the format of each kind of server.

    Attributes:
        model: name of the model.
        rows: input name -> array of one or several rows.
        outputs: name and expected value of the output.
    """

    model: str
    rows: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    @property
    def count(self) -> int:
        """Rows per request."""
        return len(next(iter(self.rows.values())))

    def oip(self) -> tuple[bytes, dict[str, str]]:
        """Body and header fields for the Open Inference Protocol, binary both ways."""
        types = {"float32": "FP32", "int32": "INT32"}
        inputs = [
            {
                "name": name,
                "shape": list(row.shape),
                "datatype": types[row.dtype.name],
                "parameters": {"binary_data_size": row.nbytes},
            }
            for name, row in self.rows.items()
        ]
        outputs = [{"name": name, "parameters": {"binary_data": True}} for name in self.outputs]
        head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
        fields = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        return head + self.raw()[0], fields

    def raw(self) -> tuple[bytes, dict[str, str]]:
        """The rows' bytes."""
        return b"".join(row.tobytes() for row in self.rows.values()), {"Content-Type": "application/octet-stream"}

    def json(self) -> tuple[bytes, dict[str, str]]:
        """The rows' numbers."""
        return json.dumps({k: v[0].tolist() for k, v in self.rows.items()}).encode(), {
            "Content-Type": "application/json"
        }


class Bare:
    """The executables without a server, called one after the other with NumPy arrays.

    Args:
        artifact: the artifact with the executables.
        payload: its row is repeated to each batch size.
    """

    def __init__(self, artifact: pathlib.Path, payload: Payload) -> None:
        model = lx.load(artifact)
        sizes = {name: payload.rows[key].shape[axis] for key, spec in model.inputs.items()
                 for axis, name in enumerate(spec.shape) if isinstance(name, str)}  # fmt: skip
        self._calls: dict[int, Callable[[], object]] = {}
        for size in model.buckets["batch"]:
            arrays = [np.repeat(payload.rows[name][:1], size, axis=0) for name in model.inputs]
            self._calls[size] = functools.partial(model.runner({**sizes, "batch": size}), arrays)

    def by_size(self, seconds: float) -> dict[int, float]:
        """Rows/s by batch size."""
        return {size: self.rate(size, seconds) for size in self._calls}

    def rate(self, size: int, seconds: float) -> float:
        """Rows/s of one batch size."""
        call = self._calls[size]
        call()
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            call()
            count += 1
        return count * size / (time.perf_counter() - began)


def first10(folder: pathlib.Path, quick: bool) -> tuple[pathlib.Path, Payload]:
    """A model of 784 numbers to 10: a product with identity columns, so other servers just copy."""
    del quick
    weights = {"kernel": np.eye(784, 10, dtype=np.float32)}
    inputs = {"x": lx.TensorSpec(("batch", 784), "float32")}
    program = lx.trace(lambda weights, x: {"y": x @ weights["kernel"]}, weights, inputs)
    path = folder / "first10.lepton"
    lx.compile(program, {"batch": (1, 2, 4, 8, 16, 32, 64)}, name="first10").save(path)
    row = np.random.default_rng(0).random((1, 784), np.float32)
    return path, Payload("first10", {"x": row}, {"y": row[:, :10]})


def benchmark_model(name: str, buckets: Mapping[str, tuple[int, ...]], rows: int = 1) -> Any:
    """A model of the other benchmarks with recipe `int8`, and `rows` rows per request."""

    def make(folder: pathlib.Path, quick: bool) -> tuple[pathlib.Path, Payload]:
        spec = models.load(name, quick=quick).spec
        small = lx.optimize(
            spec.program(), lx.Recipe.load("int8"), calibration=spec.calibration_batches(), buckets=buckets
        )
        path = folder / f"{name}.lepton"
        lx.compile(small, buckets, name=name).save(path)
        sizes = {"batch": rows} | {
            symbol: bucket_sizes[-1] for symbol, bucket_sizes in buckets.items() if symbol != "batch"
        }
        arrays = harness.example_inputs(spec.inputs, sizes)
        return path, Payload(name, arrays, lx.load(path)(**arrays))

    return make


MODELS = {
    "first10": first10,
    "digits": benchmark_model("digits", {"batch": (1, 8, 32, 128)}),
    "digits8": benchmark_model("digits", {"batch": (1, 8, 32, 128)}, rows=8),
    "minilm": benchmark_model("minilm", {"batch": (1, 4, 8), "seq": (128,)}),
}
