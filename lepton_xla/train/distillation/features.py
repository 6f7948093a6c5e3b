"""Losses on values from inside of student and teacher."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from lepton_xla.errors import TrainingError
from lepton_xla.train.distillation.terms import AbstractTerm, masked_mean, spread

type Key = tuple[bool, str]
"""Of a tapped value: whether it is an attention, and its name."""
type Kind = Literal["mse", "cosine", "attention", "distance", "angle"]

_KINDS: tuple[str, ...] = get_args(Kind.__value__)
_PROJECTED = ("mse", "cosine")
# Smallest probability and norm that a logarithm or a quotient sees; dropout makes zeros.
_LEAST = 1e-6


@dataclasses.dataclass(frozen=True)
class Features(AbstractTerm):
    """The difference between values from inside of the student and of the teacher; the mean over all pairs.

    A value is named by a site (`SITE`: its output; `SITE:input`: what enters it) or a scope (`SCOPE`: its last value
    that is used outside of it), in both models as they are. The last parts of a scope's name suffice. Inside a scan
    `[i]` after the name picks the step. Which layer is paired with which is up to the pairs.

    Let s and t be the student's and the teacher's values.

    - `mse`: the mean of `(s - t)^2` over all axes (FitNets, Romero et al. 2015, arXiv:1412.6550).
    - `cosine`: `1 - cos(s, t)` over the last axis (DistilBERT, Sanh et al. 2019, arXiv:1910.01108).
    - `attention`: `KL(t || s)` of attention probabilities (MiniLM, Wang et al. 2020, arXiv:2002.10957). The names are
      scopes of attentions: `SCOPE`, or `SCOPE#n` if it has several; `#n` counts those of the whole model. If the
      numbers of heads differ, the heads are averaged.
    - `distance`, `angle`: the Huber loss of distances between rows, each divided by their mean, or of the angles of
      three rows (RKD, Park et al. 2019, arXiv:1904.05068; its weights are 25 and 50). Widths and shapes may differ.
      `angle` takes time and memory of rows cubed.

    Attributes:
        pairs: name in the student -> name in the teacher.
        kind: which difference.
        projection: for `mse` and `cosine`, whether a student's value of another width is multiplied by a learned matrix
            of the loss's own. It is trained with the student's weights and dropped at the end.
        teacher: of several teachers, the index of the one that has these names.

    Raises:
        TrainingError: if there are no pairs, or the kind is unknown.

    >>> lx.train.Features({"layer_0": "layer_1", "layer_1": "layer_3"}, "cosine", weight=0.5).kind
    'cosine'
    """

    pairs: Mapping[str, str]
    kind: Kind = "mse"
    projection: bool = True
    teacher: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pairs, Mapping) or not self.pairs:
            raise TrainingError(
                f"Features: pairs = {self.pairs!r}; expected names such as {{'layer_0': 'layer_1'}}, the student's "
                "first"
            )
        if self.kind not in _KINDS:
            raise TrainingError(f"Features: kind = {self.kind!r}; expected {', '.join(_KINDS)}")


def key_of(term: Features, name: str) -> Key:
    """The key of a value among those that were tapped."""
    return term.kind == "attention", name


def teacher_of(term: Features, teachers: int) -> int:
    """The index of the teacher whose values count.

    Raises:
        TrainingError: if it is not given and there are several, or there is none of this number.
    """
    if term.teacher is None and teachers > 1:
        raise TrainingError(f"Features: there are {teachers} teachers; give the index of one, such as teacher=0")
    chosen = term.teacher or 0
    if not 0 <= chosen < teachers:
        raise TrainingError(
            f"Features: teacher = {chosen}, but there are {teachers}"
            if teachers
            else "Features: stored answers have no values from inside of the teacher; give the teacher itself"
        )
    return chosen


def make_projections(term: Features, student: Mapping[Key, Any], teacher: Mapping[Key, Any]) -> dict[str, jax.Array]:
    """Check that values fit each other, and make the projections.

    Args:
        term: the loss.
        student: shapes of the student's values.
        teacher: shapes of the teacher's values.

    Returns:
        Path -> float32 `[student's width, teacher's width]`, random, the same in each run.

    Raises:
        TrainingError: if values do not fit.
    """
    made: dict[str, jax.Array] = {}
    for own, other in term.pairs.items():
        s, t = student[key_of(term, own)], teacher[key_of(term, other)]
        for whose, name, leaf in (("student", own, s), ("teacher", other, t)):
            if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim < 2:
                raise TrainingError(
                    f"Features: the {whose}'s {name!r} is {leaf.dtype}{list(leaf.shape)}; expected floats "
                    "[rows, ..., width]. If the site is quantized, name the scope around it"
                )
        if term.kind not in _PROJECTED:
            continue
        if s.ndim != t.ndim:
            raise _unlike(own, other, s, t)
        if s.shape[-1] != t.shape[-1]:
            if not term.projection:
                raise TrainingError(
                    f"Features: the student's {own!r} has width {s.shape[-1]}, the teacher's {other!r} {t.shape[-1]}; "
                    "set projection=True"
                )
            key = jax.random.key(zlib.crc32(f"{own}\0{other}".encode()))
            kernel = jax.random.normal(key, (s.shape[-1], t.shape[-1]), jnp.float32) * s.shape[-1] ** -0.5
            made[projection_path(own, other)] = kernel
    return made


def projection_path(student: str, teacher: str) -> str:
    """The path of a pair's projection among the weights.

    >>> projection_path("layer_0", "layer_1")
    'distill/layer_0->layer_1/kernel'
    """
    return f"distill/{student}->{teacher}/kernel"


def features_loss(
    term: Features,
    student: Mapping[Key, jax.Array],
    teacher: Mapping[Key, jax.Array],
    extra: Mapping[str, jax.Array],
    mask: Any,
) -> jax.Array:
    """Compute `Features`."""
    values: list[jax.Array] = []
    for own, other in term.pairs.items():
        s, t = student[key_of(term, own)], teacher[key_of(term, other)].astype(jnp.float32)
        kernel = extra.get(projection_path(own, other)) if term.kind in _PROJECTED else None
        if kernel is not None:
            s = s.astype(kernel.dtype) @ kernel
        s = s.astype(jnp.float32)
        if term.kind == "attention":
            values.append(_attention(s, t, mask, _unlike(own, other, s, t)))
        elif term.kind in ("distance", "angle"):
            if s.shape[0] != t.shape[0]:
                raise _unlike(own, other, s, t)
            values.append(_relations(_rows(s, mask), _rows(t, mask), term.kind, mask))
        elif s.shape != t.shape:
            raise _unlike(own, other, s, t)
        else:
            each = jnp.mean((s - t) ** 2, -1) if term.kind == "mse" else _cosine(s, t)
            values.append(masked_mean(each, mask, "Features"))
    return sum(values[1:], values[0]) / len(values)


def _cosine(s: jax.Array, t: jax.Array) -> jax.Array:
    return optax.losses.cosine_distance(s, t, epsilon=_LEAST)


def _attention(s: jax.Array, t: jax.Array, mask: Any, unlike: TrainingError) -> jax.Array:
    """Probabilities `[rows, heads, queries, keys]` -> the mean divergence."""
    if s.ndim != 4 or t.ndim != 4 or (s.shape[0], *s.shape[2:]) != (t.shape[0], *t.shape[2:]):
        raise unlike
    if s.shape[1] != t.shape[1]:
        s, t = (jnp.mean(one, 1, keepdims=True) for one in (s, t))
    found = jnp.where(t > 0, jnp.log(jnp.maximum(s, _LEAST)), jnp.zeros_like(s))
    return masked_mean(jnp.mean(optax.losses.kl_divergence(found, t), 1), mask, "Features")


def _rows(values: jax.Array, mask: Any) -> jax.Array:
    """One vector a row, with zeros where a position does not count."""
    if mask is not None and values.ndim > mask.ndim and mask.shape == values.shape[: mask.ndim]:
        values = jnp.where(spread(mask, values.ndim), values, jnp.zeros_like(values))
    return jnp.reshape(values, (values.shape[0], -1))


def _relations(s: jax.Array, t: jax.Array, kind: str, mask: Any) -> jax.Array:
    rows = s.shape[0]
    counts = jnp.ones(rows, bool) if mask is None else jnp.any(jnp.reshape(spread(mask, mask.ndim), (rows, -1)), 1)
    pairs = counts[:, None] & counts[None, :] & ~jnp.eye(rows, dtype=bool)
    if kind == "distance":
        found, wanted = (_distances(one, pairs) for one in (s, t))
        return masked_mean(optax.losses.huber_loss(found, wanted), pairs, "Features")
    found, wanted = (_angles(one) for one in (s, t))
    triples = pairs[:, :, None] & pairs[:, None, :]  # [the row in the corner, another, another]
    return masked_mean(optax.losses.huber_loss(found, wanted), triples, "Features")


def _distances(rows: jax.Array, pairs: jax.Array) -> jax.Array:
    """Distances `[rows, rows]`, divided by the mean of those of pairs."""
    found = _norm(rows[:, None, :] - rows[None, :, :])
    return found / jnp.maximum(masked_mean(found, pairs, "Features"), _LEAST)


def _angles(rows: jax.Array) -> jax.Array:
    """Cosines of the angles at the first row, `[rows, rows, rows]`."""
    edges = rows[None, :, :] - rows[:, None, :]
    edges = edges / jnp.maximum(_norm(edges)[..., None], _LEAST)
    return jnp.einsum("jif,jkf->jik", edges, edges)


def _norm(vectors: jax.Array) -> jax.Array:
    """Norms over the last axis; the gradient at zero is zero."""
    square = jnp.sum(vectors**2, -1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, jnp.ones_like(square))), 0.0)


def _unlike(own: str, other: str, s: Any, t: Any) -> TrainingError:
    return TrainingError(
        f"Features: the student's {own!r} has shape {tuple(s.shape)}, the teacher's {other!r} {tuple(t.shape)}, which "
        "do not fit each other"
    )
