"""LeNet-5 with 4-bit weights and activations, trained with rounding from labels alone, or from its float model too."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import harness
from models.mnist import LeNet5

import lepton_xla as lx
from lepton_xla import train
from lepton_xla.passes.planning import resolve
from students import digits
from students.base import learn

SEEDS, FLOAT_EPOCHS, EPOCHS = 3, 12, 4
RATE, TEMPERATURE = 1e-3, 2.0
RECIPE = lx.Recipe.parse(
    'on_unsupported = "keep"\nfold = false\n[[quantize]]\nsites = ".*"\nweights = "int4"\nactivations = "int4"',
    name="int4 x int4",
)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Accuracy in float, rounded, and trained with rounding in two ways; more and more seeds."""
    learned, judged = digits.part(options.quick)
    float_epochs, epochs = (1, 1) if options.quick else (FLOAT_EPOCHS, EPOCHS)
    found: dict[str, Any] = {"epochs": [float_epochs, epochs], "tested": len(judged["label"]), "rows": {}}

    def row(seed: int) -> dict[str, float]:
        seen, more = digits.moved(learned, seed), {"decay": 1e-3, "folder": None, "seed": seed}
        model, steps = digits.model(LeNet5(), seed), digits.steps(learned, float_epochs)
        whole = learn(model, train.supervised(model), seen, steps=steps, rate=2 * RATE, **more).program
        rounded = lx.passes.quantize(whole, resolve(RECIPE, whole))
        student = digits.trained(model, whole)
        losses = {
            "trained with rounding, labels alone": train.supervised(student),
            "trained with rounding, distilled": train.distill(
                student, whole, [train.Logits(TEMPERATURE, weight=0.5), train.Labels(weight=0.5)]
            ),
        }
        compression = train.Compression(RECIPE, quantize_from=0)
        accuracies = {"float": digits.accuracy(whole, judged), "rounded": digits.accuracy(rounded, judged)}
        for name, loss in losses.items():
            steps = digits.steps(learned, epochs)
            result = learn(student, loss, seen, steps=steps, rate=RATE, compression=compression, **more)
            accuracies[name] = digits.accuracy(result.quantized(), judged)
        return accuracies

    for seed in range(1 if options.quick else SEEDS):
        name = f"four bits: seed {seed}"
        accuracies = options.rows.row(name, lambda seed=seed: row(seed))
        print(f"  {name}: " + ", ".join(f"{each} {harness.percent(value)}" for each, value in accuracies.items()))
        for each, value in accuracies.items():
            found["rows"].setdefault(each, []).append(value)
        yield found
