"""Tokens per second of a decoder with random weights: formats of weights, sequences at once, other libraries beside it.

    python benchmarks/generation.py [--quick] [--pages] [--json FILE] [--folder DIR [--prepare]]

The decoder has the shape of GPT-2 (12 layers of 768, 124 M weights with its tables of words and places): random weights
take as long as trained ones. Every figure is greedy decoding after a prompt of 32 tokens; contenders take turns. Other
libraries (`generation_peers.py`) take part if they are installed. Then clients stream from a server: one alone from a
model with one slot, eight at once from one with eight. The last table is of a new process: until the model is loaded,
import included, and from there to the first token.

Compiling and exporting take longer than measuring. With `--folder` what they make is kept and, at the same commit,
taken again, so that the measurement can be run later, alone on the machine; `--prepare` makes it and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import generation_peers
import harness
import jax
import jax.numpy as jnp
import numpy as np
from server_process import Server, free_port

import lepton_xla as lx
from lepton_xla.serve.client.endpoint import endpoint
from lepton_xla.serve.load.streams import stream

RECIPES = ("float32", "int8", "int8-weight-only", "int4-weight-only")
# With the cache in codes too.
SMALL_CACHE = "int8-weight-only, cache int8"
SLOTS = (1, 8)
PROMPT = 32
_START = """
import sys, time
start = time.perf_counter()
import lepton_xla as lx
model = lx.load(sys.argv[1]).generator
loaded = time.perf_counter()
model.generate([list(range(1, 33))], max_tokens=1)
print(loaded - start, time.perf_counter() - loaded)
"""


class Shape:
    """Sizes of the decoder."""

    def __init__(self, quick: bool) -> None:
        self.layers, self.width, self.heads = (2, 64, 4) if quick else (12, 768, 12)
        self.vocabulary, self.capacity = (500, 64) if quick else (50_257, 128)
        self.tokens = 8 if quick else 32


type Functions = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


def decoder(shape: Shape) -> tuple[Any, Functions]:
    """Weights, and the three functions of `lx.Generator`."""
    random, D = np.random.default_rng(0), shape.width

    def table(*size: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(size, np.float32) * 0.02)

    layer = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}
    weights = {
        "words": table(shape.vocabulary, D),
        "places": table(shape.capacity, D),
        "layers": [{name: table(*size) for name, size in layer.items()} for _ in range(shape.layers)],
    }

    def norm(x: jax.Array) -> jax.Array:
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

    def heads(x: jax.Array) -> jax.Array:
        """`[B, T, D]` as `[B, H, T, d]`, in which products over the positions need no copy of the cache."""
        return x.reshape(*x.shape[:2], shape.heads, D // shape.heads).swapaxes(1, 2)

    def block(w: Any, x: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
        """`x[B, T, D]` attends to `k, v[B, H, S, d]`."""
        scores = jnp.einsum("bhtd,bhsd->bhts", heads(norm(x) @ w["q"]), k) / np.sqrt(D / shape.heads)
        shares = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e9), axis=-1)
        mixed = jnp.einsum("bhts,bhsd->bhtd", shares, v)
        x = x + mixed.swapaxes(1, 2).reshape(x.shape) @ w["o"]
        return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"]

    def init_cache(w: Any, B: int, S: int) -> Any:
        empty = jnp.zeros((B, shape.heads, S, D // shape.heads), jnp.float32)
        return [{"k": empty, "v": empty} for _ in range(shape.layers)]

    def prefill(w: Any, tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, Any]:
        S = tokens.shape[1]
        x = w["words"][tokens] + w["places"][:S][None]
        seen = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool))[None], (tokens.shape[0], S, S))
        cache = []
        for layer in w["layers"]:
            k, v = (heads(norm(x) @ layer[name]) for name in ("k", "v"))
            x = block(layer, x, k, v, seen)
            cache.append({"k": k, "v": v})
        last = jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0]
        return norm(last) @ w["words"].T, cache

    def decode(w: Any, cache: Any, token: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        x = (w["words"][token] + w["places"][position])[:, None]
        rows = jnp.arange(len(token))
        seen = (jnp.arange(shape.capacity)[None] <= position[:, None])[:, None]
        after = []
        for layer, kept in zip(w["layers"], cache, strict=True):
            k, v = (kept[name].at[rows, :, position].set(heads(norm(x) @ layer[name])[:, :, 0]) for name in ("k", "v"))
            x = block(layer, x, k, v, seen)
            after.append({"k": k, "v": v})
        return norm(x[:, 0]) @ w["words"].T, after

    return weights, (init_cache, prefill, decode)


def made(shape: Shape, recipe: str, slots: int, folder: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Compile one artifact, unless it is there; give where it is, and the bytes of its weights in memory."""
    path = folder / f"{recipe}-{slots}.lepton"
    if path.exists():
        return path, lx.load(path).weights_bytes
    weights, functions = decoder(shape)
    program = lx.Generator(*functions, weights, slots=slots, capacity=shape.capacity).program
    lengths = {"length": (PROMPT,)}
    # Float weights too: `optimize` then chooses among ways to compute products, by measurement.
    weights_only, _, small = recipe.partition(", cache ")
    chosen = lx.Recipe(name=recipe, fold=False) if recipe == "float32" else lx.Recipe.load(weights_only)
    chosen = chosen.replace({"cache": small}) if small else chosen
    program = lx.optimize(program, chosen, buckets=lengths)
    lx.compile(program, lengths, name="decoder").save(path)
    return path, lx.load(path).weights_bytes


def clients(path: pathlib.Path, connections: int, shape: Shape, seconds: float) -> float:
    """Tokens per second that clients get from a server of an artifact, each streaming one prompt after the other."""
    port = free_port()
    command = [sys.executable, "-m", "lepton_xla", "serve", str(path), "--port", str(port)]
    server = Server("ours", command, port, "/v2/health/ready", (None, {}))
    try:
        server.wait()
        found = stream(
            endpoint(f"http://127.0.0.1:{port}"), "decoder", connections=connections, seconds=seconds, warmup_s=1.0,
            timeout_s=60.0, prompt=PROMPT, tokens=shape.tokens,
        )  # fmt: skip
    finally:
        server.stop()
    if found.errors:
        raise RuntimeError(str(found.errors))
    return found.tokens / found.seconds


def start_s(path: pathlib.Path) -> dict[str, float]:
    """Seconds that a new process takes: all of it to the loaded model, and its first prompt; medians of three."""
    # As in an installation that is used: modules are compiled once, by the first of the processes.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = [sys.executable, "-c", _START, str(path)]
    seconds: list[list[float]] = []
    for _ in range(4):
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        seconds.append([float(each) for each in done.stdout.split()])
    loaded, first = map(statistics.median, zip(*seconds[1:], strict=True))
    return {"loaded": loaded, "first_token": first}


def measure(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any] | None:
    """All figures; None if it was only to prepare."""
    shape = Shape(options.quick)
    prompts = np.random.default_rng(1).integers(1, shape.vocabulary, (max(SLOTS), PROMPT))
    calls = {} if options.quick else generation_peers.calls(shape, prompts, SLOTS, folder)
    weights_bytes: dict[str, int] = {}
    cache_bytes: dict[str, int] = {}
    paths: dict[str, pathlib.Path] = {}
    for recipe in (*RECIPES, SMALL_CACHE):
        for slots in SLOTS:
            print(f"{recipe}, {slots} slots ...", flush=True)
            path, size = made(shape, recipe, slots, folder)
            servable = lx.load(path)
            model, stepper = servable.generator, servable.stepper
            assert stepper is not None
            calls[f"{recipe} {slots}"] = functools.partial(
                model.generate, prompts[:slots].tolist(), max_tokens=shape.tokens, ignore_end=True
            )
            weights_bytes[recipe], paths[recipe] = size, path
            cache_bytes[recipe] = stepper.cache_bytes
    if options.prepare:
        return None
    times = harness.interleave(calls, rounds=5, seconds=options.seconds)
    sequences = {name: 1 if name.endswith(" 1") else max(SLOTS) for name in calls}
    served = {
        f"{recipe} {slots}": clients(folder / f"{recipe}-{slots}.lepton", slots, shape, 1.0 if options.quick else 8.0)
        for recipe in RECIPES
        for slots in SLOTS
    }
    return {
        "served_tokens_per_s": served,
        "tokens_per_s": {
            name: sequences[name] * shape.tokens / statistics.median(seconds) for name, seconds in times.items()
        },
        "weights_bytes": weights_bytes,
        "cache_bytes": cache_bytes,
        "start": {recipe: start_s(path) for recipe, path in paths.items()},
        "shape": vars(shape),
    }


def tables(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    speed, sizes = found["tokens_per_s"], found["weights_bytes"]
    names = list(dict.fromkeys(name.rpartition(" ")[0] for name in speed))
    torch = next((name for name in names if "PyTorch" in name), None)
    rows = [
        (
            name,
            *(f"{speed[f'{name} {slots}']:.1f}" for slots in SLOTS),
            *(f"{speed[f'{name} {slots}'] / speed[f'{torch} {slots}']:.2f}" if torch else "" for slots in SLOTS),
            *(f"{of[name] / of['float32']:.3f}" if name in of else "" for of in (sizes, found["cache_bytes"])),
        )
        for name in names
    ]
    heads = ("1 sequence, tokens/s", "8 at once, tokens/s", "1, of PyTorch's", "8, of PyTorch's")
    first = harness.markdown(("weights", *heads, "bytes of weights, of float32's", "of the cache"), rows)
    served = found["served_tokens_per_s"]
    through = [(name, *(served[f"{name} {slots}"] for slots in SLOTS)) for name in RECIPES]
    second = harness.markdown(
        ("through a server", "1 client, tokens/s", "8 clients, tokens/s", "gain"),
        [(name, f"{one:.1f}", f"{eight:.1f}", f"{eight / one:.2f}") for name, one, eight in through],
    )
    start = harness.markdown(
        ("new process", "loaded after, s", "then to the first token, s"),
        [(name, f"{each['loaded']:.2f}", f"{each['first_token']:.3f}") for name, each in found["start"].items()],
    )
    return "\n\n".join((first, second, start))


def page(found: Mapping[str, Any]) -> str:
    """The page."""
    head = "Greedy decoding of a decoder of GPT-2's shape, with random weights (`benchmarks/generation.py`)."
    return (
        "\n\n".join(
            ("# Generation", head, tables(found["decoder"]["found"]), harness.provenance(found["decoder"]["run"]))
        )
        + "\n"
    )


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a tiny decoder, to try the script")
    parser.add_argument("--pages", action="store_true", help="write docs/benchmarks/generation.md")
    parser.add_argument("--seconds", type=float, default=90.0, help="of the timing")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    parser.add_argument("--folder", type=pathlib.Path, help="keep what is compiled and exported, or take it from there")
    parser.add_argument("--prepare", action="store_true", help="with --folder: make what is missing, measure nothing")
    options = parser.parse_args()
    if options.prepare and options.folder is None:
        parser.error("--prepare goes with --folder")
    began, busy = time.perf_counter(), f"{os.getloadavg()[0]:.1f}"
    with contextlib.ExitStack() as stack:
        folder = options.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder /= f"{harness.machine()['commit']}{'-quick' * options.quick}"
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(options, folder)
    if found is None:
        print(f"\n{time.perf_counter() - began:.0f} s; now without --prepare")
        return 0
    run = harness.machine(generation_peers.PACKAGES) | {"load": busy, "command": harness.command()}
    result = {"decoder": {"found": found, "run": run}}
    print(tables(found))
    harness.write_json(options.json, result)
    if options.pages and not options.quick:
        harness.publish("generation", result, page)
    print(f"\n{time.perf_counter() - began:.0f} s; repeat with: {harness.command()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
