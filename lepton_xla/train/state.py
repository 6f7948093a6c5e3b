"""The state of a training run: one pytree, so that it has one tree of shardings and is one checkpoint."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a training step reads and writes.

    Attributes:
        step: number of steps taken, int32.
        weights: path -> array; what the optimizer updates.
        model_state: path -> array that calls of the model write, such as batch statistics; empty for most models.
        optimizer: state of the optimizer. Masks are in it (`SparsityState`).
        scales: trained scales and the state of their optimizer; empty without them.
        ema: path -> moving average of a weight; empty without `ema`.
        best: path -> weight or model state of the best evaluation so far; empty without `keep_best`.
        key: typed key of the run; step k draws from `fold_in(key, k)`.
        skipped: number of steps that changed nothing because the loss or a gradient was not finite, int32.

    >>> import optax
    >>> weights = {"w": jnp.ones((2, 2))}
    >>> state = State.first(weights, {}, optax.sgd(0.1).init(weights), jax.random.key(0))
    >>> int(state.step), int(state.replace(step=state.step + 1).step)
    (0, 1)
    """

    step: Int32[Array, ""]
    weights: dict[str, jax.Array]
    model_state: dict[str, jax.Array]
    optimizer: Any
    scales: dict[str, Any]
    ema: dict[str, jax.Array]
    best: dict[str, jax.Array]
    key: Key[Array, ""]
    skipped: Int32[Array, ""]

    @staticmethod
    def first(
        weights: dict[str, jax.Array], model_state: dict[str, jax.Array], optimizer: Any, key: Key[Array, ""]
    ) -> State:
        """The state before the first step, without scales, averages and best weights."""
        zero = jax.numpy.zeros((), jax.numpy.int32)
        return State(zero, weights, model_state, optimizer, {}, {}, {}, key, zero.copy())

    def replace(self, **changes: Any) -> State:
        """Return a copy with the given fields changed."""
        return dataclasses.replace(self, **changes)
