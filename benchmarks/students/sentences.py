"""MiniLM with three of its six layers on BANKING77, and four ways to teach it.

The teacher is all-MiniLM-L6-v2 with a linear layer on top, fine-tuned; each student starts from every second layer of
it, head included. Words that no question has are left out of the table of embeddings: they would never be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from models import minilm

import lepton_xla as lx
from lepton_xla import train
from students import base

sys.path.insert(0, str(harness.ROOT / "examples"))
import distill_minilm

# Learning rate and weight decay are those of examples/distill_minilm.py. Longer questions are cut while training; all
# of them is judged.
SETTINGS = {"length": 24, "batch": 64, "rate": 4e-4, "decay": 0.01, "temperature": 2.0, "seeds": 3}
TEACHER_EPOCHS, EPOCHS = 4, 2
KEPT = [1, 3, 5]
VARIANTS = ("labels alone", "logits alone", "logits of the teacher in int8", "logits and features")


@dataclasses.dataclass(frozen=True)
class Task:
    """The questions, and the teacher.

    Attributes:
        arrays: `ids`, `mask`, `label`, `id` of the training questions, int32.
        accuracy: `accuracy(program) -> share` of the test questions.
        folder: of checkpoints and answers.
        start: the encoder's weights with a head of zeros.
        teacher_epochs, epochs, seeds: how long, and how often.
    """

    arrays: dict[str, np.ndarray]
    accuracy: Callable[[lx.Program], float]
    tested: int
    folder: pathlib.Path
    start: dict[str, jax.Array]
    teacher_epochs: float
    epochs: float
    seeds: int

    def steps(self, epochs: float) -> int:
        """Steps of so many epochs."""
        return max(2, round(epochs * (len(self.arrays["label"]) // SETTINGS["batch"])))

    def learn(self, program: lx.Program, loss: Any, epochs: float, seed: int, name: str) -> lx.Program:
        """Train, kept under a name."""
        return base.learn(
            program,
            loss,
            base.batches(self.arrays, SETTINGS["batch"], seed),
            steps=self.steps(epochs),
            rate=SETTINGS["rate"],
            decay=SETTINGS["decay"],
            folder=self.folder / f"{name}, {epochs:g} epochs",
            seed=seed,
        )

    @functools.cached_property
    def teacher(self) -> lx.Program:
        """The fine-tuned teacher."""
        program = traced(6, self.start)
        return self.learn(program, train.supervised(program), self.teacher_epochs, 0, "teacher")

    @functools.cached_property
    def quantized(self) -> lx.Program:
        """The teacher in int8."""
        some = {name: self.arrays[name][: SETTINGS["batch"]] for name in ("ids", "mask")}
        recipe = lx.Recipe.load("int8")
        return lx.optimize(self.teacher, recipe, buckets={"batch": (SETTINGS["batch"],)}, calibration=[some])

    def answers(self, name: str) -> train.Answers:
        """What a teacher says of each training question, stored once."""
        folder = self.folder / f"answers of {name}"
        if (folder / "manifest.json").is_file():
            return train.Answers.load(folder)
        rows, step = len(self.arrays["id"]), SETTINGS["batch"]
        cuts = ({key: leaf[k : k + step] for key, leaf in self.arrays.items()} for k in range(0, rows, step))
        return train.teach(getattr(self, name), cuts, folder, top_k=77, temperatures=(SETTINGS["temperature"],))

    def student(self, variant: str, seed: int) -> lx.Program:
        """A student with half of the layers, trained."""
        program = traced(3, train.every_nth_layer(self.teacher.weights, "encoder.layer.{}", layers=KEPT))
        logits = train.Logits(SETTINGS["temperature"])
        features = train.Features({f"layer_{k}": f"layer_{KEPT[k]}" for k in range(3)}, "cosine", mask="mask")
        losses: dict[str, Callable[[], Any]] = {
            "labels alone": lambda: train.supervised(program),
            "logits alone": lambda: train.distill(program, self.answers("teacher"), [logits]),
            "logits of the teacher in int8": lambda: train.distill(program, self.answers("quantized"), [logits]),
            "logits and features": lambda: train.distill(program, self.teacher, [logits, features]),
        }
        return self.learn(program, losses[variant](), self.epochs, seed, f"{variant}, seed {seed}")


def traced(layers: int, weights: dict[str, jax.Array]) -> lx.Program:
    """A classifier of so many layers."""
    inputs = {name: lx.TensorSpec(("batch", SETTINGS["length"]), "int32") for name in ("ids", "mask")}
    return lx.trace(distill_minilm.classifier(layers, 12), weights, inputs)


def load(*, quick: bool) -> Task:
    """The task.

    Raises:
        models.MissingError: if the model or the questions are not here.
    """
    parts = {part: minilm.questions(part, 128 if quick else None) for part in ("train", "test")}
    weights = minilm.load_weights()
    table = "embeddings.word_embeddings.weight"
    used = np.unique(np.concatenate([np.zeros(1, np.int32)] + [
        ids.ravel() for part in parts.values() for _, ids, _ in part.batches
    ]))  # fmt: skip
    weights[table] = weights[table][used]
    weights |= {"head.weight": jnp.zeros((minilm.WIDTH, 77)), "head.bias": jnp.zeros(77)}
    known = functools.partial(np.searchsorted, used)
    arrays: dict[str, Any] = {
        name: np.zeros((len(parts["train"].labels), SETTINGS["length"]), np.int32) for name in ("ids", "mask")
    }
    for rows, ids, mask in parts["train"].batches:
        shown = min(ids.shape[1], SETTINGS["length"])
        for name, leaf in (("ids", known(ids)), ("mask", mask)):
            arrays[name][rows[rows >= 0], :shown] = leaf[rows >= 0, :shown]
    arrays |= {"label": parts["train"].labels, "id": np.arange(len(parts["train"].labels), dtype=np.int32)}
    test = [(rows, known(ids).astype(np.int32), mask) for rows, ids, mask in parts["test"].batches]
    labels = parts["test"].labels

    def accuracy(program: lx.Program) -> float:
        run, right = jax.jit(program.fn), 0
        for rows, ids, mask in test:
            found = np.asarray(run(program.weights, ids, mask)).argmax(-1)
            right += int((found == labels[rows])[rows >= 0].sum())
        return right / len(labels)

    epochs = (1.0, 1.0, 1) if quick else (TEACHER_EPOCHS, EPOCHS, SETTINGS["seeds"])
    settings = json.dumps([SETTINGS, KEPT, len(labels)])
    folder = base.FOLDER / f"sentences-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    return Task(arrays, accuracy, len(labels), folder, weights, *epochs)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Accuracy of the teacher and of each student; more and more seeds."""
    task = load(quick=options.quick)
    found: dict[str, Any] = {
        "settings": SETTINGS,
        "epochs": [task.teacher_epochs, task.epochs],
        "questions": [len(task.arrays["label"]), task.tested],
        "teacher": options.rows.row("sentences: teacher", lambda: task.accuracy(task.teacher)),
        "quantized": options.rows.row("sentences: teacher in int8", lambda: task.accuracy(task.quantized)),
        "students": {variant: [] for variant in VARIANTS},
    }

    def judged(variant: str, seed: int) -> float:
        return task.accuracy(task.student(variant, seed))

    for seed in range(task.seeds):
        for variant in VARIANTS:
            name = f"sentences: {variant}, seed {seed}"
            accuracy = options.rows.row(name, functools.partial(judged, variant, seed))
            print(f"  {name}: {harness.percent(accuracy)} %", flush=True)
            found["students"][variant].append(accuracy)
            yield found
