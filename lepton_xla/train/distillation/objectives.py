"""`distill`: makes the loss by which a student learns from a teacher."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from lepton_xla.errors import TrainingError
from lepton_xla.program import Program, TensorSpec, Weights, probe_sizes
from lepton_xla.train.distillation.answers import Answers, digest_of
from lepton_xla.train.distillation.features import Features, features_loss, make_projections, teacher_of
from lepton_xla.train.distillation.logits import (
    Labels,
    Logits,
    answers_loss,
    check_answers,
    check_labels,
    check_logits,
    labels_loss,
    logits_loss,
)
from lepton_xla.train.distillation.tapping import Tap, find_attentions, find_taps, tapped
from lepton_xla.train.distillation.terms import AbstractTerm, Seen, weight_at
from lepton_xla.train.models import Model, entries
from lepton_xla.trees import abstract, name_leaves

# Scope of the teacher's operations, so that they do not count among the student's.
_SCOPE = "teacher"
STUDENT, TEACHER = "the student", "the teacher"


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """A loss `loss(weights, batch, key, state, step=None)`, made by `distill`.

    Attributes:
        student: the model that learns.
        teachers: programs that it learns from.
        losses: what is added up.
        arrays: the weights of each teacher. They are an argument of the compiled step, not constants in it.
        answers: stored answers, in place of teachers.
        taps: what is tapped in the student, and in each teacher.
        extra_weights: path -> weight of the losses' own, trained with the student's and dropped at the end.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> loss = lx.train.distill(program, program)
    >>> loss.teacher_digest[:8] == lx.train.distill(program, [program, program]).teacher_digest[:8]
    False
    >>> other = loss.bind(({"w": 2 * jnp.eye(2)},))
    >>> batch = loss.prepare({"x": jnp.eye(2)})
    >>> [round(float(each(program.weights, batch, None, {})[0]), 3) for each in (loss, other)]
    [0.0, 0.105]
    """

    student: Model
    teachers: tuple[Program, ...]
    losses: tuple[AbstractTerm, ...]
    arrays: tuple[Weights, ...]
    answers: Answers | None = None
    extra_weights: dict[str, jax.Array] = dataclasses.field(default_factory=dict[str, jax.Array])
    taps: tuple[tuple[Tap, ...], ...] = ()

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Add what the loss needs to a batch on the host: stored answers, found by the entry `id`.

        Raises:
            TrainingError: if there is no entry `id`, or a sample has no answer.
        """
        return batch if self.answers is None else self.answers.join(batch)

    @functools.cached_property
    def teacher_digest(self) -> str:
        """A digest of the teachers' weights, or of what the stored answers are of. A resumed run needs the same."""
        of = " ".join(map(digest_of, self.teachers)) if self.answers is None else repr(self.answers.header)
        return hashlib.sha256(of.encode()).hexdigest()

    def bind(self, arrays: Any) -> Distillation:
        """Return the loss with these weights of the teachers."""
        return dataclasses.replace(self, arrays=tuple(arrays))

    def __call__(
        self,
        weights: Mapping[str, jax.Array],
        batch: Mapping[str, Any],
        key: Any,
        state: Mapping[str, jax.Array],
        step: Any = None,
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """Compute the loss.

        Args:
            weights: those of the student and `extra_weights`.
            batch: the inputs of the student and of the teachers, and what the losses need, by name.
            key: random key of the student's call.
            state: the student's state.
            step: number of the step, for weights of losses that are functions of it.

        Returns:
            The loss, a float32 scalar; each loss before its weight, and the student's accuracy if there are labels; and
            the student's new state.

        Raises:
            TrainingError: if the batch lacks an entry, or shapes do not fit.
        """
        own = {path: leaf for path, leaf in weights.items() if path not in self.extra_weights}
        inputs = entries(batch, tuple(self.student.program.inputs))
        taps, *theirs = self.taps

        def train(weights: Any, *inputs: Any) -> tuple[Any, dict[str, jax.Array]]:
            return self.student.apply(weights, state, key, *inputs)

        (outputs, after), values = tapped(train, taps, STUDENT)(own, *inputs)
        student = Seen(name_leaves(outputs, single="output"), values)
        teachers: list[Seen] = []
        with jax.named_scope(_SCOPE):
            for program, arrays, wanted in zip(self.teachers, self.arrays, theirs, strict=True):
                given = entries(batch, tuple(program.inputs))
                inputs = [_as_declared(leaf, spec) for leaf, spec in zip(given, program.inputs.values(), strict=True)]
                outputs, values = tapped(program.named_outputs, wanted, TEACHER)(arrays, *inputs)
                teachers.append(jax.tree.map(jax.lax.stop_gradient, Seen(outputs, values)))
        total = jnp.zeros((), jnp.float32)
        metrics: dict[str, jax.Array] = {}
        for name, term in zip(term_names(self.losses), self.losses, strict=True):
            mask = None if term.mask is None else entries(batch, (term.mask,))[0]
            if isinstance(term, Labels):
                value, accuracy = labels_loss(term, student, entries(batch, (term.label,))[0], mask)
                metrics |= {f"accuracy{name.removeprefix('labels')}": accuracy}
            elif isinstance(term, Features):
                seen = teachers[teacher_of(term, len(teachers))]
                value = features_loss(term, student.taps, seen.taps, weights, mask)
            else:
                assert isinstance(term, Logits)
                value = (
                    logits_loss(term, student, teachers, mask)
                    if self.answers is None
                    else answers_loss(term, student, batch, self.answers, mask)
                )
            total = total + weight_at(term, step) * value
            metrics[name] = value
        return total, metrics, after


def distill(
    student: Model | Program,
    teacher: Program | Sequence[Program] | Answers,
    losses: Sequence[AbstractTerm] | None = None,
) -> Distillation:
    """Make a loss by which a student learns from a teacher.

    Args:
        student: the model that is trained.
        teacher: a program, float or quantized; or several, whose probabilities are averaged. It runs in inference and
            gets no gradients. Its inputs are entries of the batch, like the student's. Or its stored answers; then
            each batch needs the entry `id`, and must pass through `prepare`, as fit does.
        losses: what is added up, each times its weight. By default `[Logits()]`: on logits alone a student of another
            architecture learns most reliably (features can hurt it).

    Returns:
        The loss.

    Raises:
        ModelError: if the student cannot be trained.
        TrainingError: if the teacher is of another kind, there are no losses, or an output is missing or has other
            classes than the student's.

    >>> inputs = {"x": lx.TensorSpec(("batch", 2), "float32")}
    >>> teacher = lx.trace(lambda w, x: x @ w["w"], {"w": 3 * jnp.eye(2)}, inputs)
    >>> student = lx.trace(lambda w, x: x * w["s"], {"s": jnp.ones((1, 2))}, inputs)
    >>> loss = lx.train.distill(student, teacher, [lx.train.Logits(2.0, weight=0.9), lx.train.Labels(weight=0.1)])
    >>> batch = {"x": jnp.eye(2), "label": jnp.array([0, 1])}
    >>> value, metrics, _ = loss(student.weights, batch, jax.random.key(0), {})
    >>> {name: round(float(value), 3) for name, value in metrics.items()}
    {'logits': 0.361, 'accuracy': 1.0, 'labels': 0.313}
    """
    model = Model.of(student)
    answers = teacher if isinstance(teacher, Answers) else None
    teachers = (teacher,) if isinstance(teacher, Program) else tuple(teacher) if _several(teacher) else ()
    if (not teachers and answers is None) or not all(isinstance(one, Program) for one in teachers):
        raise TrainingError(f"the teacher is {_kind(teacher)}; expected a Program, several in a list, or Answers")
    terms = (Logits(),) if losses is None else tuple(losses) if _several(losses) else ()
    if not terms or not all(isinstance(term, Logits | Labels | Features) for term in terms):
        raise TrainingError(f"losses is {_kind(losses)}; expected a list such as [Logits(), Labels(weight=0.1)]")
    for term in terms:
        if isinstance(term, Logits) and answers is not None:
            check_answers(term, model.program, answers)
        elif isinstance(term, Logits):
            check_logits(term, model.program, teachers)
        elif isinstance(term, Labels):
            check_labels(term, model.program)
    features = [term for term in terms if isinstance(term, Features)]
    for term in features:
        teacher_of(term, len(teachers))
    taps, extra = _tap(features, model, teachers)
    if taken := [path for path in extra if path in model.weights]:
        raise TrainingError(f"the student has a weight {taken[0]!r}, the name of a projection; rename it")
    return Distillation(model, teachers, terms, tuple(one.weights for one in teachers), answers, extra, taps)


def term_names(terms: Sequence[AbstractTerm]) -> list[str]:
    """Names of losses among the metrics; equal ones are numbered.

    >>> term_names([Logits(), Labels(), Logits(4.0)])
    ['logits', 'labels', 'logits_1']
    """
    seen: collections.Counter[str] = collections.Counter()
    names: list[str] = []
    for term in terms:
        name = type(term).__name__.lower()
        names.append(f"{name}_{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _tap(
    features: Sequence[Features], model: Model, teachers: Sequence[Program]
) -> tuple[tuple[tuple[Tap, ...], ...], dict[str, jax.Array]]:
    """Find what features tap in the student and in each teacher, and make their projections.

    Raises:
        TrainingError: if a name is unknown, or values do not fit each other.
    """
    key = jax.random.key(0)
    train = lambda weights, *inputs: model.apply(weights, model.state, key, *inputs)  # noqa: E731
    found = [_found(train, model.weights, model.program, [(term.kind, list(term.pairs)) for term in features], STUDENT)]
    for index, teacher in enumerate(teachers):
        mine = [term for term in features if teacher_of(term, len(teachers)) == index]
        wanted = [(term.kind, list(term.pairs.values())) for term in mine]
        found.append(_found(teacher.named_outputs, teacher.weights, teacher, wanted, TEACHER))
    extra: dict[str, jax.Array] = {}
    for term in features:
        extra |= make_projections(term, found[0][1], found[1 + teacher_of(term, len(teachers))][1])
    return tuple(taps for taps, _ in found), extra


def _found(
    fn: Any, weights: Any, program: Program, wanted: Sequence[tuple[str, Sequence[str]]], whose: str
) -> tuple[tuple[Tap, ...], dict[tuple[bool, str], Any]]:
    """Find taps of one model, and their shapes."""
    if not wanted:
        return (), {}
    sizes, _ = probe_sizes(program.fn, program.weights, program.inputs)
    args = (abstract(weights), *program.abstract_inputs(sizes))
    names = {
        attention: [name for kind, names in wanted if (kind == "attention") == attention for name in names]
        for attention in (True, False)
    }
    taps = (*find_taps(fn, args, names[False], whose), *find_attentions(fn, args, names[True], whose))
    _, shapes = jax.eval_shape(tapped(fn, taps, whose), *args)
    return taps, shapes


def _as_declared(leaf: jax.Array, spec: TensorSpec) -> jax.Array:
    """A float input in the teacher's own dtype: a loop may cast batches for the student."""
    floats = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.issubdtype(spec.dtype, jnp.floating)
    return leaf.astype(spec.dtype) if floats else leaf


def _several(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _kind(value: Any) -> str:
    if _several(value):
        return f"a {type(value).__name__} of {', '.join(type(one).__name__ for one in value) or 'nothing'}"
    return f"a {type(value).__name__}"
