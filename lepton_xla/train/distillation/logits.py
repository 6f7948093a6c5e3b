"""Losses on a model's last outputs: those of a teacher, and labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lepton_xla.errors import TrainingError
from lepton_xla.program import Program, TensorSpec
from lepton_xla.train.distillation.answers import Answers, stored_divergence
from lepton_xla.train.distillation.terms import AbstractTerm, Seen, choose_output, fits, is_number, masked_mean


@dataclasses.dataclass(frozen=True)
class Logits(AbstractTerm):
    """The divergence of the student's answers from the teacher's, both softened (Hinton et al. 2015, arXiv:1503.02531).

    `T^2 * mean(KL(p || q))` with `p = softmax(teacher / T)` and `q = softmax(student / T)`; the mean is over all axes
    but the last, so it does not depend on the number of classes. The factor `T^2` keeps the size of the gradients when
    T changes. Hinton's `alpha` is a pair of weights: `[Logits(T, weight=alpha), Labels(weight=1 - alpha)]`.

    Of several teachers, `p` is the mean of their softened probabilities.

    Attributes:
        temperature: T, above 0.
        output: name of the student's output with the logits `[rows, ..., classes]`; None if it has only one output.
        teacher_output: name of the teacher's; None if it has only one, or one of the same name.

    Raises:
        TrainingError: if the temperature is not above 0.

    >>> lx.train.Logits(temperature=4.0, weight=0.9)
    Logits(weight=0.9, mask=None, temperature=4.0, output=None, teacher_output=None)
    """

    temperature: float = 2.0
    output: str | None = None
    teacher_output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.temperature, 0, strictly=True):
            raise TrainingError(f"Logits: temperature = {self.temperature!r}; expected a number above 0")


@dataclasses.dataclass(frozen=True)
class Labels(AbstractTerm):
    """The cross-entropy of the student's logits and the labels of the batch, as without a teacher.

    Attributes:
        output: name of the student's output with the logits `[rows, ..., classes]`; None if it has only one output.
        label: the batch's entry with the labels: integers `[rows, ...]`, or probabilities of the shape of the logits.

    >>> lx.train.Labels(weight=0.1)
    Labels(weight=0.1, mask=None, output=None, label='label')
    """

    output: str | None = None
    label: str = "label"


def check_logits(term: Logits, student: Program, teachers: Sequence[Program]) -> None:
    """Check that the teachers' logits are of the student's classes.

    Raises:
        TrainingError: if not, or there is no such output.
    """
    name = choose_output(student.outputs, term.output, "the student")
    own = student.outputs[name]
    for teacher in teachers:
        output = _of_teacher(term, teacher.outputs, name)
        theirs = teacher.outputs[output]
        if not fits(own, theirs) or own.shape[-1:] != theirs.shape[-1:]:
            raise TrainingError(
                f"the teacher's output {output!r} is {theirs}, the student's {name!r} is {own}; both must have "
                "the same classes"
            )


def logits_loss(term: Logits, student: Seen, teachers: Sequence[Seen], mask: Any) -> jax.Array:
    """Compute `Logits`."""
    name = choose_output(student.outputs, term.output, "the student")
    own = student.outputs[name]
    chances: list[jax.Array] = []
    for teacher in teachers:
        theirs = teacher.outputs[_of_teacher(term, teacher.outputs, name)]
        if own.shape != theirs.shape:
            raise TrainingError(f"the teacher's logits have shape {theirs.shape}, the student's {own.shape}")
        chances.append(jax.nn.softmax(_soft(theirs, term.temperature)))
    values = divergence(_soft(own, term.temperature), sum(chances[1:], chances[0]) / len(chances))
    return term.temperature**2 * masked_mean(values, mask, "Logits")


def check_answers(term: Logits, student: Program, answers: Answers) -> None:
    """Check that stored answers have the student's classes, and this temperature.

    Raises:
        TrainingError: if not, or there is no such output.
    """
    name = choose_output(student.outputs, term.output, "the student")
    own, header = student.outputs[name], answers.header
    theirs = TensorSpec(("rows", *header.positions, header.classes), header.dtype)
    if not fits(own, theirs) or own.shape[-1] != header.classes:
        raise TrainingError(
            f"{answers.folder}: the answers are {theirs}, the student's {name!r} is {own}; both must have the same "
            "classes"
        )
    if term.temperature not in header.temperatures and header.top_k < header.classes:
        raise TrainingError(
            f"{answers.folder}: the answers are for the temperatures {', '.join(map(str, header.temperatures))}, not "
            f"{term.temperature}; run `teach` with it"
        )


def answers_loss(term: Logits, student: Seen, batch: Mapping[str, Any], answers: Answers, mask: Any) -> jax.Array:
    """Compute `Logits` with stored answers."""
    own = student.outputs[choose_output(student.outputs, term.output, "the student")]
    values = stored_divergence(own, batch, answers.header, float(term.temperature))
    return term.temperature**2 * masked_mean(values, mask, "Logits")


def check_labels(term: Labels, student: Program) -> None:
    """Check that the student has the output.

    Raises:
        TrainingError: if not.
    """
    choose_output(student.outputs, term.output, "the student")


def labels_loss(term: Labels, student: Seen, labels: jax.Array, mask: Any) -> tuple[jax.Array, jax.Array]:
    """Compute `Labels` and the accuracy."""
    logits = student.outputs[choose_output(student.outputs, term.output, "the student")].astype(jnp.float32)
    if jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == logits.shape[:-1]:
        values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = jnp.argmax(logits, -1) == labels
    elif jnp.issubdtype(labels.dtype, jnp.floating) and labels.shape == logits.shape:
        values = optax.softmax_cross_entropy(logits, labels.astype(jnp.float32))
        right = jnp.argmax(logits, -1) == jnp.argmax(labels, -1)
    else:
        raise TrainingError(
            f"the labels {term.label!r} are {labels.dtype}{list(labels.shape)}; logits of {list(logits.shape)} need "
            f"integers of {list(logits.shape[:-1])}, or probabilities of the same shape as the logits"
        )
    return masked_mean(values, mask, "Labels"), masked_mean(right.astype(jnp.float32), mask, "Labels")


def divergence(logits: jax.Array, target: jax.Array) -> jax.Array:
    """`KL(target || softmax(logits))` over the last axis; classes whose target is 0 do not count.

    >>> [round(value, 4) for value in divergence(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])).tolist()]
    [0.6931]
    """
    found = jnp.where(target > 0, jax.nn.log_softmax(logits), jnp.zeros_like(logits))
    return optax.losses.kl_divergence(found, target)


def _soft(logits: jax.Array, temperature: float) -> jax.Array:
    return logits.astype(jnp.float32) / temperature


def _of_teacher(term: Logits, outputs: Mapping[str, Any], student_output: str) -> str:
    """The teacher's output: the one named, else the one of the student's name, else the only one."""
    same = student_output if student_output in outputs else None
    return choose_output(outputs, term.teacher_output or same, "the teacher")
