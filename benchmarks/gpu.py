"""Products and a transformer block in bfloat16, int8 and fp8 on an NVIDIA GPU, compared with PyTorch.

    python benchmarks/gpu.py [--sections NAMES] [--quick] [--json FILE]

Section `products`: chains of square products, at sizes that fill the GPU and at the few rows of decoding, and a
transformer block. Our rows are the recipes `int8` and `fp8`, applied to the bfloat16 program; the time includes
rounding activations with one scale per row. PyTorch's rows do the same by `torch._int_mm` and `torch._scaled_mm` under
`torch.compile`, in CUDA graphs. Errors are those of the whole result against the program in float32. Section `checks`:
quantized products of many shapes against NumPy in float64. Section `steps`: cost of a training step with `fake_quant`
and with masks. Writes docs/benchmarks/gpu.md; a run of some sections replaces only these. Needs a GPU; --quick runs
tiny sizes on any platform and reverts nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Leave memory for PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import harness
import jax
import jax.numpy as jnp
import ml_dtypes
import msgspec
import numpy as np
import pruning
import qat
import sections
from gpu_page import FLOAT, INTRODUCTIONS, check_tables, product_tables, step_tables
from models import transformer
from rich.console import Console
from sections import Section

import lepton_xla as lx
from lepton_xla.passes.planning import resolve

RECIPES = ("int8", "fp8")
# Rows, width, layers: enough layers to amortize the start of a program.
CHAINS = ((8192, 8192, 4), (4096, 4096, 8), (64, 8192, 16), (16, 8192, 16))
# Batch, sequence, width, heads.
BLOCK = (8, 2048, 4096, 32)
# Rows, contracted dimension and columns of checked products: too small for some kernels, odd, and usual sizes.
SHAPES = (
    (1, 8, 8), (4, 8, 8), (5, 4, 4), (20, 8, 8), (3, 16, 24), (8, 24, 40), (6, 31, 7), (4, 32, 40), (16, 100, 64),
    (64, 64, 64), (7, 129, 33), (16, 1024, 1000), (1024, 512, 512), (2048, 64, 96),
)  # fmt: skip
OPERANDS = {"weight": SHAPES, "a weight for each of 3 batches": SHAPES[1::3], "two activations": SHAPES[::3]}
FORMATS = ("int8", "fp8_e4m3")
# Transformer and batch of the timed training step.
STEP = (transformer.Size(8, 1024, 16, 256), 32)
# Patterns by which kernels are recognized in compiled code.
KERNELS = {
    "cuBLASLt fp8": r'custom_call_target="__cublas\$lt\$matmul\$f8"',
    "cuBLASLt": r'custom_call_target="__cublas\$lt\$matmul"',
    "cuBLAS": r'custom_call_target="__cublas\$gemm"',
    "Triton": r'"kind":"__triton_(?:nested_)?gemm',
    "cuDNN attention": r'custom_call_target="__cudnn\$fmha',
}
console = Console(width=140, highlight=False)

type Linear = Callable[[Any, str], Any]
"""`linear(rows, name)`: a product with the weight of this name."""


def weights_of(shapes: Mapping[str, tuple[int, int]]) -> dict[str, jax.Array]:
    """Normally distributed bfloat16 matrices that preserve the norm of what they multiply."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    scaled = {name: (key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return {
        name: jax.random.normal(key, shape, jnp.bfloat16) * shape[0] ** -0.5 for name, (key, shape) in scaled.items()
    }


def chain(layers: int, linear: Linear, rows: Any) -> Any:
    """A chain of square products, of JAX or PyTorch arrays."""
    for layer in range(layers):
        rows = linear(rows, f"layer{layer:02}")
    return rows


def chain_shapes(width: int, layers: int) -> dict[str, tuple[int, int]]:
    return {f"layer{layer:02}": (width, width) for layer in range(layers)}


def block(library: Any, heads: int, linear: Linear, rows: Any) -> Any:
    """A pre-norm transformer block with RMSNorm, full attention, and a GELU layer of four times the width."""
    batch, length, width = rows.shape
    mixed = linear(library.norm(rows), "query_key_value").reshape(batch, length, 3, heads, width // heads)
    attended = library.attend(mixed[:, :, 0], mixed[:, :, 1], mixed[:, :, 2]).reshape(batch, length, width)
    rows = rows + linear(attended, "out")
    return rows + linear(library.gelu(linear(library.norm(rows), "up")), "down")


def block_shapes(width: int) -> dict[str, tuple[int, int]]:
    return {
        "query_key_value": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }


class Jax:
    """The operations of a block, in JAX."""

    gelu = staticmethod(functools.partial(jax.nn.gelu, approximate=True))

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation

    def norm(self, rows: jax.Array) -> jax.Array:
        exact = rows.astype(jnp.float32)
        return (exact * jax.lax.rsqrt(jnp.mean(exact**2, -1, keepdims=True) + 1e-6)).astype(rows.dtype)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, implementation=self.implementation)


class Torch:
    """The operations of a block, in PyTorch."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")

    def norm(self, rows: Any) -> Any:
        exact = rows.float()
        return (exact * self.torch.rsqrt((exact**2).mean(-1, keepdim=True) + 1e-6)).to(rows.dtype)

    def attend(self, query: Any, key: Any, value: Any) -> Any:
        attention = self.torch.nn.functional.scaled_dot_product_attention
        return attention(*(part.transpose(1, 2) for part in (query, key, value))).transpose(1, 2)


def jax_linear(weights: Mapping[str, jax.Array]) -> Linear:
    return lambda rows, name: rows @ weights[name]


def torch_linears(torch: Any, weights: Mapping[str, Any]) -> dict[str, Linear]:
    """PyTorch's products in bfloat16, and quantized with a scale per row and output channel."""

    def largest(array: Any, axis: int, top: float) -> Any:
        return array.abs().amax(axis, keepdim=True).float().clamp_min(1e-30) / top

    stored: dict[str, dict[str, Any]] = {"int8": {}, "fp8": {}}
    for name, weight in weights.items():
        scale = largest(weight, 0, 127.0)
        codes = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
        stored["int8"][name] = codes.t().contiguous().t(), scale
        scale = largest(weight, 0, 448.0)
        stored["fp8"][name] = (weight.float() / scale).to(torch.float8_e4m3fn).t().contiguous().t(), scale

    def int8(rows: Any, name: str) -> Any:
        flat = rows.reshape(-1, rows.shape[-1])
        scale = largest(flat, -1, 127.0)
        codes = (flat.float() / scale).round().clamp(-127, 127).to(torch.int8)
        columns, column_scale = stored["int8"][name]
        out = torch._int_mm(codes, columns).float() * (scale * column_scale)
        return out.to(rows.dtype).reshape(*rows.shape[:-1], -1)

    def fp8(rows: Any, name: str) -> Any:
        flat = rows.reshape(-1, rows.shape[-1])
        scale = largest(flat, -1, 448.0)
        codes = (flat.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        columns, column_scale = stored["fp8"][name]
        out = torch._scaled_mm(
            codes, columns, scale_a=scale, scale_b=column_scale, out_dtype=rows.dtype, use_fast_accum=True
        )
        return out.reshape(*rows.shape[:-1], -1)

    return {
        "torch.compile bfloat16": lambda rows, name: rows @ weights[name],
        "torch._int_mm int8": int8,
        "torch._scaled_mm fp8": fp8,
    }


class Task:
    """A task to time with every library and format.

    Attributes:
        flops: operations of its products.
        repeat: runs per timed call, to amortize their start.
    """

    def __init__(self, title: str, shapes: Mapping[str, tuple[int, int]], rows: tuple[int, ...], fn: Any, flops: float):
        self.title, self.fn, self.flops = title, fn, flops
        self.weights = weights_of(shapes)
        self.rows = jax.random.normal(jax.random.key(1), rows, jnp.bfloat16)
        self.repeat = max(1, min(20, round(2e13 / flops)))

    def program(self) -> lx.Program:
        spec = lx.TensorSpec(("batch", *self.rows.shape[1:]), "bfloat16")
        return lx.trace(lambda weights, rows: self.fn("jax", jax_linear(weights), rows), self.weights, {"rows": spec})


def tasks(quick: bool) -> list[Callable[[], Task]]:
    """The tasks, each created when its turn comes, because the weights are large."""
    chains = CHAINS if not quick else ((8, 64, 2),)
    batch, length, width, heads = BLOCK if not quick else (2, 16, 32, 4)

    def chained(rows: int, width: int, layers: int) -> Task:
        fn = lambda _library, linear, rows: chain(layers, linear, rows)  # noqa: E731
        title = f"{layers} layers of {rows} x {width} x {width}"
        return Task(title, chain_shapes(width, layers), (rows, width), fn, 2.0 * layers * rows * width**2)

    def blocked() -> Task:
        fast = attention()

        def fn(library: Any, linear: Linear, rows: Any) -> Any:
            library = Jax("xla" if library == "exact" else fast) if isinstance(library, str) else library
            return block(library, heads, linear, rows)

        flops = 2.0 * batch * length * 12 * width**2 + 4.0 * batch * length**2 * width
        title = f"transformer block, width {width}, {heads} heads, batch {batch} x {length}"
        return Task(title, block_shapes(width), (batch, length, width), fn, flops)

    made = [functools.partial(chained, *sizes) for sizes in chains]
    return [*made[:2], blocked, *made[2:]]


def attention() -> str:
    """cuDNN's attention if a program with it can be lowered, else XLA's."""
    if jax.default_backend() != "gpu":
        return "xla"
    try:
        fn = lambda weights, rows: block(Jax("cudnn"), 2, jax_linear(weights), rows)  # noqa: E731
        program = lx.trace(fn, weights_of(block_shapes(256)), {"rows": lx.TensorSpec(("batch", 128, 256), "bfloat16")})
        small = lx.passes.quantize(program, resolve(lx.Recipe.load("int8"), program))
        jax.block_until_ready(jax.jit(small.fn)(small.weights, jnp.ones((2, 128, 256), jnp.bfloat16)))
    except Exception as problem:
        console.print(f"attention by XLA, since cuDNN's cannot be had: {type(problem).__name__}: {str(problem)[:300]}")
        return "xla"
    return "cudnn"


def kernels(text: str) -> dict[str, int]:
    """Number of calls of each kind of kernel in compiled code."""
    counts = {name: len(re.findall(pattern, text)) for name, pattern in KERNELS.items()}
    return {name: count for name, count in counts.items() if count}


def measure(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a task in all ways: microseconds, rate, ratio to JAX in bfloat16, error, and kernels."""
    program = task.program()
    with jax.default_matmul_precision("highest"):
        wide = {name: weight.astype(jnp.float32) for name, weight in task.weights.items()}
        run = jax.jit(lambda weights, rows: task.fn("exact", jax_linear(weights), rows))
        exact = np.asarray(run(wide, task.rows.astype(jnp.float32)), np.float32)
        del wide
    calls: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}

    def note(
        name: str, found: Callable[[], tuple[Callable[[], Any], dict[str, Any], Callable[[Any], np.ndarray]]]
    ) -> None:
        started = time.perf_counter()
        try:
            call, facts, to_numpy = found()
            got = to_numpy(call())
            error = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
            calls[name], rows[name] = call, {"name": name, "error": error, **facts}
        except Exception as problem:  # the row shows the reason
            rows[name] = {
                "name": name,
                "note": f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:160]}",
            }
        rows[name]["prepare_s"] = round(time.perf_counter() - started, 1)
        console.print(f"  {name}: {rows[name]}")

    def ours(small: lx.Program) -> tuple[Callable[[], Any], dict[str, Any], Callable[[Any], np.ndarray]]:
        return jax_call(task, small)

    note(FLOAT, lambda: ours(program))
    for recipe in RECIPES:
        note(f"lepton_xla {recipe}", functools.partial(lowered, task, program, recipe, timed=not options.quick))
    if options.torch:
        import torch

        for name, call in torch_calls(task, torch).items():
            note(name, call)
    times = harness.interleave(calls, rounds=options.rounds, seconds=options.seconds)
    for name, seconds in times.items():
        median = statistics.median(seconds) / task.repeat
        rows[name] |= {
            "us": median * 1e6,
            "tflops": task.flops / median / 1e12,
            "ratio": harness.ratio(times, name, FLOAT),
        }
    return {"title": task.title, "rows": list(rows.values())}


def jax_call(task: Task, program: lx.Program) -> tuple[Callable[[], Any], dict[str, Any], Callable[[Any], np.ndarray]]:
    weights, fn = program.weights, program.fn
    if program.expansion is not None:  # as an artifact does on loading
        weights, fn = jax.jit(program.expansion.expand)(weights), program.expansion.fn
    compiled = jax.jit(fn).lower(weights, task.rows).compile()

    def call() -> jax.Array:
        for _ in range(task.repeat):
            out = compiled(weights, task.rows)
        return jax.block_until_ready(out)

    return call, {"kernels": kernels(compiled.as_text() or "")}, lambda out: np.asarray(out, np.float32)


def lowered(task: Task, program: lx.Program, recipe: str, *, timed: bool) -> tuple[Any, dict[str, Any], Any]:
    """Our program with a recipe; `timed`: whether products of codes are timed against float and may be reverted."""
    wanted = msgspec.structs.replace(lx.Recipe.load(recipe), measure=timed)
    small = lx.optimize(program, wanted, buckets={"batch": (task.rows.shape[0],)})
    call, facts, to_numpy = jax_call(task, small)
    (report,) = (report for report in small.history if report.name == "quantize")
    codes = [site for site in report.sites if site.outcome == "codes"]
    facts["in codes"] = f"{len(codes)} of {len(report.sites)}"
    facts["reasons"] = sorted({site.reason for site in report.sites if site.reason})
    return call, facts, to_numpy


def torch_calls(task: Task, torch: Any) -> dict[str, Callable[[], Any]]:
    """PyTorch's variants, each compiled and captured in a CUDA graph."""
    weights = {name: torch.from_dlpack(weight) for name, weight in task.weights.items()}
    rows = torch.from_dlpack(task.rows)
    on_gpu = rows.is_cuda

    def make(linear: Linear) -> tuple[Callable[[], Any], dict[str, Any], Callable[[Any], np.ndarray]]:
        run = lambda rows: task.fn(Torch(torch), linear, rows)  # noqa: E731
        torch.compiler.reset()  # otherwise the ninth function would silently run uncompiled
        run = torch.compile(run, dynamic=False) if on_gpu else run
        with torch.no_grad():
            for _ in range(3):
                out = run(rows)
            if on_gpu:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = run(rows)

        def call() -> Any:
            for _ in range(task.repeat):
                if on_gpu:
                    graph.replay()
                else:
                    run(rows)
            if on_gpu:
                torch.cuda.synchronize()
            return out

        return call, {}, lambda out: out.float().cpu().numpy()

    return {name: functools.partial(make, linear) for name, linear in torch_linears(torch, weights).items()}


def products(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Measure all tasks; yield the results after each, so that an interrupted run keeps them."""
    found = []
    for make in tasks(options.quick):
        task = make()
        console.print(f"{task.title} ...")
        found.append(measure(task, options))
        yield found


def checks(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Compare products of codes under plain `jax.jit`, none reverted, with NumPy in float64."""
    found = []
    with concurrent.futures.ThreadPoolExecutor(1 if options.quick else os.cpu_count()) as pool:
        for dtype in ("float32", "bfloat16"):
            for form in FORMATS:
                for operands, shapes in OPERANDS.items():
                    shapes = shapes[::7] if options.quick else shapes
                    errors = list(pool.map(functools.partial(check, form, dtype, operands), shapes))
                    worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
                    facts = {"programs": len(shapes), "error": errors[worst], "at": shapes[worst]}
                    found.append({"dtype": dtype, "format": form, "operands": operands, **facts})
    yield found


def check(form: str, dtype: str, operands: str, shape: tuple[int, int, int]) -> float:
    """The largest error of a product, as a share of its largest value."""
    rows, depth, columns = shape
    random = np.random.default_rng(0)
    batch = () if operands == "weight" else (3,)
    left, right = (
        jnp.asarray(random.standard_normal((*batch, *sizes)), dtype) for sizes in ((rows, depth), (depth, columns))
    )
    text = f'measure = false\nfold = false\n[[quantize]]\nsites = ".*"\nweights = "{form}"\nactivations = "{form}"\n'
    if operands == "two activations":
        specs = {"left": lx.TensorSpec(left.shape, dtype), "right": lx.TensorSpec(right.shape, dtype)}
        fn, weights, inputs = (lambda weights, left, right: left @ right), {}, (left, right)
        text += 'products = "all"\n'
    else:
        specs = {"left": lx.TensorSpec(left.shape, dtype)}
        fn, weights, inputs = (lambda weights, left: left @ weights["right"]), {"right": right}, (left,)
    program = lx.trace(fn, weights, specs)
    small = lx.passes.quantize(program, resolve(lx.Recipe.parse(text, name=form), program))
    got = np.asarray(jax.jit(small.fn)(small.weights, *inputs), np.float64)
    exact = rounded(left, -1, form) @ rounded(right, -2, form)
    return float(np.abs(got - exact).max() / np.abs(exact).max())


def rounded(array: jax.Array, axis: int, form: str) -> np.ndarray:
    """Quantize and dequantize, with one scale along an axis."""
    exact = np.asarray(array, np.float32)
    scale = np.abs(exact).max(axis, keepdims=True) * np.float32(1 / (127 if form == "int8" else 448))
    codes = np.rint(exact / scale) if form == "int8" else (exact / scale).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float64) * scale


def steps(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time a training step of the scanned transformer: plain, with `fake_quant`, with masks."""
    size, batch = STEP if not options.quick else (transformer.Size(2, 32, 2, 8), 2)
    with_qwix = importlib.util.find_spec("qwix") is not None
    yield {
        "fake_quant": [qat.step_cost(size, batch, options, with_qwix)],
        "masks": pruning.step_cost(options, [(size, batch)]),
    }


SECTIONS = {
    name: Section(measure, tables, INTRODUCTIONS[name])
    for name, measure, tables in (
        ("products", products, product_tables),
        ("checks", checks, check_tables),
        ("steps", steps, step_tables),
    )
}


def page(results: Mapping[str, Any]) -> str:
    """docs/benchmarks/gpu.md."""
    return sections.page(["# On a GPU"], SECTIONS, results, lambda name, result: result.get("remarks", []))


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes on any platform, no page: a smoke test")
    parser.add_argument(
        "--torch", action=argparse.BooleanOptionalAction, default=True, help="PyTorch's, where installed"
    )
    sections.add_options(parser, SECTIONS)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each way")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one task's rounds, at most")
    options = parser.parse_args()
    if jax.default_backend() != "gpu" and not options.quick:
        console.print("no GPU, so nothing to measure; --quick runs tiny sizes as a smoke test")
        return 0
    if options.quick:
        options.rounds, options.seconds = 3, 1.0
    options.torch = options.torch and importlib.util.find_spec("torch") is not None

    def machine(name: str) -> dict[str, str]:
        found = harness.machine(("torch", "qwix"))
        return found | {"machine": f"{jax.devices()[0].device_kind}; {found['machine']}"}

    def write(results: sections.Results) -> None:
        if not options.quick:
            harness.publish("gpu", results, page)

    sections.run(SECTIONS, options, machine, write, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
