"""Flax modules in training mode as pure functions: dropout draws, and batch norms update their statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lepton_xla.adapters.modules import method_of, mode_arguments
from lepton_xla.environment.extras import Needs
from lepton_xla.errors import ModelError
from lepton_xla.trees import name_leaves

type Apply = Callable[..., tuple[Any, dict[str, jax.Array]]]
"""`apply(weights, state, key, *inputs) -> (outputs, new state)`; weights and state are flat dicts by path."""


def linen_training(
    module: Any, variables: Mapping[str, Any], *, method: str | None, rngs: Sequence[str], kwargs: Mapping[str, Any]
) -> tuple[Apply, dict[str, jax.Array], dict[str, jax.Array]]:
    """Make the training function of a Linen module.

    Returns:
        The function, the weights (collection `params`), and the state (all other collections).

    Raises:
        ModelError: if the module lacks the method, or the variables have no `params`.
    """
    variables = dict(variables)
    static = mode_arguments(method_of(module, method or "__call__"), kwargs, training=True)
    if not variables.get("params"):
        raise ModelError(f"the variables have the collections {sorted(variables)}; 'params' is what is trained")
    named, treedef = name_leaves(variables), jax.tree.structure(variables)
    weights = {path: leaf for path, leaf in named.items() if path.startswith("params/")}
    state = {path: leaf for path, leaf in named.items() if path not in weights}
    written = [name for name in variables if name != "params"]

    def apply(weights: Any, state: Any, key: Any, *inputs: Any) -> tuple[Any, dict[str, jax.Array]]:
        tree = jax.tree.unflatten(treedef, [weights[path] if path in weights else state[path] for path in named])
        keys = {name: jax.random.fold_in(key, index) for index, name in enumerate(rngs)}
        outputs, after = module.apply(tree, *inputs, method=method, mutable=written, rngs=keys, **static)
        found = name_leaves(dict(after))
        return outputs, {path: found[path] for path in state}

    return apply, weights, state


def nnx_training(
    module: Any, *, method: str | None, kwargs: Mapping[str, Any]
) -> tuple[Apply, dict[str, jax.Array], dict[str, jax.Array]]:
    """Make the training function of an NNX module.

    Returns:
        The function, the weights (`nnx.Param`), and the state (all other variables but random streams).

    Raises:
        ModelError: if it is no NNX module, lacks the method, or has no parameters.
    """
    with Needs("flax", "a Flax module"):
        from flax import nnx

    if not isinstance(module, nnx.Module):
        raise ModelError(f"expected a flax.nnx.Module, not a {type(module).__name__}")
    name = method or "__call__"
    method_of(module, name)
    training = nnx.clone(module)
    training.train()
    graph, trained, random, others = nnx.split(training, nnx.Param, nnx.RngState, ...)
    pure = [nnx.to_pure_dict(part) for part in (trained, others)]
    weights, state = map(name_leaves, pure)
    if not weights:
        raise ModelError(f"a {type(module).__name__} has no nnx.Param; that is what is trained")
    trees = [jax.tree.structure(part) for part in pure]

    def apply(weights: Any, state: Any, key: Any, *inputs: Any) -> tuple[Any, dict[str, jax.Array]]:
        parts = jax.tree.map(lambda leaf: leaf, (trained, others, random))
        for part, tree, given, names in zip(parts, trees, (weights, state), (named, stateful), strict=False):
            nnx.replace_by_pure_dict(part, jax.tree.unflatten(tree, [given[path] for path in names]))
        nnx.replace_by_pure_dict(parts[2], _drawn(nnx.to_pure_dict(random), key))
        called = nnx.merge(graph, parts[0], parts[2], parts[1])
        outputs = getattr(called, name)(*inputs, **kwargs)
        after = nnx.state(called, nnx.Param, nnx.RngState, nnx.Intermediate, ...)[3]
        found = name_leaves(nnx.to_pure_dict(after))
        return outputs, {path: found[path] for path in state}

    named, stateful = list(weights), list(state)
    return apply, weights, state


def _drawn(streams: Any, key: jax.Array) -> Any:
    """Random streams that start anew from a key: each stream has a key of its own, and counts from its given count."""
    leaves, tree = jax.tree.flatten(streams)

    def drawn(index: int, leaf: jax.Array) -> jax.Array:
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        own = jax.random.fold_in(key, index)
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    return jax.tree.unflatten(tree, [drawn(index, leaf) for index, leaf in enumerate(leaves)])
