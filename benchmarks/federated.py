"""What a federated training loses against a central one, and what updates of each format cost: minutes on a CPU.

    python benchmarks/federated.py [--sections digits,real,secure] [--quick] [--no-pages] [--json FILE]

All but `real` and `secure` in the simulation, one seed. The settings were chosen on float32 updates, before other
formats were run: the rate of BANKING77 is the best of 4, 8, 16 and 32 in 10 rounds of central training, judged on 1,000
of the training questions.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import harness
import jax.numpy as jnp
import numpy as np
import optax
import real_clients
import sections
from models.base import data_folder
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import lepton_xla as lx
from lepton_xla.federated import FederatedSpec, Federation, Privacy, partition, simulate
from lepton_xla.federated.settings import FORMATS

CLIENTS = (10, 50)
CONCENTRATION = 0.3
WIDTH = 512


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows to train on and to test on, a model, and settings."""

    spec: FederatedSpec
    rows: dict[str, np.ndarray]
    settings: Federation


def task(rows: dict[str, np.ndarray], held_out: dict[str, np.ndarray], weights: Any, fn: Any, rate: float) -> Task:
    """A task with settings that both data sets share but for the rate."""

    def evaluate(predict: Any) -> dict[str, float]:
        return {"accuracy": float((predict(x=held_out["x"])["output"].argmax(-1) == held_out["label"]).mean())}

    program = lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", rows["x"].shape[1]), "float32")})
    return Task(FederatedSpec(program, rows, optax.sgd(rate), evaluate=evaluate), rows, Federation())


@functools.cache
def digits() -> Task:
    """scikit-learn's digits: 1,347 rows to train on, 450 to test; 64-64-10 units."""
    x, label = load_digits(return_X_y=True)
    x, label = (x / 16).astype(np.float32), label.astype(np.int32)
    parts = train_test_split(x, label, test_size=0.25, random_state=0, stratify=label)
    random = np.random.default_rng(0)
    made = lambda rows, columns: jnp.asarray(random.normal(size=(rows, columns)) / rows**0.5, jnp.float32)  # noqa: E731
    weights = {"one": made(64, 64), "bias": jnp.zeros(64), "two": made(64, 10), "bias2": jnp.zeros(10)}

    def fn(w: Any, x: Any) -> Any:
        return jnp.maximum(x @ w["one"] + w["bias"][None], 0) @ w["two"] + w["bias2"][None]

    found = task({"x": parts[0], "label": parts[2]}, {"x": parts[1], "label": parts[3]}, weights, fn, 0.2)
    return dataclasses.replace(found, settings=Federation(rounds=40, epochs=2, batch_rows=16))


@functools.cache
def banking77() -> Task:
    """BANKING77: 10,003 questions to train on, 3,080 to test; a linear layer on fixed vectors of their n-grams."""
    hashed = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), n_features=1 << 15)
    # No client's words are needed for it: the projection is random, and the same for all.
    projection = np.random.default_rng(0).normal(size=(1 << 15, WIDTH)).astype(np.float32) / WIDTH**0.5
    tables = {}
    intents: list[str] = []
    for part in ("train", "test"):
        with (data_folder("banking77") / f"{part}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        intents = intents or sorted({row["category"] for row in rows})
        vectors = np.asarray(hashed.transform([row["text"] for row in rows]) @ projection, np.float32)
        label = np.array([intents.index(row["category"]) for row in rows], np.int32)
        tables[part] = {"x": vectors, "label": label}
    weights = {"kernel": jnp.zeros((WIDTH, len(intents))), "bias": jnp.zeros(len(intents))}
    found = task(tables["train"], tables["test"], weights, lambda w, x: x @ w["kernel"] + w["bias"][None], 16.0)
    return dataclasses.replace(found, settings=Federation(rounds=20, batch_rows=32))


def accuracies(result: Any) -> list[float]:
    """Test accuracy after each round."""
    return [done.evaluation["accuracy"] for done in result.rounds]


def measure(given: Task, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Central training, then every format on every partition."""
    settings = given.settings.replace(rounds=2) if options.quick else given.settings
    central = simulate(given.spec, [given.rows], settings)
    found: dict[str, Any] = {
        "rounds": settings.rounds, "central": accuracies(central)[-1],
        "weights": central.rounds[0].bytes_up // 4, "rows": [],
    }  # fmt: skip
    for count in CLIENTS:
        for label in (None, "label"):
            parts = partition(given.rows, count, label=label, concentration=CONCENTRATION)
            for name in FORMATS:
                start = time.perf_counter()
                result = simulate(given.spec, parts, settings.replace(updates=name))
                curve = accuracies(result)
                near = [index + 1 for index, value in enumerate(curve) if value >= found["central"] - 0.01]
                found["rows"].append(
                    {
                        "clients": count, "by_label": label is not None, "updates": name, "accuracy": curve[-1],
                        "near": near[0] if near else None, "bytes": result.rounds[-1].bytes_up,
                        "seconds": time.perf_counter() - start,
                    }
                )  # fmt: skip
                yield found


def table(found: Mapping[str, Any]) -> list[str]:
    """A row for each format on each partition."""
    lines = []
    base: dict[str, Any] = {}
    for row in found["rows"]:
        base = row if row["updates"] == "float32" else base
        lines.append(
            (
                f"{row['clients']}, {'by label' if row['by_label'] else 'alike'}",
                row["updates"],
                harness.percent(row["accuracy"]),
                f"{100 * (row['accuracy'] - base['accuracy']):+.2f}",
                row["near"] or "never",
                f"{row['bytes']:,}",
                f"{base['bytes'] / row['bytes']:.2f}",
            )
        )
    header = (
        "clients",
        "updates",
        "accuracy",
        "against float32",
        "rounds to 1 point of central",
        "bytes a round",
        "times fewer",
    )
    exact = {(row["clients"], row["by_label"]): row["accuracy"] for row in found["rows"] if row["updates"] == "float32"}
    lost: dict[str, list[float]] = {name: [] for name in FORMATS[1:]}
    for row in found["rows"]:
        if row["updates"] != "float32":
            lost[row["updates"]].append(100 * (exact[row["clients"], row["by_label"]] - row["accuracy"]))
    said = "; ".join(f"{name} {max(values):.2f}" for name, values in lost.items() if values)
    central = (
        f"Central training, the same batches and as many passes over the rows: {harness.percent(found['central'])}."
    )
    return [central, harness.markdown(header, lines), f"Most points lost against float32 updates: {said}."]  # fmt: skip


def privacy(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Accuracy with epsilon 8, and what an attacker learns of who was trained on."""
    found: dict[str, Any] = {"accuracy": [], "attack": []}
    rounds = 2 if options.quick else 20
    for name, given, rate in (("digits", digits(), 0.5), ("BANKING77", banking77(), 8.0)):
        parts = partition(given.rows, 10)
        settings = Federation(rounds=rounds, privacy=Privacy(epsilon=8.0, share=0.1), epochs=2)
        spec = given.spec.replace(optimizer=optax.sgd(rate))
        plain = simulate(given.spec, parts, given.settings.replace(rounds=rounds))
        result = simulate(spec, parts, settings)
        found["accuracy"].append(
            {
                "data": name, "plain": accuracies(plain)[-1], "private": accuracies(result)[-1],
                "epsilon": result.epsilon, "noise": result.noise,
            }
        )  # fmt: skip
        yield found
    given = digits()
    members = {name: column[:200] for name, column in given.rows.items()}
    others = {name: column[200:600] for name, column in given.rows.items()}
    for name, settings in (
        ("plain", Federation(rounds=rounds * 3, epochs=5, batch_rows=16)),
        ("epsilon 8", Federation(rounds=rounds, epochs=2, privacy=Privacy(epsilon=8.0, share=0.1))),
    ):
        result = simulate(given.spec.replace(optimizer=optax.sgd(0.5)), partition(members, 4), settings)
        losses = [loss_of(result.program, rows) for rows in (members, others)]
        truth = np.concatenate([np.ones(len(losses[0])), np.zeros(len(losses[1]))])
        area = float(roc_auc_score(truth, -np.concatenate(losses)))
        found["attack"].append({"training": name, "area": area, "accuracy": accuracies(result)[-1]})
        yield found


def loss_of(program: lx.Program, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """The cross-entropy of each row."""
    logits = program(program.weights, jnp.asarray(rows["x"]))
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(rows["label"])))


def privacy_tables(found: Mapping[str, Any]) -> list[str]:
    """Accuracy, then the attack."""
    rows = [
        (
            row["data"], *(harness.percent(row[name]) for name in ("plain", "private")),
            *(f"{row[name]:.2f}" for name in ("epsilon", "noise")),
        )
        for row in found["accuracy"]
    ]  # fmt: skip
    parts = [harness.markdown(("data", "plain", "private", "epsilon", "noise"), rows)]
    if found["attack"]:
        rows = [(row["training"], f"{row['area']:.3f}", harness.percent(row["accuracy"])) for row in found["attack"]]
        parts += [ABOUT["attack"], harness.markdown(("training", "area", "accuracy"), rows)]
    return parts


ABOUT = {
    "digits": """## Digits

64-64-10 units, 4,810 weights, on 1,347 of scikit-learn's digits; accuracy on 450 others. Each round is two epochs of
SGD, batches of 16, 40 rounds.""",
    "banking77": """## BANKING77

A linear layer, 39,501 weights, on fixed vectors of 10,003 questions (hashed character n-grams, a random projection to
512 numbers); accuracy on 3,080 others. Each round is one epoch of SGD, batches of 32, 20 rounds. The rate is the best
of four on 1,000 of the training questions, in central training.""",
    "privacy": """## Differential privacy

10 clients alike, 20 rounds of two epochs. With privacy each step takes a tenth of the rows by chance, gradients of rows
are clipped to 1, and delta is 1e-5. `noise` is the standard deviation in clipping norms.""",
    "attack": """An attacker guesses from the loss of a row whether it was trained on (Yeom et al. 2018,
arXiv:1709.01604): 200 digits that 4 clients were trained on, 60 rounds of five epochs without privacy, 20 of two with
it; 400 others. An area of 0.5 under the ROC curve is guessing.""",
}

SECTIONS = {
    "digits": sections.Section(lambda options: measure(digits(), options), table, ABOUT["digits"]),
    "banking77": sections.Section(lambda options: measure(banking77(), options), table, ABOUT["banking77"]),
    "privacy": sections.Section(privacy, privacy_tables, ABOUT["privacy"]),
    "real": sections.Section(real_clients.measure, real_clients.tables, real_clients.ABOUT),
    "secure": sections.Section(real_clients.measure_secure, real_clients.tables_secure, real_clients.ABOUT_SECURE),
}

HEAD = (
    "# Federated training",
    """What clients that keep their rows lose against one that has them all, and what they send. `alike` deals rows out
evenly; `by label` draws the shares of each class from a Dirichlet distribution with concentration 0.3. All clients take
part in each round, and the server averages by rows (FedAvg). int8, int4 and int3 share a scale among 256 numbers; int3
has nine codes, five of them in two bytes; top-k sends the 5 % largest changes in int8 with their places; all four send
later what they left out. Bytes are those of all updates of a round. One seed.""",
    "Aim: at most 0.5 points lost against float32 updates on the same partition with 8 times fewer bytes.",
)


def main() -> None:
    """Measure the sections, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections.add_options(parser, SECTIONS)
    harness.add_pages(parser)
    parser.add_argument("--quick", action="store_true", help="two rounds, to see that it runs")
    options = parser.parse_args()

    def write(results: Mapping[str, Any]) -> None:
        if options.pages and not options.quick:
            harness.publish("federated", results, lambda known: sections.page(HEAD, SECTIONS, known))

    def machine(name: str) -> dict[str, str]:
        return harness.machine(("scikit-learn", "dp-accounting"))

    sections.run(SECTIONS, options, machine, write, Console())


if __name__ == "__main__":
    main()
