"""Convolutions alone, with a bias and a ReLU6 behind them, by XLA and by the kernels: a section of `kernels.py`."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.kernels import convolution, installation
from lepton_xla.kernels.convolution import Geometry
from lepton_xla.passes.alternatives import fusing
from lepton_xla.quant import QTensor, quantize

# Layers of MobileNetV2 and of the residual CNN: size of the image, channels, channels of the result, window, stride,
# and whether each channel has a filter of its own.
LAYERS = [
    (224, 3, 32, 3, 2, False), (112, 32, 32, 3, 1, True), (112, 16, 96, 1, 1, False), (112, 96, 96, 3, 2, True),
    (56, 24, 144, 1, 1, False), (56, 144, 144, 3, 1, True), (28, 192, 32, 1, 1, False), (14, 64, 384, 1, 1, False),
    (14, 384, 384, 3, 1, True), (14, 576, 96, 1, 1, False), (7, 960, 320, 1, 1, False), (7, 320, 1280, 1, 1, False),
    (14, 48, 48, 3, 1, False), (7, 96, 96, 3, 1, False), (4, 192, 192, 3, 1, False),
]  # fmt: skip
BATCHES = (1, 8)


def measure(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Times the layers, one after the other."""
    rows: list[dict[str, Any]] = []
    for batch in (1,) if options.quick else BATCHES:
        for layer in LAYERS[-1:] if options.quick else LAYERS:
            rows.append({"batch": batch, "layer": list(layer), **_timed(batch, *layer)})
    yield rows


def _timed(
    batch: int, size: int, channels: int, columns: int, window: int, stride: int, depthwise: bool
) -> dict[str, dict[str, float]]:
    random = np.random.default_rng(0)
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    sides = (total // 2, total - total // 2)
    geometry = Geometry((window, window), (stride, stride), padding=(sides, sides))
    x = random.standard_normal((batch, size, size, channels)).astype(np.float32)
    weight = random.standard_normal((window, window, 1 if depthwise else channels, columns)).astype(np.float32)
    bias = random.standard_normal(columns).astype(np.float32)

    def in_float(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return fusing.biased(convolution.convolve(x, weight, geometry), bias)

    def of_codes(x: jax.Array, stored: QTensor, bias: jax.Array) -> jax.Array:
        return fusing.biased(convolution.convolve_codes(x, stored, geometry), bias)

    given: dict[str, tuple[Callable[..., jax.Array], Any]] = {"float": (in_float, weight)}
    if not depthwise:
        given["int8"] = of_codes, quantize(jnp.asarray(weight).reshape(-1, columns), "int8")
    calls: dict[str, Callable[[], Any]] = {}
    for name, (fn, right) in given.items():
        calls[f"{name}, kernel"] = harness.compiled(fusing.fuse(fn), x, right, bias)
        with installation.without_kernels():  # a function of its own, which JAX has not lowered with kernels
            calls[f"{name}, XLA"] = harness.compiled(functools.partial(fn), x, right, bias)
    times = harness.interleave(calls, seconds=1.0)
    return {
        "us": {call: 1e6 * statistics.median(found) for call, found in times.items()},
        "ratio": {call: harness.ratio(times, call, "float, XLA") for call in times},
    }


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of the layers."""
    header = ("layer", "batch", "float by XLA, ms", "float by the kernel", "int8 by XLA", "int8 by the kernel")
    cells = []
    for row in rows:
        size, channels, columns, window, stride, depthwise = row["layer"]
        name = f"{size} x {size} x {channels} -> {columns}, {window} x {window}"
        name += (f", stride {stride}" if stride > 1 else "") + (", depthwise" if depthwise else "")
        ratios = (row["ratio"].get(call) for call in ("float, kernel", "int8, XLA", "int8, kernel"))
        shown = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        cells.append((name, str(row["batch"]), f"{row['us']['float, XLA'] / 1e3:.3f}", *shown))
    return [harness.markdown(header, cells)]
