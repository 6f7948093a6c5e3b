"""The training step: gradients, accumulation over microbatches, clipping, and the update, as one pure function."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_xla.errors import TrainingError
from lepton_xla.train.models import Loss
from lepton_xla.train.state import State

type Step = Callable[[State, Mapping[str, jax.Array], Any], tuple[State, dict[str, jax.Array]]]
"""`step(state, batch, arrays) -> (state, metrics)`; `arrays` are those of the loss, see `Loss`."""

# Metrics that the step itself reports; a loss may not use these names.
OWN_METRICS = ("loss", "grad_norm", "finite")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Metrics of a step in one array, which is read at once.

    Attributes:
        names: names of the metrics.
        values: their values, `[len(names)]`.
    """

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    values: jax.Array

    @classmethod
    def of(cls, metrics: Mapping[str, jax.Array]) -> Metrics:
        """Pack what a step returns."""
        names = tuple(sorted(metrics))
        return cls(names, jnp.stack([jnp.asarray(metrics[name], float) for name in names]))


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    scale_optimizer: optax.GradientTransformation | None = None,
    accumulate: int = 1,
    compute_dtype: str | None = None,
    clip_norm: float | None = None,
    ema: float | None = None,
    platform: str | None = None,
    mesh: Mesh | None = None,
    batch_axes: Sequence[str] = (),
) -> Step:
    """Make the function of one training step.

    A step whose loss or gradients are not finite changes nothing but `step` and `skipped`.

    Args:
        loss: the loss; it gets `scales` too if the state has some.
        optimizer: updates the weights.
        scale_optimizer: updates the scales of the state.
        accumulate: number of microbatches that a batch is cut into, one after another. The gradients of the devices
            are added up once, after the last.
        compute_dtype: dtype to which float32 weights and batch entries are cast for the loss; the weights in the state
            stay float32.
        clip_norm: largest global norm of the gradients; larger ones are scaled down to it.
        ema: decay of the moving average of the weights. The first steps use less: `min(ema, (1 + n) / (10 + n))`.
        platform: where the step runs, such as `gpu`, which decides between forms of equal meaning; by default where
            JAX runs.
        mesh: the mesh of the batch, if several devices share it.
        batch_axes: the mesh axes that the rows of a batch are split over.
    """
    takes_step = _has_parameter(loss, "step")
    on_cpu = (jax.default_backend() if platform is None else platform) == "cpu"
    shards = 1 if mesh is None else math.prod(mesh.shape[name] for name in batch_axes)

    def of_batch(trained: Any, arrays: Any, batch: Any, key: Any, model_state: Any, step: Any) -> Any:
        bound = loss if arrays is None else loss.bind(arrays)  # pyright: ignore[reportFunctionMemberAccess]
        more = {"step": step} if takes_step else {}
        if "scales" in trained:
            more["scales"] = trained["scales"]
        weights = trained["weights"]
        if compute_dtype is not None:
            weights, batch = (_cast(tree, compute_dtype) for tree in (weights, batch))
        value, metrics, after = bound(weights, batch, key, model_state, **more)
        _check_loss(value, metrics)
        # The state keeps its dtypes whatever the loss computes in.
        after = {path: leaf.astype(model_state[path].dtype) for path, leaf in after.items()}
        return value.astype(jnp.float32), (metrics, after)

    gradient = jax.value_and_grad(of_batch, has_aux=True)

    def accumulated(trained: Any, arrays: Any, batch: Any, key: Any, model_state: Any, step: Any) -> Any:
        """Mean gradients over all microbatches. With several shards, each accumulates its own until the end."""
        pieces = jax.tree.map(lambda leaf: _cut(leaf, accumulate, shards, mesh, batch_axes), batch)
        each = gradient
        if shards > 1:
            each = jax.vmap(gradient, (None, None, 0, 0, None, None), spmd_axis_name=tuple(batch_axes))

        def body(carry: Any, piece: Any) -> tuple[Any, Any]:
            # One after another even where they are unrolled, so that they share memory.
            (total, state), (index, rows) = lax.optimization_barrier((carry, piece))
            keys = jax.random.fold_in(key, index)
            keys = jax.random.split(keys, shards) if shards > 1 else keys
            (value, (metrics, after)), grads = each(trained, arrays, rows, keys, state, step)
            if shards > 1:
                after = jax.tree.map(_shard_mean, after, state)
            return (jax.tree.map(jnp.add, total, grads), after), (value, metrics)

        shapes = jax.eval_shape(lambda: each(trained, arrays, *_first(pieces, key, shards), model_state, step))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1])
        if shards > 1 and mesh is not None:
            spread = NamedSharding(mesh, PartitionSpec(tuple(batch_axes)))
            zeros = jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, spread), zeros)
        # XLA:CPU runs convolutions inside a loop on one thread, at a tenth of their speed.
        unroll = accumulate if on_cpu else 1
        (total, after), (values, metrics) = lax.scan(
            body, (zeros, model_state), (jnp.arange(accumulate), pieces), unroll=unroll
        )
        mean = lambda leaf: (leaf.sum(0) if shards > 1 else leaf) / jnp.asarray(accumulate * shards, leaf.dtype)  # noqa: E731
        return (values.mean(), (jax.tree.map(jnp.mean, metrics), after)), jax.tree.map(mean, total)

    def step(state: State, batch: Mapping[str, jax.Array], arrays: Any) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        trained: dict[str, Any] = {"weights": state.weights}
        if state.scales:
            trained["scales"] = state.scales["values"]
        run = gradient if accumulate == 1 else accumulated
        (value, (metrics, model_state)), grads = run(trained, arrays, batch, key, state.model_state, state.step)
        norm = optax.tree.norm(grads).astype(jnp.float32)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        def changed(before: State, grads: Any) -> State:
            if clip_norm is not None:
                factor = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
                grads = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), grads)
            updates, moments = optimizer.update(grads["weights"], before.optimizer, before.weights)
            weights = optax.apply_updates(before.weights, updates)
            after = before.replace(weights=weights, model_state=model_state, optimizer=moments)
            if before.scales:
                assert scale_optimizer is not None
                moved, moments = scale_optimizer.update(
                    grads["scales"], before.scales["optimizer"], before.scales["values"]
                )
                values = optax.apply_updates(before.scales["values"], moved)
                after = after.replace(scales={"values": values, "optimizer": moments})
            if ema is not None:
                count = before.step.astype(jnp.float32)
                decay = jnp.minimum(ema, (1 + count) / (10 + count))
                after = after.replace(ema=optax.incremental_update(weights, before.ema, 1 - decay))
            return after

        before = state.replace(key=(), best={})
        # On a CPU a choice between values costs as much as the update and needs memory for both; on a GPU a branch
        # makes the host wait.
        if on_cpu:
            kept = lax.cond(finite, changed, lambda before, grads: before, before, grads)
        else:
            kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed(before, grads), before)
        new = kept.replace(
            key=state.key, best=state.best, step=state.step + 1, skipped=state.skipped + (~finite).astype(jnp.int32)
        )
        return new, {**metrics, "loss": value, "grad_norm": norm, "finite": finite}

    return step


def _first(pieces: Any, key: Any, shards: int) -> tuple[Any, Any]:
    return jax.tree.map(lambda leaf: leaf[0], pieces), jax.random.split(key, shards) if shards > 1 else key


def _cut(leaf: jax.Array, accumulate: int, shards: int, mesh: Mesh | None, axes: Sequence[str]) -> jax.Array:
    """Cut `[rows, ...]` into `[microbatches, (shards,) rows, ...]`, where every row stays on its device."""
    rows = leaf.shape[0] // (accumulate * shards)
    if shards == 1:
        return leaf.reshape(accumulate, rows, *leaf.shape[1:])
    cut = leaf.reshape(shards, accumulate, rows, *leaf.shape[1:]).swapaxes(0, 1)
    assert mesh is not None
    return lax.with_sharding_constraint(cut, NamedSharding(mesh, PartitionSpec(None, tuple(axes))))


def _shard_mean(leaf: jax.Array, before: jax.Array) -> jax.Array:
    """One state from those of all shards: the mean of floats; counters are the same everywhere."""
    return leaf.mean(0).astype(before.dtype) if jnp.issubdtype(before.dtype, jnp.floating) else leaf[0]


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, tree)


def _check_loss(value: Any, metrics: Any) -> None:
    if getattr(value, "shape", None) != ():
        raise TrainingError(f"the loss has shape {getattr(value, 'shape', None)}; expected a scalar, such as its mean")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TrainingError(f"the loss is {value.dtype}; expected a float scalar")
    for name, leaf in metrics.items():
        if name in OWN_METRICS:
            raise TrainingError(f"the loss reports a metric {name!r}, which the step itself reports; rename it")
        if getattr(leaf, "shape", ()) != ():
            raise TrainingError(f"the metric {name!r} has shape {leaf.shape}; expected a scalar")


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin or a C function
        return False
    return name in parameters
