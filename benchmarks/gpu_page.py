"""Makes docs/benchmarks/gpu.md from the results of `gpu.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import harness
import pruning_page
import qat

FLOAT = "JAX bfloat16"
INTRODUCTIONS = {
    "products": (
        "Our rows are the recipes `int8` and `fp8`, applied by `lx.optimize` to the bfloat16 program. Activations are "
        "rounded at run time with one scale per row, and the times include that. PyTorch's rows round in the same way "
        "and run under `torch.compile` in a CUDA graph. `error` is the relative error of the whole result against the "
        "program in float32 (Frobenius norm). The note says which kernels the compiled code calls. `16 x 8192 x 8192` "
        "means rows x contracted dimension x columns. Figures are medians over rounds in which all rows take turns."
    ),
    "checks": (
        "## Correctness\n\nEach product runs alone under `jax.jit` on normally distributed values, neither timed nor "
        "reverted, and is compared with the same codes multiplied by NumPy in float64. The error is the largest of "
        "any value of any program, as a share of the largest value. bfloat16 itself rounds by up to 0.2 %."
    ),
    "steps": (
        "## Cost of a training step\n\nOne step of AdamW on a transformer with layers under `lax.scan`, float32 at "
        "JAX's default precision, with random weights and data. qwix accepts modules only, so its rows use the same "
        "mathematics in Flax Linen. Masks cover 90 % of the weights, by one global threshold."
    ),
}


def product_tables(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table a task."""
    made = []
    for task in found:
        lines = []
        for row in task["rows"]:
            name = row["name"] + (f" ({row['in codes']} products)" if "in codes" in row else "")
            named = ", ".join(f"{count} {kernel}" for kernel, count in row.get("kernels", {}).items())
            if "us" not in row:
                lines.append([name, "", "", "", "", row.get("note", "")])
                continue
            figures = f"{row['us']:,.0f}", f"{row['tflops']:,.0f}", f"{row['ratio']:.2f}", f"{row['error']:.4f}"
            lines.append([name, *figures, "; ".join([named, *row.get("reasons", []), row.get("note", "")]).strip("; ")])
        header = [task["title"], "µs", "TFLOP/s", f"time / {FLOAT}", "error", "note"]
        made.append(harness.markdown(header, lines))
    return made


def check_tables(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table of all."""
    header = ["product of codes", "in a program of", "operands", "programs", "largest error", "at"]
    rows = []
    for each in found:
        largest = f"{100 * each['error']:.3g} %", " x ".join(map(str, each["at"]))
        rows.append([each["format"], each["dtype"], each["operands"], each["programs"], *largest])
    return [harness.markdown(header, rows)]


def step_tables(found: Mapping[str, Any]) -> list[str]:
    """One table for `fake_quant`, one for masks."""
    return [qat.step_tables(found["fake_quant"]), *pruning_page.step_tables(found["masks"])]
