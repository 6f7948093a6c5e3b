"""CPU kernels beside XLA: products of one and of many rows, and a decoder that makes one token.

    python benchmarks/kernels.py [--sections NAMES] [--json FILE] [--quick] [--no-pages]

Needs the package lepton-xla-kernels (`make kernels`). Section `products`: a product with a float weight, with codes in
XLA's own operations, and by the kernel, in turns. Section `decode`: a decoder of 110 million parameters with random
weights makes one token, behind 128 cached ones, as float and as `optimize` leaves it with each preset. Section
`minilm`: all-MiniLM-L6-v2 in int8, with and without kernels, beside OpenVINO, ONNX Runtime and qwix, if they are
installed. Section `images`: MobileNetV2 and EfficientNet-B0 beside these, in float32 and in int8. Section
`convolutions`: layers of MobileNetV2 and of a residual CNN, by XLA and by the kernels. Programs run as `leptonx serve`
runs them. Writes docs/benchmarks/kernels.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import convolutions
import harness
import jax
import jax.numpy as jnp
import models
import numpy as np
import peers
import sections
from rich.console import Console

import lepton_xla as lx
from lepton_xla.kernels import installation, integer_product, weight_only
from lepton_xla.quant import QTensor, quantize
from lepton_xla.serve.runtime import keep_memory, run_on_calling_thread
from lepton_xla.tuning.trials import as_loaded

console = Console(width=120, highlight=False)

# Weights, M, K, N, and the most that the kernel may take of float's time.
SHAPES: list[tuple[str, int, int, int, float]] = [
    ("int8", 1, 4096, 4096, 0.3), ("int4", 1, 4096, 4096, 0.18), ("nf4", 1, 4096, 4096, 0.18),
    ("int8", 1, 1024, 1024, 1.0), ("int4", 1, 1024, 1024, 1.0), ("int8", 8, 4096, 4096, 1.0),
    ("int4", 8, 4096, 4096, 1.0), ("int8", 64, 1024, 1024, 1.0), ("int4", 64, 1024, 1024, 1.0),
    ("int8 x int8", 1, 4096, 4096, 1.0), ("int8 x int8", 1, 1024, 1024, 1.0), ("int8 x int8", 16, 384, 1536, 1.0),
    ("int8 x int8", 128, 384, 1536, 1.0), ("int8 x int8", 128, 1536, 384, 1.0), ("int8 x int8", 512, 1024, 1024, 1.0),
]  # fmt: skip
PRESETS = {"int8-weight-only": 0.35, "int4-weight-only": 0.22, "int8": 1.0}
CACHED = 128
IMAGES = ("mobilenetv2", "efficientnet-b0")
IMAGE_PRESETS = {"float": "float", "int8": "int8-static"}


def products(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Times products of the shapes, one after the other."""
    rows: list[dict[str, Any]] = []
    for weights, m, k, n, aim in [("int8", 1, 64, 64, 1.0)] if options.quick else SHAPES:
        random = np.random.default_rng(0)
        x = random.standard_normal((m, k)).astype(np.float32)
        weight = jnp.asarray(random.standard_normal((k, n)).astype(np.float32))
        name, _, integer = weights.partition(" x ")
        stored = quantize(weight, name, "channel" if name == "int8" else "group:64")
        stored = stored.by_columns() if integer else stored
        multiply = integer_product.multiply if integer else weight_only.multiply
        calls = {"float": harness.compiled(jnp.matmul, x, weight), "kernel": harness.compiled(multiply, x, stored)}
        with installation.without_kernels():
            calls["XLA"] = harness.compiled(functools.partial(_by_xla, multiply), x, stored)
        times = harness.interleave(calls, seconds=2.0)
        rows.append(
            {
                "weights": weights, "m": m, "k": k, "n": n, "aim": aim,
                "us": {call: 1e6 * statistics.median(found) for call, found in times.items()},
                "ratio": {call: harness.ratio(times, call, "float") for call in times},
            }
        )  # fmt: skip
    yield rows


def _by_xla(multiply: Callable[..., jax.Array], x: jax.Array, stored: QTensor) -> jax.Array:
    """A function of its own, which JAX has not lowered with kernels. A single row is padded, as `quantize` does."""
    if stored.transposed and x.shape[0] == 1:
        return multiply(jnp.concatenate([x, jnp.zeros_like(x)]), stored)[:1]
    return multiply(x, stored)


def product_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of the products."""
    header = ("weights", "M x K x N", "float, ms", "XLA / float", "kernel / float", "aim", "weight read, GB/s")
    return [
        harness.markdown(
            header,
            [
                (
                    row["weights"], f"{row['m']} x {row['k']} x {row['n']}", f"{row['us']['float'] / 1e3:.3f}",
                    f"{row['ratio']['XLA']:.2f}", f"{row['ratio']['kernel']:.2f}", f"{row['aim']:g}",
                    f"{row['k'] * row['n'] * (1 if 'int8' in row['weights'] else 0.5) / row['us']['kernel'] / 1e3:.1f}",
                )
                for row in rows
            ],
        )
    ]  # fmt: skip


def decoder(width: int, layers: int, words: int) -> lx.Program:
    """A decoder that makes one token of one sequence, with the keys and values of earlier ones as inputs."""
    random = np.random.default_rng(0)
    heads = width // 64

    def drawn(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape, np.float32) / np.sqrt(shape[0])).astype(np.float32)

    weights = {"table": drawn(words, width), "head": drawn(width, words)}
    for layer in range(layers):
        weights[f"{layer}/qkv"], weights[f"{layer}/out"] = drawn(width, 3 * width), drawn(width, width)
        weights[f"{layer}/up"], weights[f"{layer}/down"] = drawn(width, 4 * width), drawn(4 * width, width)

    def normed(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def fn(w: Mapping[str, jax.Array], token: jax.Array, *caches: jax.Array) -> jax.Array:
        x = w["table"][token]
        for layer in range(layers):
            query, key, value = jnp.split(normed(x) @ w[f"{layer}/qkv"], 3, axis=-1)
            query, key, value = (jnp.reshape(part, (-1, heads, 1, 64)) for part in (query, key, value))
            # The cache is read where it lies, by heads; what this token adds is a term of its own.
            scores = [jnp.einsum("bhqd,bhkd->bhqk", query, caches[2 * layer]), jnp.sum(query * key, -1, keepdims=True)]
            seen = jax.nn.softmax(jnp.concatenate(scores, axis=-1) / 8.0, axis=-1)
            mixed = (
                jnp.einsum("bhqk,bhkd->bhqd", seen[..., :CACHED], caches[2 * layer + 1]) + seen[..., CACHED:] * value
            )
            x = x + jnp.reshape(mixed, x.shape) @ w[f"{layer}/out"]
            x = x + jax.nn.gelu(normed(x) @ w[f"{layer}/up"]) @ w[f"{layer}/down"]
        return normed(x) @ w["head"]

    cached = lx.TensorSpec((1, heads, CACHED, 64), "float32")
    inputs = {"token": lx.TensorSpec((1,), "int32")}
    inputs |= {f"{name}{layer}": cached for layer in range(layers) for name in ("keys", "values")}
    return lx.trace(fn, weights, inputs)


def decode(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times one token of the decoder, as float and with each preset."""
    program = decoder(64, 1, 128) if options.quick else decoder(768, 12, 16384)
    random = np.random.default_rng(1)
    inputs = [
        jnp.ones(spec.shape, jnp.int32)
        if spec.dtype == "int32"
        else jnp.asarray(random.standard_normal(spec.shape, np.float32))
        for spec in program.inputs.values()
    ]
    calls, notes = {"float": harness.compiled(program.fn, program.weights, *inputs)}, {}
    for preset in PRESETS:
        small = lx.optimize(program, lx.Recipe.load(preset), buckets={})
        loaded = as_loaded(small)
        calls[preset] = harness.compiled(loaded.fn, loaded.weights, *inputs)
        (report,) = [report for report in small.history if report.name == "quantize"]
        sites = [site for site in report.sites if site.metrics.get("timings")]
        by_kernel = [
            site for site in sites if site.outcome == "codes" and "kernel" in site.metrics.get("way", {}).values()
        ]
        notes[preset] = f"{len(by_kernel)} of {len(sites)} products by kernels"
    times = harness.interleave(calls, seconds=40.0)
    yield {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(program.weights)),
        "rows": [
            {
                "name": name, "ms": 1e3 * statistics.median(found), "ratio": harness.ratio(times, name, "float"),
                "aim": PRESETS.get(name, 1.0), "note": notes.get(name, ""),
            }
            for name, found in times.items()
        ],
    }  # fmt: skip


def decode_tables(found: dict[str, Any]) -> list[str]:
    """Markdown of the decoder."""
    header = (f"one token, {found['parameters'] / 1e6:.0f} M parameters", "ms", "of float's time", "aim", "note")
    rows = [
        (row["name"], f"{row['ms']:.2f}", f"{row['ratio']:.2f}", f"{row['aim']:g}", row["note"])
        for row in found["rows"]
    ]
    return [harness.markdown(header, rows)]


def minilm(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times MiniLM in int8 at four sizes, one after the other; `--quick` leaves it out, since it has one size."""
    if options.quick:
        return
    model = models.load("minilm", quick=True)  # all of the model; few questions, since only time is measured here
    recipe = lx.Recipe.load("int8")
    ours = {"float": model.spec.program(), "int8": _optimized(model, recipe)}
    with installation.without_kernels():
        ours["int8, without kernels"] = _optimized(model, recipe)
    others = [peer for peer in _graphs(model) if "int8" in peer.name]
    setting = peers.qwix_setting(recipe.quantize[0])
    if peers.available()["qwix"] and setting is not None:
        others.append(peers.qwix_ptq(model, *setting))
    yield from _in_turns(model, ours, others, lambda _: "int8")


def images(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times the image models, one after the other; `--quick` leaves them out, since they have one size."""
    found: dict[str, Any] = {}
    for name in () if options.quick else IMAGES:
        model = models.load(name)
        ours = {row: _optimized(model, lx.Recipe.load(preset)) for row, preset in IMAGE_PRESETS.items()}
        for rows in _in_turns(model, ours, _graphs(model), lambda row: "int8" if "int8" in row else "float"):
            found[name] = rows
            yield found


def _optimized(model: models.BenchModel, recipe: lx.Recipe) -> lx.Program:
    """As an artifact runs it."""
    spec = model.spec
    data = list(spec.calibration_batches() or ())
    return as_loaded(lx.optimize(spec.program(), recipe, calibration=data, buckets=spec.buckets))


def _graphs(model: models.BenchModel) -> list[peers.Peer]:
    """The model in ONNX Runtime and OpenVINO, if they are installed."""
    return peers.onnx_peers(model) if importlib.util.find_spec("onnx") else []


def _in_turns(
    model: models.BenchModel,
    ours: Mapping[str, lx.Program],
    others: Sequence[peers.Peer],
    base: Callable[[str], str],
) -> Iterator[dict[str, Any]]:
    """Times all of them in turns, at one size after the other, beside that of ours which `base` names."""
    spec = model.spec
    cells: dict[str, dict[str, float]] = {}
    sizes = [dict(zip(spec.buckets, at, strict=True)) for at in itertools.product(*spec.buckets.values())]
    for at in sizes:
        inputs = harness.example_inputs(spec.inputs, at)
        calls = {
            name: harness.compiled(each.fn, each.weights, *(inputs[given] for given in each.inputs))
            for name, each in ours.items()
        }
        times = harness.interleave(calls | {peer.name: peer.at(inputs) for peer in others}, seconds=8.0)
        bucket = _bucket(at)
        for name, found in times.items():
            cells.setdefault(name, {})[bucket] = 1e3 * statistics.median(found)
            cells[name][f"{bucket} / ours"] = harness.ratio(times, name, base(name))
        yield {"buckets": [_bucket(at) for at in sizes], "rows": cells}


def _bucket(sizes: Mapping[str, int]) -> str:
    return "x".join(map(str, sizes.values()))


def _table_of_turns(name: str, found: dict[str, Any]) -> list[str]:
    """Markdown of what was timed in turns, when all sizes were."""
    rows, buckets = found["rows"], found["buckets"]
    if any(bucket not in cells for cells in rows.values() for bucket in buckets):
        return []
    lines = [
        (row, *(f"{cells[bucket]:.2f} ({cells[f'{bucket} / ours']:.2f})" for bucket in buckets))
        for row, cells in rows.items()
    ]
    return [harness.markdown((name, *(f"{bucket}: ms (of ours)" for bucket in buckets)), lines)]


def image_tables(found: dict[str, Any]) -> list[str]:
    """Markdown of the image models."""
    return [table for name, rows in found.items() for table in _table_of_turns(name, rows)]


SECTIONS = {
    "products": sections.Section(
        products,
        product_tables,
        "## Products\n\nFloat32 rows times a weight: in float32, from codes in XLA's own operations (weights alone are "
        "dequantized on each call; `int8 x int8` rounds rows too), and by the kernel. Four-bit weights have groups of "
        "64. Ratios are medians over rounds; `quantize` takes the fastest of the three.",
    ),
    "convolutions": sections.Section(
        convolutions.measure,
        convolutions.tables,
        "## Convolutions\n\nImages of float32 with their channels last, a bias and a ReLU6 behind each convolution; "
        "ratios are of XLA's time in float, medians over rounds. XLA computes depthwise ones as shifted multiply-adds "
        "here. The integer ones find the scale of each example and round it; depthwise ones are timed in float only, "
        "since in int8 they pay between convolutions that hand codes on.",
    ),
    "decode": sections.Section(
        decode,
        decode_tables,
        "## One token of a decoder\n\nTwelve layers of width 768 behind 128 cached tokens, random weights; each row is "
        "what `optimize` leaves with the preset. Keys and values are inputs of each layer and are not copied.",
    ),
    "minilm": sections.Section(
        minilm,
        functools.partial(_table_of_turns, ""),
        "## MiniLM in int8\n\nall-MiniLM-L6-v2 at batch x length, all calls in turns; in brackets the time over that "
        "of `int8` in the same rounds: above 1 is slower than ours. OpenVINO quantizes by NNCF with the same "
        "data, ONNX Runtime by `quantize_dynamic`; qwix rounds activations on each call, as ours does.",
    ),
    "images": sections.Section(
        images,
        image_tables,
        "## Image models\n\nMobileNetV2 and EfficientNet-B0 with random weights, images of 224 x 224, by batch, all "
        "calls in turns; in brackets the time over that of ours with the same arithmetic in the same rounds: above 1 "
        "is slower than ours. Ours are the presets `float` and `int8-static`; the others quantize with their own "
        "tools and the same data.",
    ),
}


def page(results: Mapping[str, Any]) -> str:
    """docs/benchmarks/kernels.md."""
    return sections.page(["# CPU kernels"], SECTIONS, results)


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no page: a smoke test")
    harness.add_pages(parser)
    sections.add_options(parser, SECTIONS)
    options = parser.parse_args()
    if not installation.usable():
        console.print("the kernels are not installed: make kernels")
        return 1

    keep_memory()
    run_on_calling_thread()

    def write(results: sections.Results) -> None:
        if options.pages and not options.quick:
            harness.publish("kernels", results, page)

    def machine(_name: str) -> dict[str, str]:
        return harness.machine(["lepton-xla-kernels"])

    sections.run(SECTIONS, options, machine, write, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
