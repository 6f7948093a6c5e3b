"""Cost of `optimize`: seconds by phase, XLA compiles, and memory, each model in its own process.

    python benchmarks/optimizing.py [--models digits,residual,minilm] [--recipe int8] [--quick] [--json FILE]

Each model is optimized twice, by two processes. The disk cache is empty at first; the second process finds the times
that the first one measured. Memory is that of the first process beyond what it used with the model loaded: at the peak,
and afterwards with the result still held. Each row is printed and kept when it is measured, so an interrupted run can
continue; `--fresh` measures everything again. Writes docs/benchmarks/optimizing.md.
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
from collections.abc import Mapping
from typing import Any

import harness
import jax
import journal
import models
import psutil
from models import random_weights

import lepton_xla as lx

MODELS = ("mlp", "unet", "digits", "residual", "minilm", "gpt2", "mobilenetv2", "efficientnet-b0")
COUNTS = ("measured", "from the cache")
COMPILE = "/jax/core/compile/backend_compile_duration"
HEADER = [
    "", "seconds", "in passes", "compiles", "XLA's seconds", "again", "compiles again", "weights", "peak", "of weights",
    "after",
]  # fmt: skip


def measure(name: str, recipe: str, quick: bool) -> dict[str, Any]:
    """One model's figures, in this process."""
    spec = random_weights.MODELS[name]() if name in random_weights.MODELS else models.load(name, quick=quick).spec
    program, batches = spec.program(), list(spec.calibration_batches() or ())
    gc.collect()
    compiles: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiles.append(seconds) if event == COMPILE else None
    )
    process = psutil.Process()
    before = process.memory_info().rss
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    small = lx.optimize(program, lx.Recipe.load(recipe), calibration=batches, buckets=spec.buckets)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    gc.collect()
    return {
        "name": name,
        "seconds": seconds,
        "compiles": len(compiles),
        "compile_s": sum(compiles),
        "phases": phases(small),
        "times": {key: sum(each.metrics.get("times", {}).get(key, 0) for each in small.history) for key in COUNTS},
        "weights_bytes": program.weights_bytes,
        "small_bytes": small.weights_bytes,
        "peak_bytes": peak[0] - before,
        "after_bytes": process.memory_info().rss - before,
    }


def phases(small: lx.Program) -> dict[str, float]:
    """Seconds by pass, and by phase of a pass that reports phases."""
    found: dict[str, float] = {}
    for report in small.history:
        found[report.name] = found.get(report.name, 0.0) + report.seconds
        for part, seconds in dict(report.metrics.get("seconds", {})).items():
            found[f"{report.name}: {part}"] = seconds
    return found


def alone(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a model in a new process, and again in a second one that finds the cached times.

    Raises:
        MissingError: if the model's data or packages are missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "row.json"
        command = [sys.executable, __file__, "--only", name, "--recipe", options.recipe, "--json", str(file)]
        found: list[dict[str, Any]] = []
        for _ in range(2):
            environment = os.environ | {"LEPTON_CACHE": folder}
            subprocess.run([*command, *(["--quick"] if options.quick else [])], check=True, env=environment)
            found.append(json.loads(file.read_text()))
            if "missing" in found[-1]:
                raise models.MissingError(found[-1]["missing"])
    return found[0] | {"again": {key: found[1][key] for key in ("seconds", "compiles", "compile_s", "times", "phases")}}


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    passes = sum(seconds for phase, seconds in row["phases"].items() if ": " not in phase)
    return [
        row["name"],
        f"{row['seconds']:.1f}",
        f"{100 * passes / row['seconds']:.0f} %",
        f"{row['compiles']}",
        f"{row['compile_s']:.1f}",
        f"{row['again']['seconds']:.1f}",
        f"{row['again']['compiles']}",
        f"{row['weights_bytes'] / 1e6:.1f} MB",
        f"{row['peak_bytes'] / 1e6:,.0f} MB",
        f"{row['peak_bytes'] / row['weights_bytes']:.1f}",
        f"{row['after_bytes'] / 1e6:,.0f} MB",
    ]


def tables(rows: list[dict[str, Any]]) -> str:
    """Both tables: figures, and seconds by phase."""
    names = list(dict.fromkeys(phase for row in rows for phase in row["phases"]))
    columns = [(title, each) for row in rows for title, each in ((row["name"], row), ("again", row["again"]))]
    by_phase = [[name, *(f"{each['phases'].get(name, 0.0):.2f}" for _, each in columns)] for name in names]
    phases_table = harness.markdown(["seconds", *(title for title, _ in columns)], by_phase)
    return harness.markdown(HEADER, map(cells, rows)) + "\n\n" + phases_table


def page(result: Mapping[str, Any]) -> str:
    """docs/benchmarks/optimizing.md."""
    parts = [
        "# Cost of optimizing",
        (
            f"`lx.optimize` with recipe `{result['recipe']}` and calibration data, each model in a new process, at the "
            'sizes of its buckets. "In passes" is the share of the seconds that the history explains. Compiles and '
            'their seconds are XLA\'s; several threads may compile at once. "Again" is a second process, which finds '
            "the times that the first one measured in the cache on disk. Memory is resident memory beyond that of "
            "the process with the model loaded: at the peak, the peak as a multiple of the weights' bytes, and "
            "afterwards, with the result still held. Some of it is code and caches of libraries, which do not depend "
            "on the model. `mlp`, `unet`, `gpt2`, `mobilenetv2` and `efficientnet-b0` have random weights."
        ),
        tables(result["rows"]),
        harness.provenance(result["run"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measures, prints, writes; exit code 1 where nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_names(parser, "--models", MODELS)
    parser.add_argument("--only", choices=MODELS, help="measure this one in this process, for --json")
    parser.add_argument("--recipe", default="int8", help="preset or file; default: int8")
    parser.add_argument("--quick", action="store_true", help="little training, no page: a smoke test")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    journal.add_option(parser)
    options = parser.parse_args()
    if options.only:
        try:
            found = measure(options.only, options.recipe, options.quick)
        except models.MissingError as error:
            found = {"missing": str(error)}
        (options.json or pathlib.Path("/dev/stdout")).write_text(json.dumps(found))
        return 0
    load = f"{os.getloadavg()[0]:.1f}"
    kept = journal.opened("optimizing", options, "recipe")
    rows: list[dict[str, Any]] = []
    print(" | ".join(HEADER), flush=True)
    for name in options.models:
        try:
            row = kept.row(name, functools.partial(alone, name, options))
        except models.MissingError as error:
            print(f"{name}: skipped: {error}", flush=True)
            continue
        rows.append(row)
        print(" | ".join(cells(row)), flush=True)
    if not rows:
        return 1
    result = {"recipe": options.recipe, "rows": rows, "run": harness.machine() | {"command": harness.command()}}
    result["run"]["load"] = load
    print(tables(rows))
    harness.conclude("optimizing", options, result, page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
