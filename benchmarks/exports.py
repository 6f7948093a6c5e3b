"""How far the answers of exported models are from the artifact's: the largest difference, by model, recipe and format.

    python benchmarks/exports.py [--models digits,residual] [--tensorflow PYTHON] [--onnx PYTHON] [--json FILE]

Exports to each format as `leptonx export` does. Those of TensorFlow run with the Python of an environment that has
this package with its extra `tensorflow` (`uv venv build/peers/tensorflow`, then `uv pip install --python
build/peers/tensorflow/bin/python '.[tensorflow]'`), those of ONNX with one that has the extra `onnx`. Models are
trained for a short time: how well they are trained changes nothing here. Writes docs/benchmarks/exports.md, but not
with `--quick`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import harness
import models
import numpy as np

import lepton_xla as lx

RECIPES = ("none", "int8", "int8-weight-only", "int4-weight-only")
FORMATS = ("stablehlo", "saved-model", "tflite", "onnx", "qonnx")
ROWS = 8
_NOT_RUN = "not run"
_EXPORT = """
import json, os, sys
import numpy as np
import lepton_xla as lx
for number, (artifact, rows, form) in enumerate(json.loads(sys.argv[1])):
    try:
        with np.load(rows) as file:
            found = lx.export(artifact, os.path.join(sys.argv[2], str(number)), form, rows=dict(file))
        told = {"difference": max(found.differences.values()), "largest": max(found.largest.values())}
    except lx.LeptonError as error:
        told = {"note": str(error)}
    print(json.dumps(told), flush=True)
"""


def artifacts(name: str, folder: pathlib.Path) -> tuple[dict[str, pathlib.Path], pathlib.Path]:
    """An artifact of each recipe, and rows to compare on."""
    spec = models.load(name, quick=True).spec
    program = spec.program()
    batch = next(iter(spec.calibration_batches()))
    rows = folder / f"{name}.npz"
    buckets = {symbol: (1, ROWS) if symbol == "batch" else sizes for symbol, sizes in spec.buckets.items()}
    np.savez(rows, **{key: np.asarray(value)[:ROWS] for key, value in batch.items()})
    made: dict[str, pathlib.Path] = {}
    for recipe in RECIPES:
        small = program
        if recipe != "none":
            chosen = lx.Recipe.load(recipe).replace({"measure": False} if recipe == "int8" else {})
            small = lx.optimize(program, chosen, buckets=buckets, calibration=[batch])
        made[recipe] = folder / f"{name}-{recipe}.lepton"
        lx.compile(small, buckets, name=name).save(made[recipe])
    return made, rows


def exported(python: str, jobs: list[list[str]]) -> list[dict[str, Any]]:
    """Of each artifact, format and file of rows: the largest difference and value, or why it cannot be exported."""
    environ = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [python, "-c", _EXPORT, json.dumps(jobs), folder],
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[list[str]] = []
        for name in options.models:
            try:
                made, data = artifacts(name, pathlib.Path(folder))
            except models.MissingError as error:
                print(f"{name}: skipped: {error}", flush=True)
                continue
            for recipe, artifact in made.items():
                rows.append({"model": name, "recipe": recipe})
                jobs.append([str(artifact), str(data)])
            print(f"{name}: compiled", flush=True)
        for form in FORMATS:
            python = {"stablehlo": sys.executable, "onnx": options.onnx, "qonnx": options.onnx}.get(
                form, options.tensorflow
            )
            found = exported(python, [[*job, form] for job in jobs]) if python else [{"note": _NOT_RUN}] * len(jobs)
            for row, each in zip(rows, found, strict=True):
                row[form] = each
            print(f"{form}: exported", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The table, and below it why formats refused models."""
    cells: list[list[str]] = []
    notes: dict[str, int] = {}
    for row in rows:
        line = [row["model"], row["recipe"]]
        for form in FORMATS:
            found = row[form]
            if found.get("note") == _NOT_RUN:
                line.append(_NOT_RUN)
            elif "note" in found:
                line.append(f"refused [{notes.setdefault(found['note'], len(notes) + 1)}]")
            else:
                line.append(f"{found['difference']:.1e}")
        values = [row[form]["largest"] for form in FORMATS if "largest" in row[form]]
        cells.append([*line, f"{max(values):.3g}" if values else ""])
    header = ["model", "recipe", *FORMATS, "largest value"]
    listed = [f"{number}. {note}" for note, number in notes.items()]
    return "\n\n".join([harness.markdown(header, cells), *(["\n".join(listed)] if listed else [])])


def page(result: Mapping[str, Any]) -> str:
    """docs/benchmarks/exports.md."""
    parts = [
        "# Exports",
        (
            "The largest absolute difference between the answers of an artifact and of what `leptonx export` made of "
            f"it, on {ROWS} rows of the model's data, and the largest value of its outputs. Exported files were read "
            "again from the disk, and run by JAX alone, by TensorFlow, by LiteRT's interpreter, by ONNX Runtime, and "
            "by QONNX's executor. With `measure = false` in `int8`, all products that can be are of integers; "
            "there, a last bit that another framework rounds otherwise can move a code."
        ),
        table(result["rows"]),
        harness.provenance(result["run"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measures, prints, writes; exit code 1 where nothing could be exported."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_names(parser, "--models", models.MODELS)
    parser.add_argument("--tensorflow", metavar="PYTHON", help="of an environment with the extra tensorflow")
    parser.add_argument("--onnx", metavar="PYTHON", help="of an environment with the extra onnx")
    parser.add_argument("--quick", action="store_true", help="no page: a smoke test")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    os.environ["LEPTON_KERNELS"] = "off"
    load = f"{os.getloadavg()[0]:.1f}"
    rows = measure(options)
    if not rows:
        return 1
    result = {"rows": rows, "run": harness.machine() | {"command": harness.command(), "load": load}}
    print(table(rows))
    harness.conclude("exports", options, result, page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
