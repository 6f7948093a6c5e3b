"""Memory and time of a large model, from its trace to its first answer: each recipe in processes of its own.

    python benchmarks/large.py [--millions 1000] [--recipes none,int8-weight-only-nearest,...] [--quick] [--json FILE]

A decoder with random float32 weights is traced, optimized, compiled and saved in one process, and loaded and asked in
another. Memory is the most that a phase has, beyond that of the process before there were weights, as a multiple of the
float32 weights' bytes; the caller keeps the latest program alone. Pages of files, which the system drops when memory is
short, are counted apart. Each row is printed and kept when it is measured, so an interrupted run can continue;
`--fresh` measures everything again. Writes docs/benchmarks/large.md.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import harness
import journal
import numpy as np

NEAREST = "-nearest"
RECIPES = ("none", "int8-weight-only-nearest", "int8-weight-only", "int8-nearest", "int8")
PHASES = ("trace", "optimize", "compile", "save", "load", "answer")
LENGTH = 16
LIMIT = 2.0
# Width and layers by millions of parameters; a feed-forward layer is four times as wide.
SHAPES = {1: (96, 2), 60: (768, 6), 200: (1024, 12), 1000: (2048, 18)}
VOCABULARY = 32_000


def memory() -> tuple[int, int]:
    """Bytes of this process that the system cannot take back without swapping, and its resident bytes."""
    found: dict[str, int] = {}
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.startswith(("RssAnon", "RssShmem", "VmRSS")):
            found[name] = 1024 * int(value.split()[0])
    return found["RssAnon"] + found["RssShmem"], found["VmRSS"]


class Phases:
    """Seconds and most memory of phases."""

    def __init__(self) -> None:
        self._before = memory()
        self.found: dict[str, dict[str, float]] = {}

    def run[T](self, name: str, function: Callable[[], T]) -> T:
        """Run a phase."""
        gc.collect()
        peak, done = (0, 0), threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.is_set():
                own, resident = memory()
                peak = max(peak[0], own), max(peak[1], resident)
                done.wait(0.005)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        started = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
        gc.collect()
        after = memory()[0] - self._before[0]
        own, resident = (most - before for most, before in zip(peak, self._before, strict=True))
        self.found[name] = {"seconds": seconds, "peak_bytes": own, "resident_bytes": resident, "after_bytes": after}
        print(f"  {name}: {seconds:.1f} s, {own / 1e6:,.0f} MB of {resident / 1e6:,.0f} MB resident, "
              f"{after / 1e6:,.0f} MB after", file=sys.stderr, flush=True)  # fmt: skip
        return result


def weights(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """Random weights of a decoder."""
    import jax

    random = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        made = random.standard_normal(shape, dtype=np.float32)
        made *= shape[0] ** -0.5
        return jax.device_put(made)

    def layer() -> dict[str, Any]:
        return {
            "qkv": array(width, 3 * width), "out": array(width, width), "up": array(width, 4 * width),
            "down": array(4 * width, width),
        }  # fmt: skip

    return {"table": array(vocabulary, width), **{f"layer{index}": layer() for index in range(layers)}}


def decoder(given: Any, tokens: Any) -> Any:
    """Logits of the last token."""
    import jax
    import jax.numpy as jnp

    x = given["table"][tokens]
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for index in range(len(given) - 1):
        layer = given[f"layer{index}"]
        normal = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        heads = (normal @ layer["qkv"]).reshape(*x.shape[:2], 3, -1, 32)
        query, key, value = (heads[:, :, part] for part in range(3))
        scores = jnp.where(mask[None, None], jnp.einsum("bqhd,bkhd->bhqk", query, key) * 32**-0.5, -1e9)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), value).reshape(x.shape) @ layer["out"]
        normal = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        x = x + jax.nn.gelu(normal @ layer["up"]) @ layer["down"]
    return x[:, -1] @ given["table"].T


def make(millions: int, recipe: str, path: str) -> dict[str, Any]:
    """Trace, optimize, compile and save, in this process."""
    import jax

    import lepton_xla as lx

    width, layers = SHAPES[millions]
    jax.block_until_ready(jax.numpy.ones((64, 64)) @ jax.numpy.ones((64, 64)))
    phases = Phases()
    given = weights(width, layers, VOCABULARY if millions > 1 else 1000)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(given))
    spec = lx.TensorSpec(("batch", LENGTH), "int32")
    program = phases.run("trace", functools.partial(lx.trace, decoder, given, {"tokens": spec}))
    del given  # the program has them; `optimize` gives them back
    if recipe != "none":
        random = np.random.default_rng(1)
        batches = [{"tokens": random.integers(0, 1000, (4, LENGTH)).astype(np.int32)} for _ in range(2)]
        given = None if recipe.endswith(NEAREST) else batches
        optimized = functools.partial(
            lx.optimize,
            program,
            lx.Recipe.load(recipe.removesuffix(NEAREST)),
            calibration=given,
            buckets={"batch": (1,)},
            progress=tell,
        )
        program = phases.run("optimize", optimized)
        del optimized
    small_bytes = program.weights_bytes
    artifact = phases.run("compile", functools.partial(lx.compile, program, {"batch": (1,)}, name="large"))
    del program
    phases.run("save", functools.partial(artifact.save, path))
    return {"phases": phases.found, "weights_bytes": size, "small_bytes": small_bytes}


def tell(line: str) -> None:
    """Shows a step of `optimize`."""
    print(f"    {memory()[0] / 1e6:,.0f} MB: {line}", file=sys.stderr, flush=True)


def ask(path: str) -> dict[str, Any]:
    """Load and ask once, in this process."""
    import lepton_xla as lx

    phases = Phases()
    servable = phases.run("load", lambda: lx.load(path))
    answer = phases.run("answer", lambda: servable(tokens=np.ones((1, LENGTH), np.int32)))
    if not all(np.isfinite(value).all() for value in answer.values()):
        raise RuntimeError("an answer is not finite")
    return {"phases": phases.found}


def alone(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: a recipe, in two new processes."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        path, file = pathlib.Path(folder) / "large.lepton", pathlib.Path(folder) / "row.json"
        found: list[dict[str, Any]] = []
        for part in ("make", "ask"):
            command = [sys.executable, __file__, "--millions", str(options.millions), "--only", part, recipe, str(path)]
            environment = os.environ | {"LEPTON_CACHE": folder}
            subprocess.run([*command, "--json", str(file)], check=True, env=environment)
            found.append(json.loads(file.read_text()))
        size = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return found[0] | {"name": recipe, "disk_bytes": size, "phases": found[0]["phases"] | found[1]["phases"]}


def cells(row: Mapping[str, Any], figure: Callable[[Mapping[str, float]], str]) -> list[str]:
    """A row of a table: a figure of each phase."""
    return [row["name"], *(figure(row["phases"][each]) if each in row["phases"] else "" for each in PHASES)]


def tables(rows: list[dict[str, Any]]) -> str:
    """Peaks, seconds and sizes."""
    size = rows[0]["weights_bytes"]
    peaks = [cells(row, lambda each: f"{each['peak_bytes'] / size:.2f}") for row in rows]
    resident = [cells(row, lambda each: f"{each['resident_bytes'] / size:.2f}") for row in rows]
    seconds = [cells(row, lambda each: f"{each['seconds']:.1f}") for row in rows]
    sizes = [[row["name"], *(f"{row[key] / 1e6:,.0f} MB" for key in ("weights_bytes", "small_bytes", "disk_bytes"))]
             for row in rows]  # fmt: skip
    return "\n\n".join(
        [
            harness.markdown(["peak, of the float32 weights", *PHASES], peaks),
            harness.markdown(["resident, of the float32 weights", *PHASES], resident),
            harness.markdown(["seconds", *PHASES], seconds),
            harness.markdown(["bytes", "float32", "optimized", "artifact"], sizes),
        ]
    )


def page(result: Mapping[str, Any]) -> str:
    """docs/benchmarks/large.md."""
    millions = result["rows"][0]["weights_bytes"] / 4e6
    parts = [
        "# Large models",
        (
            f"A decoder of {millions:,.0f} million random float32 parameters is traced, optimized, compiled for one "
            f"row of {LENGTH} tokens and saved in one process, and loaded and asked in another. Peaks are the most "
            "memory of a phase beyond that of the process before there were weights, as a multiple of the float32 "
            "weights' bytes; the caller keeps the latest program alone. Resident memory has the pages of mapped files "
            "too, which the system drops when memory is short: of large models the weights that smoothing and GPTQ "
            f"change are kept in such files. The aim is a peak of {LIMIT:g} in every phase. Files were in the "
            "page cache. `none` is no recipe, and `-nearest` is without calibration data, so without GPTQ."
        ),
        tables(result["rows"]),
        harness.provenance(result["run"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measures, prints, writes; exit code 1 where a peak is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_names(parser, "--recipes", RECIPES)
    parser.add_argument("--millions", type=int, choices=list(SHAPES), default=1000, help="parameters; default: 1000")
    parser.add_argument("--only", nargs=3, metavar=("PART", "RECIPE", "PATH"), help="in this process, for --json")
    parser.add_argument("--scratch", type=pathlib.Path, help="folder for artifacts; default: the system's")
    parser.add_argument("--quick", action="store_true", help="one million parameters, no page: a smoke test")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    journal.add_option(parser)
    options = parser.parse_args()
    if options.only:
        part, recipe, path = options.only
        found = make(options.millions, recipe, path) if part == "make" else ask(path)
        (options.json or pathlib.Path("/dev/stdout")).write_text(json.dumps(found))
        return 0
    if options.quick:
        options.millions = 1
    load = f"{os.getloadavg()[0]:.1f}"
    kept = journal.opened("large", options, "millions")
    rows: list[dict[str, Any]] = []
    for recipe in options.recipes:
        print(f"{recipe} ...", flush=True)
        rows.append(kept.row(recipe, functools.partial(alone, recipe, options)))
    result = {"rows": rows, "run": harness.machine() | {"command": harness.command(), "load": load}}
    print(tables(rows))
    harness.conclude("large", options, result, page)
    size = rows[0]["weights_bytes"]
    highest = max(phase["peak_bytes"] / size for row in rows for phase in row["phases"].values())
    return int(highest > LIMIT and not options.quick)


if __name__ == "__main__":
    raise SystemExit(main())
