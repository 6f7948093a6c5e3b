"""From one task to another: weights that stay as they are, and low-rank weights that are trained beside them.

What stays is a model's state that no call changes, so it has neither gradients nor moments of an optimizer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.arguments import takes
from lepton_xla.errors import ModelError
from lepton_xla.passes.core.sites import find_sites
from lepton_xla.program import Program
from lepton_xla.train.models import Model
from lepton_xla.trees import some_names

LEFT, RIGHT = ":low_rank/left", ":low_rank/right"


def freeze(model: Model | Program, patterns: Sequence[str]) -> Model:
    """Keep weights as they are while a model is trained.

    Args:
        model: the model.
        patterns: regular expressions, each for the whole path of a weight.

    Returns:
        The model with these weights in its state.

    Raises:
        ModelError: if a pattern matches no weight, or nothing is left to train.

    >>> program = lx.trace(lambda w, x: x @ w["a"] @ w["b"], {"a": jnp.eye(2), "b": jnp.eye(2)}, {
    ...     "x": lx.TensorSpec(("batch", 2), "float32")
    ... })
    >>> model = lx.train.freeze(program, ["a"])
    >>> list(model.weights), list(model.state)
    (['b'], ['a'])
    """
    model = Model.of(model)
    frozen = _matching(model.weights, patterns)
    if len(frozen) == len(model.weights):
        raise ModelError("all weights are frozen: nothing is left to train")
    return _parted(model, [path for path in model.weights if path not in frozen])


def low_rank(
    model: Model | Program,
    rank: int,
    *,
    include: Sequence[str] = (".*",),
    also_train: Sequence[str] = (),
    alpha: float | None = None,
    key: jax.Array | None = None,
) -> Model:
    """Train low-rank weights beside the weights of sites, which stay as they are: `w + alpha / rank * left @ right`.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. A weight is the
    matrix `[K, N]` of its last axis by all others; each layer of a stacked weight has its own.

    Args:
        model: any model or program.
        rank: of what is added.
        include: regular expressions for the paths of weights that get it; those that no site uses are left out.
        also_train: of weights that are trained as they are, such as those of the last layer.
        alpha: by default the rank.
        key: of the first values of `left`; `right` begins with zeros, so the function is at first the same.

    Returns:
        A model whose weights are the low-rank ones and those of `also_train`. `merge` adds them up.

    Raises:
        ModelError: if a pattern matches no weight, or the rank is not smaller than a weight's.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> model = lx.train.low_rank(program, 1)
    >>> {path: weight.shape for path, weight in model.weights.items()}
    {'w:low_rank/left': (4, 1), 'w:low_rank/right': (1, 4)}
    """
    model = Model.of(model)
    sites = {site.path: site for site in find_sites(model.program) if site.path in model.weights}
    beside, whole = _matching(model.weights, include), _matching(model.weights, also_train)
    chosen = [path for path in sites if path in beside - whole]
    if not chosen:
        raise ModelError(f"no site has a weight among {', '.join(include)}; those of sites are {some_names(sites)}")
    if rank < 1:
        raise ModelError(f"rank {rank} is not at least 1")
    scale = scale_of(rank, alpha)
    keys = jax.random.split(key if key is not None else jax.random.key(0), len(chosen))
    added: dict[str, jax.Array] = {}
    for path, one in zip(chosen, keys, strict=True):
        weight = model.weights[path]
        *layers, rows, columns = _matrix(weight.shape, sites[path].stacked)
        if rank >= min(rows, columns):
            raise ModelError(f"weight {path!r} is a matrix of {rows} x {columns}: rank {rank} is not smaller")
        left = jax.random.normal(one, (*layers, rows, rank), weight.dtype)
        added[path + LEFT] = left / jnp.sqrt(jnp.asarray(rows, weight.dtype))
        added[path + RIGHT] = jnp.zeros((*layers, rank, columns), weight.dtype)

    def without_added(given: Mapping[str, Any]) -> dict[str, Any]:
        return {path: summed(path, given, scale) for path in given if path not in added}

    apply, fn = model.apply, model.program.fn

    def with_added(weights: Any, state: Any, key: Any, *inputs: Any) -> tuple[Any, dict[str, jax.Array]]:
        every = without_added({**weights, **state})
        own = {path: every[path] for path in model.weights}
        kept = {path: every[path] for path in model.state}
        outputs, after = apply(own, kept, key, *inputs)
        return outputs, {**state, **after}

    program = model.program.replace(
        fn=lambda weights, *inputs: fn(without_added(weights), *inputs), weights={**model.program.weights, **added}
    )  # fmt: skip
    whole_model = Model(with_added, {**model.weights, **added}, model.state, program)
    return _parted(whole_model, [*added, *whole])


@takes(trained=Program)
def merge(trained: Program, base: Model | Program, *, alpha: float | None = None) -> Program:
    """Add low-rank weights to those that they are beside: the base's function, with other weights.

    Programs that were merged from one base have the same inputs, weights and code, so one compiled artifact serves each
    of them as an update: see `lx.compiler.make_update`.

    Args:
        trained: what training a `low_rank` model gave.
        base: what `low_rank` was given.
        alpha: what `low_rank` was given.

    Raises:
        ModelError: if it is not made of that base.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> lx.train.merge(lx.train.low_rank(program, 1).program, program).weights["w"][0].tolist()
    [1.0, 0.0, 0.0, 0.0]
    """
    plain = Model.of(base).program
    missing = [path for path in plain.weights if path not in trained.weights]
    ranks = [leaf.shape[-1] for path, leaf in trained.weights.items() if path.endswith(LEFT)]
    if missing or not ranks:
        raise ModelError("this program is not what low_rank made of that base")
    scale = scale_of(ranks[0], alpha)
    return plain.replace(weights={path: summed(path, trained.weights, scale) for path in plain.weights})


def scale_of(rank: int, alpha: float | None) -> float:
    """The factor of a product of low-rank weights; 1 without `alpha`.

    >>> scale_of(4, None), scale_of(4, 8.0)
    (1.0, 2.0)
    """
    return (alpha if alpha is not None else rank) / rank


def summed(path: str, weights: Mapping[str, Any], scale: float) -> jax.Array:
    """A weight with the product of the low-rank weights beside it, if there are any."""
    weight = weights[path]
    if path + LEFT not in weights:
        return weight
    product = (weights[path + LEFT] @ weights[path + RIGHT]) * jnp.asarray(scale, weights[path + LEFT].dtype)
    return weight + product.reshape(weight.shape)


def _matrix(shape: Sequence[int], stacked: int) -> tuple[int, ...]:
    return (*shape[:stacked], math.prod(shape[stacked:-1]), shape[-1])


def _matching(weights: Mapping[str, Any], patterns: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            matching = {path for path in weights if re.fullmatch(pattern, path)}
        except re.error as error:
            raise ModelError(f"{pattern!r} is no regular expression: {error}") from error
        if not matching:
            raise ModelError(f"{pattern!r} matches no weight; the weights are {some_names(weights)}")
        found |= matching
    return found


def _parted(model: Model, trained: Sequence[str]) -> Model:
    """Move all other weights into the state."""
    apply: Callable[..., Any] = model.apply
    still = {path: leaf for path, leaf in model.weights.items() if path not in trained}
    own = list(model.state)

    def with_frozen(weights: Any, state: Any, key: Any, *inputs: Any) -> tuple[Any, dict[str, jax.Array]]:
        fixed = {path: state[path] for path in still}
        outputs, after = apply({**weights, **fixed}, {path: state[path] for path in own}, key, *inputs)
        return outputs, {**after, **fixed}

    weights = {path: leaf for path, leaf in model.weights.items() if path in trained}
    return Model(with_frozen, weights, {**model.state, **still}, model.program)
