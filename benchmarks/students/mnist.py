"""Hinton's experiment (arXiv:1503.02531, section 3) on fewer images.

The students have two layers of 800 units, no dropout and no weight decay. Once, as in the paper, they see the images as
they are, and the teacher has two layers of 1,200 units, dropout and moved images. Once all see moved images; then that
teacher is no better than a student that learns alone, so a LeNet-5 takes its place.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import harness
import jax
import numpy as np
from models.mnist import LeNet5

from lepton_xla import train
from students import digits
from students.base import Batches, batches, learn

# Epochs, rates and temperature were chosen on 1,000 of the 5,000 images with models of the other 4,000.
EPOCHS, RATE, TEMPERATURE = 25, 1e-3, 2.0
WAYS = ("labels alone", "distilled")


class Wide(nn.Module):
    """784 -> width -> width -> 10, with dropout where it is asked for."""

    width: int
    dropout: bool = False

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = image.reshape(image.shape[0], -1)
        for share in (0.2, 0.5):
            x = nn.Dropout(share, deterministic=not train)(x) if self.dropout else x
            x = nn.relu(nn.Dense(self.width)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x) if self.dropout else x
        return nn.Dense(10)(x)


def _still(arrays: Mapping[str, np.ndarray], seed: int) -> Batches:
    return batches(arrays, digits.BATCH, seed)


# Images of the students: teacher, its epochs and rate; the students' batches, and whether labels help to distil.
type Experiment = tuple[nn.Module, int, float, Callable[..., Batches], bool, int]
EXPERIMENTS: dict[str, Experiment] = {
    "as they are": (Wide(1200, dropout=True), 40, 1e-3, _still, False, 5),
    "moved": (LeNet5(), 20, 2e-3, digits.moved, True, 3),
}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Accuracy of the teacher and of the students; more and more seeds."""
    learned, judged = digits.part(options.quick)
    found: dict[str, Any] = {
        "epochs": EPOCHS,
        "temperature": TEMPERATURE,
        "images": [len(learned["label"]), len(judged["label"])],
        "experiments": {},
    }

    def row(images: str, seed: int) -> dict[str, float]:
        module, epochs, rate, seen, labels, _ = EXPERIMENTS[images]
        model = digits.model(module, seed)
        more: dict[str, Any] = {"folder": None, "seed": seed}
        steps = digits.steps(learned, 1 if options.quick else epochs)
        teacher = learn(
            model, train.supervised(model), digits.moved(learned, seed), steps=steps, rate=rate, decay=1e-3, **more
        ).program
        accuracies = {"teacher": digits.accuracy(teacher, judged)}
        student = digits.model(Wide(800), seed)
        logits = [train.Logits(TEMPERATURE), *([train.Labels(weight=0.5)] if labels else [])]
        losses = {"labels alone": train.supervised(student), "distilled": train.distill(student, teacher, logits)}
        steps = digits.steps(learned, 1 if options.quick else EPOCHS)
        for way in WAYS:
            program = learn(
                student, losses[way], seen(learned, seed), steps=steps, rate=RATE, decay=0.0, **more
            ).program
            accuracies[way] = digits.accuracy(program, judged)
        return accuracies

    for images, (*_, seeds) in EXPERIMENTS.items():
        for seed in range(1 if options.quick else seeds):
            name = f"mnist: images {images}, seed {seed}"
            accuracies = options.rows.row(name, lambda images=images, seed=seed: row(images, seed))
            print(f"  {name}: " + ", ".join(f"{each} {harness.percent(value)}" for each, value in accuracies.items()))
            for each, value in accuracies.items():
                found["experiments"].setdefault(images, {}).setdefault(each, []).append(value)
            yield found
