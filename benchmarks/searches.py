"""Whether Optuna's search of training settings is better than random ones: 30 trained candidates of digits each.

    python benchmarks/searches.py [--trials 30] [--random 5] [--quick] [--json FILE]

Each search trains candidates for the fewest bytes within the bound on the drop; it may be killed, and goes on with what
is in build/benchmarks/searches/ (`--fresh` begins again). Prints the bytes of the best of each, and whether Optuna's is
at least as good as the median of the random ones, and writes both to docs/benchmarks/tuning.md. Neither depends on how
busy the machine is. A trial takes 10 to 15 seconds of one core, most of which XLA compiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
from typing import Any

import harness
import models
from tuning_page import page

from lepton_xla.tuning import Budget, Constraints, measuring, studies, tune

FOLDER = harness.ROOT / "build" / "benchmarks" / "searches"
STEPS = 100


def search(model: models.BenchModel, sampler: studies.Sampler, seed: int, trials: int, folder: pathlib.Path) -> int:
    """The bytes of the best of one search."""
    sys.path.insert(0, str(harness.ROOT / "examples"))
    train_digits = importlib.import_module("train_digits")

    spec = model.spec
    assert spec.evaluate is not None
    # The search itself takes the sampler of its study from nowhere else.
    measuring.Study = functools.partial(studies.Study, sampler=sampler)
    found = tune(
        spec.program(),
        spec.evaluate,
        list(spec.calibration_batches() or ()),
        constraints=Constraints(max_drop=0.5),
        objective="bytes",
        budget=Budget(minutes=120, trials=1, trainings=trials),
        presets=("int8",),
        buckets={"batch": (32,)},
        seed=seed,
        journal=str(folder / f"{sampler}-{seed}.jsonl"),
        training=dataclasses.replace(train_digits.training(), steps=STEPS),
    )
    assert found.best is not None
    stopped = sum(trial.origin == "stopped" for trial in found.trials)
    print(f"  {sampler}, seed {seed}: {found.best.bytes:,} bytes, {stopped} of {trials} stopped half way", flush=True)
    return found.best.bytes


def main() -> int:
    """Searches, prints; exit code 1 if random settings are better."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=30, help="of each search; default: 30")
    parser.add_argument("--random", type=int, default=5, help="random searches; default: 5")
    parser.add_argument("--fresh", action="store_true", help="begin again")
    parser.add_argument("--quick", action="store_true", help="two trials of one random search: a smoke test")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    trials, count = (2, 1) if options.quick else (options.trials, options.random)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) if options.quick else FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        model = models.load("digits")
        own = search(model, "tpe", 0, trials, folder)
        random = [search(model, "random", seed, trials, folder) for seed in range(count)]
    median = statistics.median(random)
    result: dict[str, Any] = {"optuna": own, "random": random, "median": median, "trials": trials, "steps": STEPS}
    print(
        f"Optuna {own:,} bytes, the median of {count} random searches {median:,.0f}: {median / own:.2f} times smaller"
    )
    run = harness.machine() | {"command": harness.command(), "load": f"{os.getloadavg()[0]:.1f}"}
    if options.pages and not options.quick:
        harness.publish("tuning", {"searches": result | {"run": run}}, page)
    harness.write_json(options.json, result)
    print(f"repeat with: {harness.command()}")
    return int(own > median and not options.quick)


if __name__ == "__main__":
    raise SystemExit(main())
