"""What a client computes in a round, as one pure function: the same in the simulation and in a client's own process."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lepton_xla.errors import FederatedError
from lepton_xla.federated.settings import Federation, Privacy
from lepton_xla.train.models import Loss, Model

type LocalRound = Callable[[Mapping[str, jax.Array], Mapping[str, Any], jax.Array], tuple[Any, jax.Array, Any]]
"""`local_round(weights, data, key) -> (delta, n, metrics)`.

`weights`: path -> array, those that are trained and the model's state. `data`: `{"rows": {name: [capacity, ...]},
"count": int32}`, where rows from `count` on are padding and change nothing. `delta`: path -> float32 change of each
float weight. `n`: int32, the rows. `metrics`: means over the steps, float32 by name.
"""


def make_local_round(
    model: Model, loss: Loss, optimizer: optax.GradientTransformation, settings: Federation, *, noise: float = 0.0
) -> LocalRound:
    """Make the function of a client's round.

    Without privacy, batches go through the rows in a new order each epoch; the last one is filled up with rows from the
    start of its epoch's order. With privacy, each step takes each row with the same probability, because that is what
    the accounting assumes, and metrics are left out, because they would tell of the rows.

    Args:
        model: what is trained.
        loss: as `lx.train.fit` takes it.
        optimizer: of the clients; its state begins anew in each round.
        settings: epochs, batches, the proximal term, clipping.
        noise: the noise multiplier, with privacy.

    Raises:
        FederatedError: if the loss has needs that a client cannot meet, or the model has a state and privacy is asked
            for.

    >>> x = lx.TensorSpec(("batch", 2), "float32")
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.zeros((2, 2))}, {"x": x})
    >>> model, settings = lx.train.Model.of(program), lx.federated.Federation(batch_rows=2)
    >>> local_round = make_local_round(model, lx.train.supervised(model), optax.sgd(1.0), settings)
    >>> data = {"rows": {"x": jnp.eye(2), "label": jnp.array([0, 1])}, "count": jnp.int32(2)}
    >>> delta, n, metrics = local_round(model.weights, data, jax.random.key(0))
    >>> delta["w"].tolist(), int(n)
    ([[0.25, -0.25], [-0.25, 0.25]], 2)
    """
    for name in ("arrays", "prepare", "extra_weights"):
        if getattr(loss, name, None):
            raise FederatedError(f"the loss has {name!r}, which clients do not have; give a loss of the batch alone")
    try:
        counts_steps = "step" in inspect.signature(loss).parameters
    except (TypeError, ValueError):  # a builtin
        counts_steps = False
    privacy = settings.privacy
    if privacy is not None and model.state:
        raise FederatedError(
            f"privacy: calls of the model write {next(iter(model.state))!r}, such as the statistics of a batch, which "
            "would leave the client without noise; use a model without batch statistics, such as with layer norms"
        )

    def value_of(weights: Any, batch: Any, key: Any, state: Any, step: Any) -> Any:
        more = {"step": step} if counts_steps else {}
        value, metrics, after = loss(weights, batch, key, state, **more)
        after = {path: leaf.astype(state[path].dtype) for path, leaf in after.items()}
        return value.astype(jnp.float32), ({**metrics, "loss": value}, after)

    gradient = jax.grad(value_of, has_aux=True)

    def plain(weights: Any, state: Any, data: Any, key: Any, index: Any) -> Any:
        rows = _batch(data, key, index, settings.batch_rows)
        grads, (metrics, after) = gradient(weights, rows, jax.random.fold_in(key, 2 * index), state, index)
        return grads, after, {name: leaf.astype(jnp.float32) for name, leaf in metrics.items()}

    def private(weights: Any, state: Any, data: Any, key: Any, index: Any) -> Any:
        assert privacy is not None
        grads = _private_gradient(gradient, privacy, noise, weights, state, data, key, index)
        return grads, state, {}

    step_gradient = plain if privacy is None else private

    def local_round(weights: Any, data: Any, key: Any) -> tuple[Any, Any, Any]:
        begin = {path: weights[path] for path in model.weights}
        state = {path: weights[path] for path in model.state}
        count = data["count"]
        size = jnp.int32(settings.batch_rows)
        steps = (settings.epochs * count + size - 1) // size if privacy is None else _private_steps(settings, count)

        def step(index: Any, carry: Any) -> Any:
            now, state, moments, sums = carry
            grads, state, metrics = step_gradient(now, state, data, key, index)
            if settings.proximal:
                pull = lambda grad, leaf, first: grad + jnp.asarray(settings.proximal, grad.dtype) * (leaf - first)  # noqa: E731
                grads = jax.tree.map(pull, grads, now, begin)
            updates, moments = optimizer.update(grads, moments, now)
            return optax.apply_updates(now, updates), state, moments, jax.tree.map(jnp.add, sums, metrics)

        shapes = jax.eval_shape(step_gradient, begin, state, data, key, jnp.int32(0))[2]
        zeros = jax.tree.map(lambda leaf: jnp.zeros((), jnp.float32), shapes)
        first = (begin, state, optimizer.init(begin), zeros)
        after, written, _, sums = lax.fori_loop(0, steps, step, first)
        ended = {**after, **written}
        delta = {path: ended[path].astype(jnp.float32) - weights[path].astype(jnp.float32) for path in moving(ended)}
        divisor = jnp.maximum(steps, 1).astype(jnp.float32)
        return delta, count, jax.tree.map(lambda total: total / divisor, sums)

    return local_round


def moving(weights: Mapping[str, Any]) -> list[str]:
    """Paths of the weights that are averaged: floats. Others, such as counters, stay as the server has them.

    >>> moving({"w": jnp.ones(2), "count": jnp.int32(1)})
    ['w']
    """
    return sorted(path for path, leaf in weights.items() if jnp.issubdtype(leaf.dtype, jnp.floating))


def private_steps(settings: Federation) -> int:
    """Steps of a client in a round with privacy: as many as take each row `epochs` times on average.

    >>> private_steps(lx.federated.Federation(epochs=2, privacy=lx.federated.Privacy(share=0.1)))
    20
    """
    assert settings.privacy is not None
    return max(1, round(settings.epochs / settings.privacy.share))


def _private_steps(settings: Federation, count: jax.Array) -> jax.Array:
    return jnp.where(count > 0, jnp.int32(private_steps(settings)), jnp.int32(0))


def _batch(data: Any, key: Any, index: Any, size: int) -> Any:
    """The rows of a step: places in the order of its epoch."""
    count = jnp.maximum(data["count"], 1)
    start = index * size
    order = _order(jax.random.fold_in(key, 2 * (start // count) + 1), data)
    places = order[(start + jnp.arange(size, dtype=jnp.int32)) % count]
    return {name: jnp.asarray(column)[places] for name, column in data["rows"].items()}


def _draws(key: Any, data: Any) -> jax.Array:
    """A number in [0, 1) for each row, which does not depend on how many rows of padding follow."""
    capacity = next(iter(data["rows"].values())).shape[0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(capacity))
    return jnp.where(jnp.arange(capacity) < data["count"], jax.vmap(jax.random.uniform)(keys), 2.0)


def _order(key: Any, data: Any) -> jax.Array:
    return jnp.argsort(_draws(key, data)).astype(jnp.int32)


def private_capacity(count: int, share: float) -> int:
    """Rows that a step can hold: eight standard deviations above the mean, which one step in 10^14 would exceed.

    >>> private_capacity(1000, 0.1), private_capacity(10, 0.5)
    (180, 10)
    """
    return min(count, math.ceil(count * share + 8 * math.sqrt(count * share)))


def _private_gradient(
    gradient: Any, privacy: Privacy, noise: float, weights: Any, state: Any, data: Any, key: Any, index: Any
) -> Any:
    """The sum of clipped gradients of rows that were drawn by chance, plus noise, over the expected number of rows."""
    draws = _draws(jax.random.fold_in(key, 2 * index + 1), data)
    chosen = jnp.argsort(draws)[: private_capacity(draws.shape[0], privacy.share)]
    taken = draws[chosen] < privacy.share
    batch = {name: jnp.asarray(column)[chosen][:, None] for name, column in data["rows"].items()}
    step_key = jax.random.fold_in(key, 2 * index)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, chosen)
    each, _ = jax.vmap(gradient, (None, 0, 0, None, None))(weights, batch, keys, state, index)
    norms = jax.vmap(optax.tree.norm)(each)
    # One row with a gradient that is not finite would otherwise show in the sum; it counts as zero.
    good = taken & jnp.isfinite(norms)
    factors = jnp.where(good, jnp.minimum(1.0, privacy.clip_norm / jnp.maximum(norms, 1e-30)), 0.0)
    leaves, tree = jax.tree.flatten(each)
    expected = privacy.share * jnp.maximum(data["count"], 1).astype(jnp.float32)
    sums: list[jax.Array] = []
    for number, leaf in enumerate(leaves):
        shaped = (slice(None), *(None,) * (leaf.ndim - 1))
        clean = jnp.where(good[shaped], leaf.astype(jnp.float32), 0.0)
        total = (clean * factors[shaped]).sum(0)
        drawn = jax.random.normal(jax.random.fold_in(jax.random.fold_in(step_key, 1 << 30), number), total.shape)
        sums.append(((total + noise * privacy.clip_norm * drawn) / expected).astype(leaf.dtype))
    return jax.tree.unflatten(tree, sums)
