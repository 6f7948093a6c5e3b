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
TARGET_SMALLER, TARGET_FASTER, TARGET_LOST = 5.0, 2.5, 0.005
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
        f"{digits.NOTE}. The students have two layers of 800 units, no dropout and no decay. As Hinton et al. "
        "(arXiv:1503.02531, section 3) have it, they see the images as they are, and the teacher has two layers of "
        "1,200 units, dropout, and images moved by up to two pixels. The student learns from logits alone. Each seed "
        "has a teacher of its own. Epochs, rates and temperature were chosen on 1,000 of the 5,000 images."
    ),
    "four-bits": (
        "## LeNet-5 with 4-bit weights and activations\n\n"
        f"{digits.NOTE}. Each convolution and dense layer has 4-bit weights with a scale per output channel, and 4-bit "
        "activations with a scale per row. `Rounded` is the float model without further training. The others were "
        "trained on by `lx.train.fit` with `Compression(..., quantize_from=0)`, and are judged as they would be "
        "served, with their weights as codes. Distilled: half of the loss is the divergence from the float model's "
        "answers."
    ),
    "shrunk": (
        "## A residual CNN with 30 % of its operations\n\n"
        f"{digits.NOTE}. The network of `benchmarks/models/residual.py` loses channels before the first step "
        "(`Compression(shrink_at=0, shrink={'flops': 0.3, 'round_to': 8})`), batch norms included, and is trained on. "
        "Distilled: half of the loss is the divergence from the whole network's answers. One whole network, not "
        "trained on; seeds are those of the batches."
    ),
    "sentences": (
        "## MiniLM with three of six layers on BANKING77\n\n"
        "The teacher is all-MiniLM-L6-v2 with a linear layer on top, fine-tuned once. All students start from the "
        "second, fourth and sixth layer of the encoder as it was before, and are trained with `lx.train.fit`. Logits: "
        "`lx.train.Logits(2.0)`, the teacher's answers to all training questions stored once by `lx.train.teach`. "
        "Features: the cosine distance between the outputs of each layer and of the teacher's, "
        "which runs in each step."
    ),
    "smaller": (
        "## MiniLM in a fifth of its bytes, by one command\n\n"
        "    leptonx train benchmarks/small_minilm.py:small --recipe int8 -o small.lepton\n"
        "    leptonx eval benchmarks/small_minilm.py:whole small.lepton\n"
        "    leptonx bench small.lepton --target benchmarks/small_minilm.py:whole\n\n"
        "The first trains a student of three layers, which starts from the teacher's own and learns from its stored "
        "answers (the teacher is the fine-tuned MiniLM of the section above), rounds weights and activations to int8 "
        "in the second half of its steps, and compiles it. The others say what is left of accuracy, bytes and time, in "
        "turns with the float model of six layers under `jax.jit`. "
        "`examples/distill_minilm.py:small` does the same without this benchmark's settings."
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
        if images == "moved":
            parts.append(
                "Where students see moved images too, such a teacher is no better than a student that learns alone. So "
                "here it is a LeNet-5, and half of the labels' loss is added to that of the logits."
            )
        parts.append(harness.markdown([f"images {images}", "accuracy %, each seed", "mean", "gap closed"], cells))
        text = f"The test set's standard error is {100 * binomial(alone, tested):.2f} points."
        if images == "as they are":
            done = closed(statistics.fmean(rows["distilled"]), alone, teacher)
            met = "met" if done >= TARGET_CLOSED else "missed"
            text += f" Target: at least {100 * TARGET_CLOSED:.0f} % of the gap: {met}."
        parts.append(text)
    return parts


def four_bits_tables(found: dict[str, Any]) -> list[str]:
    """Float, rounded, trained on."""
    rows = found["rows"]
    whole, rounded = (statistics.fmean(rows[name]) for name in ("float", "rounded"))
    cells = []
    for name, accuracies in rows.items():
        value = statistics.fmean(accuracies)
        regained = share((value - rounded) / (whole - rounded)) if whole > rounded and "trained" in name else ""
        cells.append([name, each(accuracies), mean(accuracies), f"{100 * (value - whole):+.2f}", regained])
    first, second = found["epochs"]
    return [
        harness.markdown(["", "accuracy %, each seed", "mean", "points from float", "regained"], cells),
        (
            f"Float {first} epochs, then {second} with rounding. The test set's standard error is "
            f"{100 * binomial(whole, found['tested']):.2f} points."
        ),
    ]


def shrunk_tables(found: dict[str, Any]) -> list[str]:
    """The whole network and the shrunk ones."""
    whole = found["whole"]
    cells: list[list[str]] = [["whole", harness.percent(whole), "", "", "1.00", "1.00"]]
    for way, rows in found["rows"].items():
        if rows:
            accuracies = [row["accuracy"] for row in rows]
            lost = f"{100 * (statistics.fmean(accuracies) - whole):+.2f}"
            sizes = [f"{statistics.fmean(row[name] for row in rows):.2f}" for name in ("flops", "bytes")]
            cells.append([f"shrunk, {way}", each(accuracies), mean(accuracies), lost, *sizes])
    first, second = found["epochs"]
    distilled = [row["accuracy"] for row in found["rows"]["distilled"]]
    short = whole - statistics.fmean(distilled)
    met = "met" if short <= 0 else f"missed by {100 * short:.2f} points"
    return [
        harness.markdown(["", "accuracy %, each seed", "mean", "points from whole", "operations", "bytes"], cells),
        (
            f"Whole {first} epochs, shrunk {second} more. The test set's standard error is "
            f"{100 * binomial(whole, found['tested']):.2f} points. Target: no loss when distilled, mean of "
            f"the seeds: {met}."
        ),
    ]


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
    parts = [
        harness.markdown(["", "accuracy %, each seed", "mean", "gap closed"], rows),
        (
            f"{trained:,} training and {tested:,} test questions, 77 intents; the test set's standard error is "
            f"{100 * binomial(found['teacher'], tested):.2f} points. AdamW, largest rate {settings['rate']:g}; teacher "
            f"{first} epochs in batches of {large}, students {second} in batches of {small}: few, because all of this "
            f"runs on two cores. Questions are cut to {settings['length']} tokens while training, and judged whole."
        ),
    ]
    logits = students.get("logits alone")
    if logits and statistics.fmean(logits) < alone:
        parts.append(
            "Logits alone lose to labels here: so few steps are not enough to follow the teacher from an encoder that "
            "never saw the intents. The next section starts from the teacher's layers and takes twice the steps."
        )
    if len(students["labels alone"]) < settings["seeds"] or len(students) < 4:
        parts.append("Not all seeds and students are measured yet; the same command goes on with the others.")
    return parts


def smaller_tables(found: dict[str, Any]) -> list[str]:
    """What `leptonx eval` and `leptonx bench` say."""
    accuracies = found["eval"]["float"]["accuracy"], found["eval"]["artifact"]["accuracy"]
    bench = found["bench"]
    sizes = bench["weights_bytes_float"], bench["weights_bytes_on_disk"]
    rows = [
        ["accuracy %", *map(harness.percent, accuracies), f"{100 * (accuracies[1] - accuracies[0]):+.2f} points"],
        ["bytes of weights", *(f"{size:,}" for size in sizes), f"{sizes[0] / sizes[1]:.2f} times smaller"],
    ]
    for entry in bench["buckets"]:
        times = [f"{1e3 * entry[side]['median_s']:.2f}" for side in ("float", "artifact")]
        rows.append([f"ms, {entry['bucket']}", *times, f"{entry['speedup']:.2f} times faster"])
    met = [
        -(accuracies[1] - accuracies[0]) <= TARGET_LOST,
        sizes[0] / sizes[1] >= TARGET_SMALLER,
        all(entry["speedup"] >= TARGET_FASTER for entry in bench["buckets"]),
    ]
    words = ["met" if each else "missed" for each in met]
    return [
        harness.markdown(["", "float, 6 layers", "small, 3 layers", ""], rows),
        (
            f"{found['train']['steps']} steps. Targets: at most {100 * TARGET_LOST:.1f} points lost ({words[0]}; the "
            f"test set's standard error is {100 * binomial(accuracies[0], found['tested']):.2f}), {TARGET_SMALLER:g} "
            f"times smaller ({words[1]}), {TARGET_FASTER:g} times faster in each bucket ({words[2]})."
        ),
    ]
