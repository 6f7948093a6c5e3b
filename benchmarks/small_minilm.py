"""MiniLM for BANKING77 in a fifth of its bytes: three of its six layers, distilled, in int8, by one command.

    leptonx train benchmarks/small_minilm.py:small --recipe int8 -o small.lepton
    leptonx eval benchmarks/small_minilm.py:whole small.lepton
    leptonx bench small.lepton --target benchmarks/small_minilm.py:whole

`whole` is the fine-tuned MiniLM of `distillation.py`, which is trained first if it never was. `distillation.py
--sections smaller` runs these commands.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax
from students import base, sentences

import lepton_xla as lx
from lepton_xla import train

BATCH, LENGTHS, EPOCHS = 8, (16, 64), 2
POSITIONS = "embeddings.position_embeddings.weight"
SIZES = {"batch": (1, BATCH), "seq": LENGTHS}


@functools.cache
def _task() -> sentences.Task:
    return sentences.load(quick=bool(os.environ.get("LEPTON_QUICK")))


def whole() -> lx.ModelSpec:
    """The fine-tuned MiniLM."""
    task = _task()
    program = task.with_whole_table(task.teacher)
    some = {name: leaf[:BATCH] for name, leaf in _training().items() if name in program.inputs}
    inputs = dict(program.inputs)
    return lx.ModelSpec(
        inputs, fn=program.fn, weights=program.weights, buckets=SIZES, calibration=[some], evaluate=evaluate
    )


def small() -> train.TrainSpec:
    """The student, which starts from layers of `whole` and learns from its answers."""
    task = _task()
    student = task.with_whole_table(task.begin_student(task.teacher.weights))
    # Positions that no bucket has would only take bytes.
    positions = {POSITIONS: student.weights[POSITIONS][: LENGTHS[-1]]}
    student = student.replace(weights={**student.weights, **positions})
    steps = EPOCHS * (len(task.arrays["label"]) // sentences.BATCH)
    return train.TrainSpec(
        student,
        base.batches(_training(), sentences.BATCH, 0),
        max(2, steps),
        _updates,
        loss=train.distill(student, task.answers("teacher"), [train.Logits(sentences.SETTINGS["temperature"])]),
        buckets=SIZES,
        options={"clip_norm": 1.0},
    )


def evaluate(predict: Callable[..., Mapping[str, Any]]) -> dict[str, float]:
    """The share of the test questions whose intent is found; what follows the 64th token is cut."""
    task, right = _task(), 0
    for labels, ids, mask in task.test:
        for start in range(0, len(labels), BATCH):
            rows, length = slice(start, start + BATCH), min(ids.shape[1], LENGTHS[-1])
            words = task.words[ids[rows, :length]].astype(np.int32)
            found = np.asarray(predict(ids=words, mask=mask[rows, :length])["output"])
            right += int((found.argmax(-1) == labels[rows]).sum())
    return {"accuracy": right / task.tested}


def _training() -> dict[str, np.ndarray]:
    task = _task()
    return {**task.arrays, "ids": task.words[task.arrays["ids"]].astype(np.int32)}


def _updates(steps: int) -> optax.GradientTransformation:
    return base.optimizer(steps, sentences.SETTINGS["rate"], sentences.SETTINGS["decay"])
