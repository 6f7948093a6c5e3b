"""Whether Optuna's search of training settings is better than random ones: 30 trained candidates of digits each.

    python benchmarks/searches.py [--network dense] [--trials 30] [--random 5] [--quick] [--json FILE]

Each search trains candidates for the fewest bytes within the bound on the drop; it may be killed, and goes on with what
is in build/benchmarks/searches/ (`--fresh` begins again). Prints the bytes of the best of each, and whether Optuna's is
at least as good as the median of the random ones, and writes both to docs/benchmarks/tuning.md. Neither depends on how
busy the machine is. Most of the time goes into compiling, of which convolutions take ten times as much as products: the
network is a dense one by default; `--network cnn` is that of examples/digits.py.
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
import jax
import jax.numpy as jnp
import models
from models.base import judge, train
from tuning_page import page

import lepton_xla as lx
from lepton_xla.tuning import Budget, Constraints, measuring, studies, tune

FOLDER = harness.ROOT / "build" / "benchmarks" / "searches"
STEPS = 100


def dense(quick: bool) -> lx.ModelSpec:
    """A network of 64-128-64-10, trained."""
    images, labels, test_images, test_labels = importlib.import_module("digits").data()
    shapes = [(64, 128), (128, 64), (64, 10)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    start = {
        f"layer{index}": {"kernel": jax.nn.initializers.lecun_normal()(key, shape), "bias": jnp.zeros(shape[1])}
        for index, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    }

    def apply(weights: Any, image: jax.Array) -> jax.Array:
        x = image.reshape(image.shape[0], -1)
        for index, layer in enumerate(weights.values()):
            x = (jax.nn.relu(x) if index else x) @ layer["kernel"] + layer["bias"]
        return x

    return lx.ModelSpec(
        fn=apply,
        weights=train(apply, start, images, labels, epochs=1 if quick else 30),
        inputs={"image": lx.TensorSpec(("batch", 8, 8, 1), "float32")},
        calibration=[{"image": images[:256]}],
        evaluate=judge(test_images, test_labels),
    )


def search(spec: lx.ModelSpec, sampler: studies.Sampler, seed: int, trials: int, folder: pathlib.Path) -> int:
    """The bytes of the best of one search."""
    train_digits = importlib.import_module("train_digits")
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
    parser.add_argument("--network", choices=("dense", "cnn"), default="dense", help="what is trained; default: dense")
    parser.add_argument("--fresh", action="store_true", help="begin again")
    parser.add_argument("--quick", action="store_true", help="two trials of one random search: a smoke test")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    trials, count = (2, 1) if options.quick else (options.trials, options.random)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (pathlib.Path(scratch) if options.quick else FOLDER) / options.network
        folder.mkdir(parents=True, exist_ok=True)
        sys.path.insert(0, str(harness.ROOT / "examples"))
        spec = models.load("digits").spec if options.network == "cnn" else dense(options.quick)
        own = search(spec, "tpe", 0, trials, folder)
        random = [search(spec, "random", seed, trials, folder) for seed in range(count)]
    median = statistics.median(random)
    result: dict[str, Any] = {"optuna": own, "random": random, "median": median, "trials": trials}
    result |= {"network": options.network, "steps": STEPS}
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
