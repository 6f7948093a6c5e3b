"""Losses of a compressed model: the user's loss on smaller weights, and on rounded ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.errors import TrainingError
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.quantization.fake_quantization import Scales, fake_quant
from lepton_xla.passes.shrinking.groups import Masks
from lepton_xla.passes.shrinking.resizing import on_smaller_weights
from lepton_xla.train.compression.cutting import cut_by_path
from lepton_xla.trees import some_names

# `fn(weights and state together, ...) -> (..., state)`: passes take all by path as weights.
type _Joined = Callable[..., tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a stage changes in a loss.

    Attributes:
        like: shapes of the original weights and model state, by path.
        state: paths of the model state.
        cuts: which slices of them stay.
        plan: what is rounded; None for nothing.
        ranges: ranges of the plan's static sites.
    """

    like: Mapping[str, jax.ShapeDtypeStruct]
    state: frozenset[str]
    cuts: Masks = dataclasses.field(default_factory=dict[str, Any])
    plan: Plan | None = None
    ranges: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def applied(self, fn: _Joined) -> _Joined:
        """Apply them to a function of weights and state together."""
        if self.cuts:
            fn = on_smaller_weights(fn, self.like, self.cuts, ("batch",), returned=sorted(self.state), redrawn=True)
        if self.plan is not None:
            fn = fake_quant(fn, self.plan, {name: jnp.asarray(value) for name, value in self.ranges.items()})
        return fn


class StageLoss:
    """A loss on the weights of a stage; `scales` are trained scales, and gradients flow to them too.

    `loss(weights, batch, key, state, *, scales=None) -> (loss, metrics, state)`. What else the user's loss takes or
    has (`step`, `arrays`, `bind`, `extra_weights`), this one takes or has too.
    """

    def __init__(self, loss: Callable[..., Any], changes: Changes) -> None:
        self.__wrapped__ = loss  # for `inspect.signature`
        self._changes = changes
        self._fn = changes.applied(joined(loss, changes.state))

    def __call__(
        self,
        weights: Mapping[str, Any],
        batch: Any,
        key: Any,
        state: Mapping[str, Any],
        *,
        step: Any = None,
        scales: Scales | None = None,
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Compute the loss, metrics and new state."""
        steps, more = () if step is None else (step,), {"scales": scales} if scales else {}
        value, metrics, after = self._fn({**weights, **state}, batch, key, *steps, **more)
        return value, metrics, after

    def __getattr__(self, name: str) -> Any:
        """What the user's loss has."""
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.__wrapped__, name)
        if name == "bind":
            return lambda arrays: StageLoss(found(arrays), self._changes)
        if name == "extra_weights":
            return cut_by_path(found, self._changes.cuts)
        return found


def joined(loss: Callable[..., Any], state: frozenset[str]) -> _Joined:
    """Make a loss a function of weights and model state together, whose first argument passes can follow by path."""

    def fn(every: Mapping[str, Any], batch: Any, key: Any, *step: Any) -> tuple[Any, Any, dict[str, Any]]:
        weights, before = split(every, state)
        value, metrics, after = loss(weights, batch, key, before, **({"step": step[0]} if step else {}))
        return value, metrics, _same_paths(before, after)

    return fn


def smaller_apply(apply: Callable[..., Any], changes: Changes) -> Callable[..., Any]:
    """Make `apply(weights, state, key, *inputs) -> (outputs, new_state)` on the weights of a stage."""

    def whole(every: Mapping[str, Any], key: Any, *inputs: Any) -> tuple[Any, dict[str, Any]]:
        weights, before = split(every, changes.state)
        outputs, after = apply(weights, before, key, *inputs)
        return outputs, _same_paths(before, after)

    fn = changes.applied(whole)

    def small(weights: Mapping[str, Any], state: Mapping[str, Any], key: Any, *inputs: Any) -> Any:
        return fn({**weights, **state}, key, *inputs)

    return small


def split(every: Mapping[str, Any], state: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split weights and model state that are together."""
    weights = {path: leaf for path, leaf in every.items() if path not in state}
    return weights, {path: leaf for path, leaf in every.items() if path in state}


def _same_paths(before: Mapping[str, Any], after: Any) -> dict[str, Any]:
    """The new state, in the order of the old one."""
    if not isinstance(after, Mapping) or after.keys() != before.keys():
        has = some_names(map(str, after)) if isinstance(after, Mapping) else f"a {type(after).__name__}"
        raise TrainingError(f"the loss was given the state {some_names(before)} and returned {has}; return the same")
    return {path: after[path] for path in before}
