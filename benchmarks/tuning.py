"""What `lx.tuning.tune` finds beside every preset that needs no training, at the same bound on the drop.

    python benchmarks/tuning.py [--models digits,lenet5] [--minutes 10] [--max-drop 0.5] [--quick] [--json FILE]

Each model is tuned twice, from one scoring run: for the fewest bytes on disk, then for the least time of a call. The
presets are measured in the same runs, in turns with the float model, and judged on the same rows. The best preset is
the one that is best at the objective among those that keep to the bound by measurement. Trials are kept in
build/benchmarks/tuning/, so an interrupted run can continue; `--fresh` measures everything again. Writes
docs/benchmarks/tuning.md.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from typing import Any, Literal

import harness
import models

import lepton_xla as lx
from lepton_xla.tuning import Budget, Constraints, Trial, Tuning, tune

MODELS = ("digits", "lenet5", "residual", "transformer", "minilm")
PRESETS = (
    "int8", "int8-weight-only", "int4-weight-only", "int4-channel-weight-only", "nf4-weight-only", "codebook16",
    "int8-prune50",
)  # fmt: skip
FOLDER = harness.ROOT / "build" / "benchmarks" / "tuning"
# Shares of the minutes: the scoring run counts for the first.
SHARES: dict[Literal["bytes", "latency"], float] = {"bytes": 0.6, "latency": 0.4}
INTRODUCTION = """\
`benchmarks/tuning.py` writes this page from `tuning.json`. For each model and objective, the first row is the best
preset that keeps to the bound on the drop, the second what `leptonx tune` found within the minutes; presets are among
its trials, so it is never worse. The drop is that on the half of the test rows that chose nothing, with its 95 %
interval, paired with the float model row by row; candidates were chosen by the other half. Time is a share of that of
the float program in the same rounds, the geometric mean over the buckets."""
LEFT = [
    "preset",
    "drop, points (95 %)",
    "bytes on disk",
    "of float's time",
    "times smaller found",
    "times faster found",
]
HEADER = ["", "recipe", "drop, points (95 %)", "bytes on disk", "of float's", "of float's time", "beside the preset"]


def measure(model: models.BenchModel, options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Tune one model for each objective."""
    spec = model.spec
    assert spec.evaluate is not None
    found: dict[str, Any] = {"data": model.data, "objectives": {}}
    program, batches = spec.program(), list(spec.calibration_batches() or ())
    for objective, share in SHARES.items():
        began = time.perf_counter()

        def say(line: str, done: int, total: int, began: float = began) -> None:
            del done, total
            if line.endswith(": build"):
                print(f"    {time.perf_counter() - began:4.0f} s, {line}", flush=True)

        tuned = tune(
            program,
            spec.evaluate,
            batches,
            constraints=Constraints(max_drop=options.max_drop),
            objective=objective,
            budget=Budget(options.minutes * share, 3 if options.quick else None),
            buckets=spec.buckets,
            presets=PRESETS[:1] if options.quick else PRESETS,
            journal=str(folder / f"{model.name}.jsonl"),
            progress=say,
        )
        found["objectives"][objective] = summary(tuned, objective)
        print("\n".join("    " + " | ".join(row) for row in cells(model.name, objective, found)), flush=True)
    return found


def summary(tuned: Tuning, objective: Literal["bytes", "latency"]) -> dict[str, Any]:
    """The best preset and the best of all, how they compare, and how far estimates agree with measurements."""
    holding = [trial for trial in tuned.trials if trial.origin == "preset" and not trial.excess(tuned.constraints)]
    preset = min(holding, key=lambda trial: trial.value(objective), default=None)
    best = tuned.best
    return {
        "float": tuned.float_metrics[tuned.metric],
        "float_bytes": tuned.float_bytes,
        "preset": shown(preset),
        "best": shown(best),
        "better": preset.value(objective) / best.value(objective) if preset and best else None,
        "presets": [left(trial, tuned) for trial in tuned.trials if trial.origin == "preset" and not trial.failure],
        "correlations": tuned.correlations,
        "trials": len(tuned.trials),
        "chosen": sum(bool(trial.estimates) for trial in tuned.trials),
        "stopped": tuned.stopped,
        "seconds": tuned.seconds,
    }


def left(preset: Trial, tuned: Tuning) -> dict[str, Any]:
    """A preset, and what it leaves: how much smaller and faster the search found at no larger drop."""
    alike = [trial for trial in tuned.trials if not trial.failure and trial.judged <= preset.judged]
    return {
        "name": preset.name,
        "drop": str(preset.reported),
        "bytes": preset.bytes,
        "latency": preset.latency,
        "smaller": preset.bytes / min(trial.bytes for trial in alike),
        "faster": preset.latency / min(trial.latency for trial in alike),
    }


def shown(trial: Trial | None) -> dict[str, Any] | None:
    """What tables show of a trial."""
    if trial is None or trial.reported is None:
        return None
    return {
        "name": trial.name,
        "drop": str(trial.reported),
        "judged": trial.judged,
        "bytes": trial.bytes,
        "latency": trial.latency,
        "recipe": trial.recipe,
    }


def cells(name: str, objective: str, found: Mapping[str, Any]) -> list[list[str]]:
    """Two rows: the best preset, and what was found."""
    result = found["objectives"][objective]
    rows: list[list[str]] = []
    for which in ("preset", "best"):
        trial = result[which]
        if trial is None:
            rows.append([f"{name}, {objective}", f"no {which} holds", "", "", "", "", ""])
            continue
        better = f"{result['better']:.2f} times {'smaller' if objective == 'bytes' else 'faster'}"
        rows.append(
            [
                f"{name}, {objective}",
                trial["name"],
                trial["drop"],
                f"{trial['bytes']:,}",
                f"{trial['bytes'] / result['float_bytes']:.3f}",
                f"{trial['latency']:.2f}",
                better if which == "best" and result["better"] else "",
            ]
        )
    return rows


def page(results: Mapping[str, Any]) -> str:
    """The page, from the results of all models measured so far."""
    parts = [
        "# Tuning",
        INTRODUCTION,
    ]
    for name in [name for name in MODELS if name in results]:
        found = results[name]
        rows = [row for objective in found["objectives"] for row in cells(name, objective, found)]
        parts += [
            f"## {name}",
            f"{found['data']}. At most {found['max_drop']:g} points lost.",
            harness.markdown(HEADER, rows),
        ]
        for objective, result in found["objectives"].items():
            ranks = ", ".join(f"{kind} {value:.2f}" for kind, value in result["correlations"].items())
            parts.append(
                f"For {objective}: {result['trials']} recipes measured in {result['seconds']:.0f} s (ended: "
                f"{result['stopped']}); rank correlations of estimates and measurements over {result['chosen']} chosen "
                f"ones: {ranks or 'too few'}."
            )
        presets: dict[str, dict[str, Any]] = {}
        for result in found["objectives"].values():
            for each in result.get("presets", []):
                known = presets.setdefault(each["name"], dict(each))
                known |= {key: max(known[key], each[key]) for key in ("smaller", "faster")}
        cells_of = [
            [each["name"], each["drop"], f"{each['bytes']:,}", f"{each['latency']:.2f}", f"{each['smaller']:.2f}",
             f"{each['faster']:.2f}"]
            for each in presets.values()
        ]  # fmt: skip
        if cells_of:
            parts += ["What each preset leaves, at no larger drop on the rows that candidates are chosen by:",
                      harness.markdown(LEFT, cells_of)]  # fmt: skip
        parts.append(harness.provenance(found["run"]))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measures, prints, writes; exit code 1 where nothing could be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    harness.add_names(parser, "--models", MODELS)
    parser.add_argument("--minutes", type=float, default=10.0, help="for each model; default: 10")
    parser.add_argument("--max-drop", type=float, default=0.5, help="points that may be lost; default: 0.5")
    parser.add_argument("--fresh", action="store_true", help="measure every trial again")
    parser.add_argument("--quick", action="store_true", help="little training, three trials, no page: a smoke test")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            load = f"{os.getloadavg()[0]:.1f}"
            print(f"{name} ...", flush=True)
            try:
                found = measure(
                    models.load(name, quick=options.quick), options, pathlib.Path(scratch) if options.quick else FOLDER
                )
            except models.MissingError as error:
                print(f"{name}: skipped: {error}", flush=True)
                continue
            except lx.LeptonError as error:
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                continue
            run = harness.machine() | {"command": harness.command(), "load": load}
            results[name] = found | {"max_drop": options.max_drop, "run": run}
            if options.pages and not options.quick:
                harness.publish("tuning", {name: results[name]}, page)
    for name, found in results.items():
        rows = [row for objective in found["objectives"] for row in cells(name, objective, found)]
        print(harness.markdown(HEADER, rows))
        for objective, result in found["objectives"].items():
            print(f"{name}, {objective}: rank correlations {result['correlations']}, {result['seconds']:.0f} s")
    harness.write_json(options.json, results)
    print(f"repeat with: {harness.command()}")
    return int(not results)


if __name__ == "__main__":
    raise SystemExit(main())
