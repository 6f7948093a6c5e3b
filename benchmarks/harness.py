"""Shared by all benchmarks: interleaved timing, description of the machine, Markdown tables."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import lepton_xla as lx
from lepton_xla.kernels.keeping import Kept

# Do not use the user's timing cache, which may have been filled on a busy machine.
os.environ["LEPTON_CACHE"] = os.environ.get("LEPTON_CACHE", "off")

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "benchmarks"
# Processor flags of relevant instructions, the narrowest first.
_NOTABLE = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "avx512_bf16": "AVX-512 VNNI",
    "amx_int8": "AMX",
}  # fmt: skip
# Shortest turn; it amortizes the clock. Before it, a pause: threads of some libraries spin for a while after a call, so
# whoever comes next would have a core less.
_TURN_S, _PAUSE_S = 2e-3, 20e-3


def interleave(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 21, seconds: float = 20.0
) -> dict[str, list[float]]:
    """Time calls in turn, so that a slow moment of a shared machine affects all of them.

    Each turn starts with a pause, in which the threads of the one before come to rest, and an untimed call, which warms
    up caches and thread pools again.

    Args:
        calls: name -> function that blocks until its result is ready.
        rounds: number of turns of each call.
        seconds: limit for all rounds; at least five rounds are made.
    """
    counts = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        counts[name] = max(1, min(200, int(_TURN_S / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    began = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - began > seconds:
            break
        for name in order[done % len(order) :] + order[: done % len(order)]:
            call, count = calls[name], counts[name]
            time.sleep(_PAUSE_S)
            call()
            start = time.perf_counter()
            for _ in range(count):
                call()
            times[name].append((time.perf_counter() - start) / count)
    return times


def ratio(times: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio of two calls' times in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def compiled(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Compile `fn(*args)` ahead of time; return a function that runs it and waits for the result."""
    args = jax.tree.map(jax.numpy.asarray, args)
    ready = jax.jit(fn).lower(*args).compile()
    kept = Kept(jax.tree.leaves(args))  # as a loaded artifact keeps its weights
    return lambda kept=kept: jax.block_until_ready(ready(*args))


def example_inputs(inputs: Mapping[str, lx.TensorSpec], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Inputs for timing a model: floats in [0, 1), integers as token ids, a `mask` of ones."""
    random = np.random.default_rng(0)
    made = {}
    for name, spec in inputs.items():
        like = spec.at(sizes)
        if np.issubdtype(like.dtype, np.integer):
            made[name] = np.ones(like.shape) if name == "mask" else random.integers(1000, 20000, like.shape)
        else:
            made[name] = random.random(like.shape)
        made[name] = made[name].astype(like.dtype)
    return made


def processor(run: Mapping[str, str]) -> str:
    """The widest instructions for int8 products on the machine of a run, such as `AVX-512 VNNI`."""
    named = [name for flag, name in _NOTABLE.items() if re.search(rf"\b{flag}\b", run["machine"])]
    return named[-1] if named else run["machine"].rpartition(", ")[2]


def machine(packages: Iterable[str] = ()) -> dict[str, str]:
    """Describe the measurement: processor, cores, versions, commit, date."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    notable = [flag for flag in _NOTABLE if flag in flags]
    found = {}
    for package in ("jax", "jaxlib", "flax", "numpy", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{model or platform.machine()}, {os.cpu_count()} cores"
        + (f" ({', '.join(notable)})" if notable else "")
        + f", {jax.devices()[0].platform}",
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in found.items()),
        "commit": commit or "unknown",
    }


def provenance(run: Mapping[str, str]) -> str:
    """The lines below results: when, where and with which versions they were measured, and the command."""
    where = f"{run['date']}, commit {run['commit']}; {run['machine']}; load average {run['load']} before it started"
    return f"{where}; {run['versions']}.\n\n    {run['command']}"


def command() -> str:
    """The command that repeats this run."""
    script = pathlib.Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", str(shown), *sys.argv[1:]])


def numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """Make a parser for options of comma-separated numbers."""
    return lambda text: tuple(kind(part) for part in text.split(",") if part)


def add_names(parser: argparse.ArgumentParser, flag: str, known: Iterable[str]) -> None:
    """Add an option that takes several of these names, such as `--models`; by default all."""
    known = list(known)

    def read(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            named = f"no {flag[2:-1]} {', '.join(sorted(unknown))}"
            raise argparse.ArgumentTypeError(f"{named}; there are {', '.join(known)}")
        return text.split(",")

    parser.add_argument(flag, type=read, default=known, help="comma-separated; default: all")


def add_pages(parser: argparse.ArgumentParser) -> None:
    """Add `--pages` and `--no-pages`."""
    parser.add_argument(
        "--pages", action=argparse.BooleanOptionalAction, default=True, help="write docs/benchmarks/; not with --quick"
    )


def write_json(path: pathlib.Path | None, found: Any) -> None:
    """Write results to a file, if one is given."""
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


def publish(name: str, found: Mapping[str, Any], page: Callable[[Mapping[str, Any]], str]) -> dict[str, Any]:
    """Add results to docs/benchmarks/NAME.json, and write NAME.md from all results in it.

    Args:
        name: name of the benchmark.
        found: results by key; they replace earlier ones.
        page: makes the page from all results, and orders them.

    Returns:
        All results.
    """
    file = PAGES / f"{name}.json"
    known = (json.loads(file.read_text()) if file.is_file() else {}) | found
    PAGES.mkdir(parents=True, exist_ok=True)
    write_json(file, known)
    (PAGES / f"{name}.md").write_text(page(known))
    return known


def conclude(
    name: str, options: argparse.Namespace, found: Mapping[str, Any], page: Callable[[Mapping[str, Any]], str]
) -> None:
    """Write the page and the file that `--pages`, `--quick` and `--json` ask for, and say how to repeat it."""
    if options.pages and not options.quick:
        publish(name, found, page)
    write_json(options.json, found)
    print(f"repeat with: {command()}")


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column and notes are left-aligned, the others right-aligned."""
    rules = ["---" if index == 0 or title == "note" else "---:" for index, title in enumerate(header)]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(rules) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share as a percentage with two places."""
    return f"{100 * share:.2f}"
