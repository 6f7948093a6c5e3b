"""`leptonx bench`: measures an artifact and compares it with the float model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from lepton_xla.cli import _common

_WARM_UP = 5
_LEAST_ROUNDS = 5


@click.command()
@click.argument("path")
@click.option("--target", metavar="TARGET", help="Compare with this model, FILE.py:NAME, under jax.jit in float.")
@click.option("--rounds", default=200, show_default=True, type=click.IntRange(1), help="Calls per bucket.")
@click.option(
    "--seconds",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help=f"Stop measuring a bucket after this long, but not before {_LEAST_ROUNDS} calls.",
)
@_common.json_option
def bench(path: str, *, target: str | None, rounds: int, seconds: float, as_json: bool) -> None:
    """Measure the artifact at PATH: latency (NumPy in, NumPy out) and rows/s per bucket, load time, bytes.

    With --target, artifact and float model (under jax.jit) are called in turn, so a slow moment of the machine affects
    both. On shared machines trust the ratios, not the times.

    \b
      leptonx bench digits.lepton
      leptonx bench digits.lepton --target digits.py:model
      leptonx bench digits.lepton --target digits.py:model --rounds 1000 --json > bench.json
    """
    with _common.progress() as step:
        step("load JAX")
        import jax

        from lepton_xla.cli import _models
        from lepton_xla.compiler import load
        from lepton_xla.compiler.buckets import bucket_name, combinations

        jax.devices()  # starting the backend is not part of loading
        step(f"load {path}")
        started = time.perf_counter()
        servable = load(path)
        load_s = time.perf_counter() - started
        program, examples, float_model = None, None, None
        if target is not None:
            step(f"load {target}")
            spec = _models.load_target(target)
            program = spec.program()
            _models.check_same_inputs(servable, program, path, target)
            _, examples = _models.calibration(spec, program)
            float_model = _models.float_predict(program)
        wanted = combinations(servable.buckets)
        measured: list[dict[str, Any]] = []
        for done, sizes in enumerate(wanted):
            step(f"measure {bucket_name(sizes)}", done, len(wanted))
            inputs = _models.inputs_at(servable.inputs, sizes, examples)
            rows = sizes[servable.row_symbol] if servable.row_symbol is not None else 1
            measured.append({"bucket": bucket_name(sizes), "rows": rows})
            calls: dict[str, Callable[..., Any]] = {"artifact": servable}
            if float_model is not None:
                started = time.perf_counter()
                float_model(**inputs)
                measured[-1]["float_jit_s"] = time.perf_counter() - started
                calls = {"float": float_model, **calls}
            times = _measure(calls, inputs, rounds, seconds)
            measured[-1]["rounds"] = len(times["artifact"])
            measured[-1] |= {name: _summary(found, rows) for name, found in times.items()}
            if "float" in times:
                pair = measured[-1]["float"], measured[-1]["artifact"]
                measured[-1]["speedup"] = pair[0]["median_s"] / pair[1]["median_s"]
    manifest = servable.manifest
    compile_s = sum(manifest.compile_s.values())
    document: dict[str, Any] = {
        "path": path,
        "target": target,
        "route": servable.route,
        "inputs": "calibration data" if examples is not None else "random",
        "buckets": measured,
        "load_s": load_s,
        "compile_s": compile_s,
        "compile_over_load": compile_s / load_s,
        "float_jit_s": sum(entry["float_jit_s"] for entry in measured) if program is not None else None,
        "weights_bytes": servable.weights_bytes,
        "weights_bytes_on_disk": _common.weights_on_disk(manifest),
        "artifact_bytes": manifest.size_bytes,
        "weights_bytes_float": program.weights_bytes if program is not None else None,
    }
    if as_json:
        _common.print_json(document)
    else:
        _print(document)


def _measure(
    calls: Mapping[str, Callable[..., Any]], inputs: Mapping[str, Any], rounds: int, limit_s: float
) -> dict[str, list[float]]:
    """Time the calls in turn; return the seconds of each."""
    for _ in range(_WARM_UP):
        for call in calls.values():
            call(**inputs)
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= _LEAST_ROUNDS and time.perf_counter() - began > limit_s:
            break
        for name, call in calls.items():
            started = time.perf_counter()
            call(**inputs)
            times[name].append(time.perf_counter() - started)
    return times


def _summary(times: Sequence[float], rows: int) -> dict[str, float]:
    median_s = statistics.median(times)
    p99_s = sorted(times)[math.ceil(0.99 * len(times)) - 1]
    return {"median_s": median_s, "p99_s": p99_s, "rows_per_s": rows / median_s}


def _print(document: Mapping[str, Any]) -> None:
    both = document["target"] is not None
    sides = ("float", "artifact") if both else ("artifact",)
    rows = []
    for entry in document["buckets"]:
        cells = [entry["bucket"]]
        for side in sides:
            figures = entry[side]
            cells += [_common.seconds(figures["median_s"]), _common.seconds(figures["p99_s"])]
            cells.append(_common.short(figures["rows_per_s"]))
        rows.append([*cells, *([f"{entry['speedup']:.2f}x"] if both else [])])
    columns = ["bucket"]
    for side in sides:
        prefix = f"{side}\n" if both else ""
        columns += [f">{prefix}{figure}" for figure in ("median", "p99", "rows/s")]
    columns += [">artifact is\nfaster"] if both else []
    title = document["path"] + (f" against float jit of {document['target']}" if both else "")
    counts = [entry["rounds"] for entry in document["buckets"]]
    often = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    _common.show(
        _common.table(title, columns, rows),
        f"{often} calls at each bucket{', the two in turn' if both else ''}; inputs: {document['inputs']}",
    )
    how = "from compiled code" if document["route"] == "executables" else "from StableHLO, compiled while loading"
    loaded, compiled = (_common.seconds(document[key]) for key in ("load_s", "compile_s"))
    memory, large = document["weights_bytes"], document["weights_bytes_float"]
    beside = f" ({_common.ratio(memory, large)} of float's {_common.size(large)})" if both else ""
    disk, whole = (_common.size(document[key]) for key in ("weights_bytes_on_disk", "artifact_bytes"))
    _common.show(
        f"loaded in {loaded} {how}; {compiled} to compile when it was made, {document['compile_over_load']:.1f} times "
        f"as long",
        f"weights {_common.size(memory)} in memory{beside}, {disk} on disk; artifact {whole}",
    )
