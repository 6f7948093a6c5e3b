"""What `lx.tuning.tune` finds beside every preset that needs no training, at the same bound on the drop.

    python benchmarks/tuning.py [--models digits,lenet5] [--minutes 10] [--max-drop 0.5] [--train] [--peers] [--quick]

Each model is tuned for the fewest bytes on disk, then for the least time of a call, from one scoring run; MiniLM also
for the most cosine at the bytes of `int8`, and at a fifth of float's bytes, where the drop is told; with `--train`
digits and the residual CNN also with candidates that are trained. The presets are measured in the same runs, in turns
with the float model, and judged on the same rows. The best preset is the one that is best at the objective among those
that keep to the bound by measurement. `--peers` adds qwix by hand, NNCF's accuracy control and ModelOpt's
AutoQuantize, where they are installed. Trials are kept in build/benchmarks/tuning/, so an interrupted run can continue;
`--fresh` measures everything again. Each objective is written to docs/benchmarks/tuning.md as soon as it is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import harness
import models
from tuning_page import FASTER, HEADER, MODELS, SMALL, SMALLER, aims, cells, page
from tuning_trainings import TRAININGS

import lepton_xla as lx
from lepton_xla.train import TrainSpec
from lepton_xla.tuning import Budget, Constraints, Trial, Tuning, tune
from lepton_xla.tuning.constraints import Objective
from lepton_xla.tuning.judging import Judge
from lepton_xla.tuning.trials import as_loaded, predictor

# The most promising first: where time is short, the last are measured last.
PRESETS = (
    "int8", "int4-channel-weight-only", "codebook16", "int8-prune50", "int8-weight-only", "int4-weight-only",
    "nf4-weight-only",
)  # fmt: skip
FOLDER = harness.ROOT / "build" / "benchmarks" / "tuning"
MAX_DROP = {"minilm": 0.2}
# The bytes that a trained candidate may have, as a share of float's, and how many times as fast it must be; of those,
# the one that loses least is the best. Whether it lost anything, the half of the rows that does not choose says.
TRAINED_BYTES = {"residual": 1 / 6, "digits": 1 / 16}
TRAINED_SPEEDUP = {"residual": 3.0}


@dataclasses.dataclass(frozen=True)
class Task:
    """One search.

    Attributes:
        name: for tables.
        objective: what is to be least.
        constraints: what to keep to.
        share: of the minutes.
        training: how candidates are trained, if they are.
        metric: of `evaluate`, by which candidates are judged; by default the model's first.
    """

    name: str
    objective: Objective
    constraints: Constraints
    share: float
    training: TrainSpec | None = None
    metric: str | None = None


def tasks(model: models.BenchModel, options: argparse.Namespace, known: Mapping[str, Any]) -> Iterator[Task]:
    """The searches of a model; `known` are those that are done, those that were yielded before among them."""
    drop = options.max_drop if options.max_drop is not None else MAX_DROP.get(model.name, 0.5)
    wanted = options.objectives
    if "bytes" in wanted:
        yield Task("bytes", "bytes", Constraints(max_drop=drop), 0.5)
    if "latency" in wanted:
        yield Task("latency", "latency", Constraints(drop), 0.5)
    if model.name == "minilm" and "bytes" in known:
        int8 = next((each["bytes"] for each in known["bytes"]["presets"] if each["name"] == "int8"), None)
        if "cosine" in wanted and int8:
            yield Task("cosine", "metric", Constraints(max_bytes=int8), 0.5, metric="cosine")
        if "small" in wanted:
            small = Constraints(max_bytes=int(SMALL * known["bytes"]["float_bytes"]))
            yield Task("small", "metric", small, 0.5, metric="cosine")
    if options.train and model.name in TRAININGS and "trained" in wanted:
        limits = Constraints(
            max_bytes=round(TRAINED_BYTES[model.name] * model.spec.program().weights_bytes),
            min_speedup=TRAINED_SPEEDUP.get(model.name),
        )
        yield Task("trained", "metric", limits, 1.0, TRAININGS[model.name]())


def measure(model: models.BenchModel, task: Task, options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """One search of a model."""
    spec = model.spec
    assert spec.evaluate is not None
    program, batches = spec.program(), list(spec.calibration_batches() or ())
    began = time.perf_counter()

    def say(line: str, done: int, total: int) -> None:
        del done, total
        if line.endswith((": build", ": train")) or ";" not in line:
            print(f"    {time.perf_counter() - began:4.0f} s, {line}", flush=True)

    tuned = tune(
        program,
        spec.evaluate,
        batches,
        constraints=task.constraints,
        objective=task.objective,
        budget=Budget(options.minutes * task.share, 3 if options.quick else None, 1 if options.quick else 30),
        buckets=spec.buckets,
        metric=task.metric,
        presets=PRESETS[:1] if options.quick or task.training or task.name in ("cosine", "small") else PRESETS,
        journal=str(folder / f"{'-'.join(filter(None, (model.name, task.metric)))}.jsonl"),
        progress=say,
        training=task.training,
    )
    found = summary(tuned, task, spec.evaluate)
    if task.name == "small" and tuned.best is not None:  # chosen by the cosine, which tells more than the rows' answers
        drop = Judge(program, spec.evaluate, predictor(program))(predictor(as_loaded(tuned.build(tuned.best)))).reported
        found["best"] |= {"drop": str(drop), "points": drop.points}
    return found


def summary(tuned: Tuning, task: Task, evaluate: Any) -> dict[str, Any]:
    """The best preset and the best of all, how they compare, and how far estimates agree with measurements."""
    holding = [trial for trial in tuned.trials if trial.origin == "preset" and not trial.excess(tuned.constraints)]
    preset = min(holding, key=lambda trial: trial.value(task.objective), default=None)
    best = tuned.best
    compared = {} if task.training or task.name in ("cosine", "small") else {"preset": shown(preset)}
    better = preset.value(task.objective) / best.value(task.objective) if compared and preset and best else None
    found = {
        "float": tuned.float_metrics[tuned.metric],
        "float_bytes": tuned.float_bytes,
        **compared,
        "best": shown(best),
        "better": better,
        "limits": {key: value for key, value in dataclasses.asdict(tuned.constraints).items() if value is not None},
        "presets": [left(trial, tuned) for trial in tuned.trials if trial.origin == "preset" and not trial.failure],
        "correlations": tuned.correlations,
        "predicted": sorted(
            trial.estimates["latency"] / trial.latency
            for trial in tuned.trials
            if trial.estimates and not trial.failure
        ),
        "trials": len(tuned.trials),
        "chosen": sum(bool(trial.estimates) for trial in tuned.trials),
        "stopped": tuned.stopped,
        "seconds": tuned.seconds,
    }
    if better and better >= min(SMALLER, FASTER) and preset and best:  # is it as accurate as the preset?
        one, other = (as_loaded(tuned.build(each)) for each in (preset, best))
        apart = Judge(one, evaluate, predictor(one))(predictor(other)).reported
        found |= {"apart": str(apart), "apart_low": apart.low}
    return found


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
        "points": trial.reported.points,
        "bytes": trial.bytes,
        "latency": trial.latency,
        "recipe": trial.recipe,
        "training": trial.training,
        **({"cosine": trial.metrics["cosine"]} if "cosine" in trial.metrics else {}),
    }


def known_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the page has of a model."""
    file = harness.PAGES / "tuning.json"
    if not options.pages or options.quick or not file.is_file():
        return {}
    return json.loads(file.read_text()).get(name, {})


def main() -> int:
    """Measures, prints, writes; exit code 1 where nothing could be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    harness.add_names(parser, "--models", MODELS)
    harness.add_names(parser, "--objectives", ("bytes", "latency", "cosine", "small", "trained"))
    parser.add_argument("--minutes", type=float, default=10.0, help="for bytes and latency together; default: 10")
    parser.add_argument("--max-drop", type=float, help="points that may be lost; default: 0.5, of MiniLM 0.2")
    parser.add_argument("--train", action="store_true", help="also train candidates, in as many minutes again")
    parser.add_argument("--peers", action="store_true", help="measure other tools too")
    parser.add_argument(
        "--search", action=argparse.BooleanOptionalAction, default=True, help="search; else only --peers are measured"
    )
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
            run = harness.machine() | {"command": harness.command(), "load": f"{os.getloadavg()[0]:.1f}"}
            print(f"{name} ...", flush=True)
            found = known_of(name, options)
            try:
                model = models.load(name, quick=options.quick)
                found |= {"data": model.data, "objectives": found.get("objectives", {})}
                for task in tasks(model, options, found["objectives"]) if options.search else ():
                    result = measure(model, task, options, pathlib.Path(scratch) if options.quick else FOLDER)
                    found["objectives"][task.name] = result | {"run": run}
                    print("\n".join("    " + " | ".join(row) for row in cells(name, task.name, result)), flush=True)
                    keep(name, found, options, results)
                if options.peers:
                    import tuning_peers

                    found |= {"peers": tuning_peers.rows(model), "peers_run": run}
                    keep(name, found, options, results)
            except models.MissingError as error:
                print(f"{name}: skipped: {error}", flush=True)
            except lx.LeptonError as error:
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
    for name, found in results.items():
        rows = [row for objective, result in found["objectives"].items() for row in cells(name, objective, result)]
        print(harness.markdown(HEADER, rows))
        for objective, result in found["objectives"].items():
            print(f"{name}, {objective}: rank correlations {result['correlations']}, {result['seconds']:.0f} s")
    print(harness.markdown(["aim", "found", "note"], aims(results)))
    harness.write_json(options.json, results)
    print(f"repeat with: {harness.command()}")
    return int(not results)


def keep(name: str, found: dict[str, Any], options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Keep what was measured of a model, and write the page."""
    results[name] = found
    if options.pages and not options.quick:
        harness.publish("tuning", {name: found}, page)


if __name__ == "__main__":
    raise SystemExit(main())
