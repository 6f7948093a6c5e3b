"""What every loss of a distillation has in common: its weight, what it sees, and means over rows that count."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.errors import TrainingError
from lepton_xla.program import TensorSpec
from lepton_xla.trees import some_names

type Weight = float | Callable[[Any], Any]
"""A constant, or a function of the step such as an optax schedule."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["outputs", "taps"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Seen:
    """What a loss sees of one model: its outputs by name, and what was tapped inside of it, by the keys of taps."""

    outputs: Mapping[str, Any]
    taps: Mapping[tuple[bool, str], Any] = dataclasses.field(default_factory=dict[tuple[bool, str], Any])


@dataclasses.dataclass(frozen=True)
class AbstractTerm:
    """One loss of a distillation; the total is the sum of `weight * loss`.

    Attributes:
        weight: a number of at least 0, or a function of the step, such as an optax schedule.
        mask: the batch's entry that says what counts, such as `attention_mask`: 0 or 1, of shape `[rows]`,
            `[rows, positions]` and so on. None counts everything.
    """

    weight: Weight = dataclasses.field(default=1.0, kw_only=True)
    mask: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.weight) and not is_number(self.weight, 0):
            raise TrainingError(
                f"{type(self).__name__}: weight = {self.weight!r}; expected a number of at least 0, or a function of "
                "the step"
            )


def is_number(value: Any, above: float, *, strictly: bool = False) -> bool:
    """Whether a value is a finite number of at least `above`, or more than it."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and (value > above if strictly else value >= above)


def weight_at(term: AbstractTerm, step: Any) -> Any:
    """The weight at a step.

    Raises:
        TrainingError: if the weight is a function, and there is no step.
    """
    if not callable(term.weight):
        return term.weight
    if step is None:
        raise TrainingError(
            f"{type(term).__name__}: its weight is a function of the step, so the loss must be called with step=..."
        )
    return jnp.asarray(term.weight(step), jnp.float32)


def masked_mean(values: jax.Array, mask: Any, what: str) -> jax.Array:
    """The mean of the values that count; 0 if none does.

    Args:
        values: `[rows, ...]`.
        mask: None, or 0 and 1 of the shape of the first axes of `values`.
        what: what the values are of, for errors.

    Raises:
        TrainingError: if the mask has another shape.

    >>> float(masked_mean(jnp.array([1.0, 2.0, 6.0]), jnp.array([1, 1, 0]), "x"))
    1.5
    """
    if mask is None:
        return jnp.mean(values)
    if mask.shape != values.shape[: mask.ndim]:
        raise TrainingError(f"the mask of {what} has shape {mask.shape}, which does not fit values of {values.shape}")
    counts = jnp.broadcast_to(spread(mask, values.ndim), values.shape)
    number = jnp.sum(counts.astype(jnp.float32))
    return jnp.sum(jnp.where(counts, values, jnp.zeros_like(values))) / jnp.maximum(number, 1.0)


def spread(mask: jax.Array, ndim: int) -> jax.Array:
    """A mask as booleans with this many axes; those that it lacks have the size 1.

    >>> spread(jnp.array([1, 0]), 3).shape
    (2, 1, 1)
    """
    counts = mask if mask.dtype == jnp.bool_ else mask != 0
    return jnp.reshape(counts, mask.shape + (1,) * (ndim - mask.ndim))


def choose_output(outputs: Mapping[str, Any], name: str | None, whose: str) -> str:
    """The output with this name, or the only one.

    Raises:
        TrainingError: if there is none of this name, or several and no name.

    >>> choose_output({"logits": 1, "hidden": 2}, "logits", "the student")
    'logits'
    """
    if name is None:
        if len(outputs) != 1:
            raise TrainingError(f"{whose} has the outputs {some_names(outputs)}; name one with output=...")
        return next(iter(outputs))
    if name not in outputs:
        raise TrainingError(f"{whose} has no output {name!r}; its outputs are {some_names(outputs)}")
    return name


def fits(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two outputs may have the same shape: their ranks and their fixed sizes are equal."""
    return len(one.shape) == len(other.shape) and all(
        a == b or isinstance(a, str) or isinstance(b, str) for a, b in zip(one.shape, other.shape, strict=True)
    )
