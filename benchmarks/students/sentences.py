"""MiniLM with three of its six layers on BANKING77, and four ways to teach it.

The teacher is all-MiniLM-L6-v2 with a linear layer on top, fine-tuned. Each student starts from every second layer of
the encoder as it was before (as in arXiv:1908.09355): started from the teacher's own, the one that learns from labels
alone would have been taught too. Words that no question has are left out of the table of embeddings: they would never
be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
SETTINGS: dict[str, Any] = {"length": 24, "rate": 4e-4, "decay": 0.01, "temperature": 2.0, "seeds": 3}
TEACHER_EPOCHS, TEACHER_BATCH, EPOCHS, BATCH = 4, 64, 1, 32
TABLE = "embeddings.word_embeddings.weight"
KEPT = [1, 3, 5]
VARIANTS = ("labels alone", "logits alone", "logits of the teacher in int8", "logits and features")


@dataclasses.dataclass(frozen=True)
class Task:
    """The questions, and the teacher.

    Attributes:
        arrays: `ids`, `mask`, `label`, `id` of the training questions, int32.
        test: batches of the test questions, `(labels, ids, mask)`; the label of a row that only fills up is -1.
        start: the encoder's weights with a head of zeros.
        words: which rows of the whole table of embeddings are left; ids count these.
        table: the whole table.
        folder: of checkpoints and answers.
        teacher_epochs, epochs, seeds: how long, and how often.
    """

    arrays: dict[str, np.ndarray]
    test: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    start: dict[str, jax.Array]
    words: np.ndarray
    table: jax.Array
    folder: pathlib.Path
    teacher_epochs: int
    epochs: int
    seeds: int

    @functools.cached_property
    def tested(self) -> int:
        """Number of test questions."""
        return sum(int((labels >= 0).sum()) for labels, _, _ in self.test)

    def accuracy(self, program: lx.Program) -> float:
        """The share of the test questions whose intent is found."""
        run = jax.jit(program.fn)
        found = [
            (np.asarray(run(program.weights, ids, mask)).argmax(-1) == labels).sum() for labels, ids, mask in self.test
        ]
        return int(sum(found)) / self.tested

    def learn(self, program: lx.Program, loss: Any, epochs: int, batch: int, seed: int, name: str) -> lx.Program:
        """Train, kept under a name."""
        return base.learn(
            program,
            loss,
            base.batches(self.arrays, batch, seed),
            steps=max(2, epochs * (len(self.arrays["label"]) // batch)),
            rate=SETTINGS["rate"],
            decay=SETTINGS["decay"],
            folder=self.folder / f"{name}, {epochs} epochs",
            seed=seed,
        ).program

    @functools.cached_property
    def teacher(self) -> lx.Program:
        """The fine-tuned teacher."""
        program = traced(6, self.start)
        return self.learn(program, train.supervised(program), self.teacher_epochs, TEACHER_BATCH, 0, "teacher")

    @functools.cached_property
    def quantized(self) -> lx.Program:
        """The teacher in int8."""
        some = {name: self.arrays[name][:TEACHER_BATCH] for name in ("ids", "mask")}
        sizes = {"batch": (TEACHER_BATCH,), "seq": (SETTINGS["length"],)}
        return lx.optimize(self.teacher, lx.Recipe.load("int8"), buckets=sizes, calibration=[some])

    def answers(self, name: str) -> train.Answers:
        """What a teacher says of each training question, stored once."""
        folder = self.folder / f"answers of {name}"
        if (folder / "manifest.json").is_file():
            return train.Answers.load(folder)
        rows, step = len(self.arrays["id"]), TEACHER_BATCH
        cuts = ({key: leaf[k : k + step] for key, leaf in self.arrays.items()} for k in range(0, rows, step))
        return train.teach(getattr(self, name), cuts, folder, top_k=77, temperatures=(SETTINGS["temperature"],))

    def begin_student(self, weights: Mapping[str, jax.Array]) -> lx.Program:
        """A student with half of the layers of an encoder with a head."""
        return traced(3, train.every_nth_layer(weights, "encoder.layer.{}", layers=KEPT))

    def student(self, variant: str, seed: int) -> lx.Program:
        """A student, trained."""
        program = self.begin_student(self.start)
        logits = train.Logits(SETTINGS["temperature"])
        features = train.Features({f"layer_{k}": f"layer_{KEPT[k]}" for k in range(3)}, "cosine", mask="mask")
        losses: dict[str, Callable[[], Any]] = {
            "labels alone": lambda: train.supervised(program),
            "logits alone": lambda: train.distill(program, self.answers("teacher"), [logits]),
            "logits of the teacher in int8": lambda: train.distill(program, self.answers("quantized"), [logits]),
            "logits and features": lambda: train.distill(program, self.teacher, [logits, features]),
        }
        return self.learn(program, losses[variant](), self.epochs, BATCH, seed, f"{variant}, seed {seed}")

    def with_whole_table(self, program: lx.Program) -> lx.Program:
        """The same program for ids of the whole table, whose other rows are as they were."""
        table = self.table.at[self.words].set(program.weights[TABLE])
        return program.replace(weights={**program.weights, TABLE: table})


def traced(layers: int, weights: dict[str, jax.Array]) -> lx.Program:
    """A classifier of so many layers."""
    inputs = {name: lx.TensorSpec(("batch", "seq"), "int32") for name in ("ids", "mask")}
    return lx.trace(distill_minilm.classifier(layers, 12), weights, inputs)


def load(*, quick: bool) -> Task:
    """The task.

    Raises:
        models.MissingError: if the model or the questions are not here.
    """
    minilm.folder()
    parts = {part: minilm.questions(part, 128 if quick else None) for part in ("train", "test")}
    weights = minilm.load_weights()
    table = weights[TABLE]
    words = np.unique(np.concatenate([ids.ravel() for part in parts.values() for _, ids, _ in part.batches]))
    weights |= {TABLE: table[words], "head.weight": jnp.zeros((minilm.WIDTH, 77)), "head.bias": jnp.zeros(77)}
    renumber = lambda ids: np.searchsorted(words, ids).astype(np.int32)  # noqa: E731
    labels = parts["train"].labels
    arrays = {name: np.zeros((len(labels), SETTINGS["length"]), np.int32) for name in ("ids", "mask")}
    for rows, ids, mask in parts["train"].batches:
        shown = min(ids.shape[1], SETTINGS["length"])
        for name, leaf in (("ids", renumber(ids)), ("mask", mask)):
            arrays[name][rows[rows >= 0], :shown] = leaf[rows >= 0, :shown]
    arrays |= {"label": labels, "id": np.arange(len(labels), dtype=np.int32)}
    test = [
        (np.where(rows >= 0, parts["test"].labels[rows], -1), renumber(ids), mask)
        for rows, ids, mask in parts["test"].batches
    ]
    settings = json.dumps([SETTINGS, KEPT, TEACHER_BATCH, BATCH])
    folder = base.FOLDER / f"sentences-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    folder = pathlib.Path(tempfile.mkdtemp()) if quick else folder
    times = (1, 1, 1) if quick else (TEACHER_EPOCHS, EPOCHS, SETTINGS["seeds"])
    return Task(arrays, test, weights, words, table, folder, *times)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Accuracy of the teacher and of each student; more and more seeds."""
    task = load(quick=options.quick)
    found: dict[str, Any] = {
        "settings": SETTINGS,
        "epochs": [task.teacher_epochs, task.epochs],
        "batches": [TEACHER_BATCH, BATCH],
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
