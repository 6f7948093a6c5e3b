"""Makes docs/benchmarks/distillation.md from the results of `distillation.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import harness
from students import digits
from students.base import binomial, closed, noise

TARGET_CLOSED = 0.4
HEAD = [
    "# Distillation",
    (
        "`benchmarks/distillation.py` writes this page from `distillation.json`. Students of one table start from the "
        "same weights where nothing else is said, and see the same batches in the same order, seed by seed. `±` after "
        "a mean is the standard error over seeds. The test set is a draw too: its own standard error is given below "
        "each table, and is the larger one in most rows. Rows that lose are kept."
    ),
]
INTRODUCTIONS = {
    "mnist": (
        "## MNIST: students of 800 units\n\n"
        f"{digits.NOTE}. The students have two layers of 800 units, no dropout and no decay. First, as Hinton et al. "
        "(arXiv:1503.02531, section 3) have it, they see the images as they are, and the teacher has two layers of "
        "1,200 units, dropout, and images moved by up to two pixels. Then all see moved images: that teacher would be "
        "no better than a student that learns alone, so it is a LeNet-5, and half of a labels' loss is added. Each "
        "seed has a teacher of its own. Epochs, rates and temperature were chosen on 1,000 of the 5,000 images."
    ),
    "sentences": (
        "## MiniLM with three of six layers on BANKING77\n\n"
        "The teacher is all-MiniLM-L6-v2 with a linear layer on top, fine-tuned once. Each student starts from its "
        "second, fourth and sixth layer and its head, also the one that learns from labels alone, and is trained with "
        "`lx.train.fit`. Logits: `lx.train.Logits(2.0)`, the teacher's answers to all training questions stored once "
        "by `lx.train.teach`. Features: the cosine distance between the outputs of each layer and of the teacher's, "
        "which runs in each step."
    ),
}


def mean(accuracies: Sequence[float]) -> str:
    """Percent, with the standard error over seeds."""
    error = noise(accuracies)
    return harness.percent(statistics.fmean(accuracies)) + ("" if error is None else f" ± {100 * error:.2f}")


def each(accuracies: Sequence[float]) -> str:
    """Percent of each seed."""
    return ", ".join(map(harness.percent, accuracies))


def share(value: float) -> str:
    """A share of a gap as a percentage; nothing where there is no gap."""
    return "no gap" if math.isnan(value) else f"{100 * value:.0f} %"


def mnist_tables(found: dict[str, Any]) -> list[str]:
    """Teachers and students, by what images they see."""
    parts: list[str] = []
    _, tested = found["images"]
    for images, rows in found["experiments"].items():
        teacher, alone = (statistics.fmean(rows[name]) for name in ("teacher", "labels alone"))
        gap = share(closed(statistics.fmean(rows["distilled"]), alone, teacher))
        cells = [
            [name, each(accuracies), mean(accuracies), gap if name == "distilled" else ""]
            for name, accuracies in rows.items()
        ]
        parts.append(harness.markdown([f"images {images}", "accuracy %, each seed", "mean", "gap closed"], cells))
        text = f"The test set's standard error is {100 * binomial(alone, tested):.2f} points."
        if images == "as they are":
            text += f" Target: at least {100 * TARGET_CLOSED:.0f} % of the gap."
        parts.append(text)
    return parts


def sentence_tables(found: dict[str, Any]) -> list[str]:
    """Teachers and students."""
    students = {name: accuracies for name, accuracies in found["students"].items() if accuracies}
    alone = statistics.fmean(students["labels alone"])
    rows = [
        ["teacher, 6 layers", harness.percent(found["teacher"]), "", ""],
        ["teacher in int8", harness.percent(found["quantized"]), "", ""],
    ]
    for name, accuracies in students.items():
        gap = "" if name == "labels alone" else share(closed(statistics.fmean(accuracies), alone, found["teacher"]))
        rows.append([f"3 layers: {name}", each(accuracies), mean(accuracies), gap])
    trained, tested = found["questions"]
    (first, second), (large, small) = found["epochs"], found["batches"]
    settings = found["settings"]
    return [
        harness.markdown(["", "accuracy %, each seed", "mean", "gap closed"], rows),
        (
            f"{trained:,} training and {tested:,} test questions, 77 intents; the test set's standard error is "
            f"{100 * binomial(found['teacher'], tested):.2f} points. AdamW, largest rate {settings['rate']:g}; teacher "
            f"{first} epochs in batches of {large}, students {second} in batches of {small}: few, because all of this "
            f"runs on two cores. Questions are cut to {settings['length']} tokens while training, and judged whole."
        ),
    ]
