"""Schedules of sparsity: when masks are updated during training, and to which sparsity."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lepton_xla.errors import RecipeError

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When to update masks, and the sparsity at each step.

    Attributes:
        sparsity: `sparsity(step, final) -> share` in [0, 1), both int32 and float32 scalars inside `jit`; `final` is
            the sparsity that a rule asks for.
        begin: first step at which masks are updated.
        end: last step; None for no end. Masks are always updated at `end`, so that the final sparsity is reached.
        every: steps between updates.
        overrides: whether `final` is ignored, so that rules need not give a sparsity.

    Raises:
        RecipeError: if the steps are invalid.

    >>> schedule = lx.train.Schedule(lambda step, final: final * step / 1000, begin=0, end=1000, every=250)
    >>> [bool(schedule.due(jnp.int32(step))) for step in (0, 1, 250, 1000, 1250)]
    [True, False, True, True, False]
    """

    sparsity: Callable[[jax.Array, Any], Any]
    begin: int = 0
    end: int | None = None
    every: int = 100
    overrides: bool = False

    def __post_init__(self) -> None:
        steps = (self.begin, self.begin if self.end is None else self.end, self.every)
        if not all(isinstance(step, numbers.Integral) for step in steps) or not (
            0 <= steps[0] <= steps[1] and self.every >= 1
        ):
            raise RecipeError(
                f"schedule: begin = {self.begin}, end = {self.end}, every = {self.every}; expected whole numbers, "
                f"0 <= begin <= end and every >= 1"
            )

    @staticmethod
    def of(share: Callable[[Any], Any], *, begin: int = 0, end: int | None = None, every: int = 100) -> Schedule:
        """Make a schedule from a function of the step, such as an optax schedule; it replaces the sparsity of all
        rules.

        Raises:
            RecipeError: if the function is outside of [0, 1) at the first or the last step.

        >>> lx.train.Schedule.of(lambda step: 0.5, begin=100).overrides
        True
        """
        for step in (begin, *([end] if end is not None else [])):
            value = float(share(step))
            if not 0 <= value < 1:
                raise RecipeError(f"schedule: the sparsity at step {step} is {value:g}; expected a share in [0, 1)")
        return Schedule(lambda step, _final: share(step), begin, end, every, overrides=True)

    def due(self, step: Int32[Array, ""]) -> Bool[Array, ""]:
        """Tell whether masks are updated at this step."""
        regular = (step >= self.begin) & ((step - self.begin) % self.every == 0)
        return regular if self.end is None else (regular & (step <= self.end)) | (step == self.end)


def one_shot(at: int = 0) -> Schedule:
    """The final sparsity at once, at one step.

    >>> schedule = lx.train.one_shot(at=500)
    >>> bool(schedule.due(jnp.int32(500))), schedule.sparsity(jnp.int32(500), 0.8)
    (True, 0.8)
    """
    return Schedule(lambda _step, final: final, begin=at, end=at)


def periodic(begin: int = 0, end: int | None = None, *, every: int = 100) -> Schedule:
    """The final sparsity from `begin` on; masks are updated every `every` steps, for methods that regrow elements.

    >>> schedule = lx.train.periodic(begin=0, every=100)
    >>> bool(schedule.due(jnp.int32(300))), schedule.sparsity(jnp.int32(300), 0.8)
    (True, 0.8)
    """
    return Schedule(lambda _step, final: final, begin, end, every)


def polynomial(begin: int, end: int, *, initial: float = 0.0, power: float = 3.0, every: int = 100) -> Schedule:
    """Go from `initial` at step `begin` to the final sparsity at `end` (Zhu and Gupta 2017, arXiv:1710.01878).

    `final + (initial - final) * (1 - (step - begin) / (end - begin)) ** power`. "0 to 0.5 between steps 1000 and
    10000" is `sparsify(optimizer, {".*kernel": 0.5}, schedule=polynomial(1000, 10000))`.

    Raises:
        RecipeError: if `end` is not after `begin`, `initial` is not in [0, 1), or `power` is not positive.

    >>> schedule = lx.train.polynomial(1000, 10000)
    >>> [round(float(schedule.sparsity(step, 0.5)), 3) for step in (1000, 5500, 10000)]
    [0.0, 0.438, 0.5]
    """
    given = (begin, end, initial, power)
    if not all(isinstance(value, numbers.Real) for value in given) or not (
        begin < end and 0 <= initial < 1 and 0 < power < math.inf
    ):
        raise RecipeError(
            f"polynomial schedule: begin = {begin}, end = {end}, initial = {initial}, power = {power}; expected "
            f"begin < end, initial in [0, 1) and power > 0"
        )

    def sparsity(step: jax.Array, final: Any) -> jax.Array:
        left = 1 - jnp.clip((jnp.asarray(step, jnp.float32) - begin) / (end - begin), 0, 1)
        return final + (initial - final) * left**power

    return Schedule(sparsity, begin, end, every)
