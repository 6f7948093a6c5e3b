"""Flax modules that decode a token at a time, as the functions of a `Generator`.

Flax counts positions once for all rows of a batch. So the module runs on one row at a time, mapped over the sequences
by `jax.vmap`: each has its own cache and position, and products still see all rows at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.adapters.metadata import linen_axes
from lepton_xla.adapters.modules import method_of, mode_arguments
from lepton_xla.environment.extras import Needs
from lepton_xla.errors import ModelError

type Steps = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]
"""`init_cache`, `prefill` and `decode` of a `Generator`."""

type _Step = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""`step(w, cache, token[], position[]) -> (logits[V], cache)` of one sequence."""


def linen_steps(module: Any, variables: Mapping[str, Any]) -> tuple[Steps, Any]:
    """The steps of a Linen module, and its weights."""
    function = method_of(module, "__call__")
    static = mode_arguments(function, {}, training=False)
    position_name = _position_name(function)
    plain, _ = linen_axes({name: tree for name, tree in dict(variables).items() if name != "cache"})

    def empty(_: Any, positions: int) -> Any:
        tokens = jnp.zeros((1, positions), jnp.int32)
        extra = {position_name: tokens} if position_name else {}
        made = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, **extra, **static))
        if "cache" not in made:
            raise ModelError(f"a {type(module).__name__} has no collection 'cache'; its attention needs decode=True")
        shapes, _ = linen_axes({"cache": made["cache"]})
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["cache"])

    def step(w: Any, cache: Any, token: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        extra = {position_name: position.reshape(1, 1)} if position_name else {}
        logits, after = module.apply({**w, "cache": cache}, token.reshape(1, 1), mutable=["cache"], **extra, **static)
        return logits[0, -1], dict(after)["cache"]

    return _steps(empty, step), plain


def nnx_steps(module: Any) -> tuple[Steps, Any]:
    """The steps of an NNX module, and its weights."""
    with Needs("flax", "a Flax module"):
        from flax import nnx

    if not isinstance(module, nnx.Module):
        raise ModelError(f"from_nnx takes a flax.nnx.Module, not a {type(module).__name__}")
    position_name = _position_name(method_of(module, "__call__"))
    inference = nnx.clone(module)
    inference.eval()

    def prepared(positions: int) -> Any:
        made = nnx.clone(inference)
        for _, part in nnx.iter_graph(made):
            if part is not made and hasattr(part, "init_cache"):
                part.init_cache((1, positions, part.in_features))
        return made

    graph, _, others, random = nnx.split(prepared(1), nnx.Cache, nnx.Not(nnx.RngState), ...)

    def empty(_: Any, positions: int) -> Any:
        state = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(prepared(positions), nnx.Cache)))
        if not jax.tree.leaves(state):
            raise ModelError(f"a {type(module).__name__} has no part with a cache (a method `init_cache`)")
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)

    def step(w: Any, cache: Any, token: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        extra = {position_name: position.reshape(1, 1)} if position_name else {}
        cached, rest, streams = jax.tree.map(lambda leaf: leaf, (nnx.state(prepared(1), nnx.Cache), others, random))
        nnx.replace_by_pure_dict(cached, cache)
        nnx.replace_by_pure_dict(rest, w)
        called = nnx.merge(graph, cached, rest, streams)
        logits = called(token.reshape(1, 1), **extra)
        return logits[0, -1], nnx.to_pure_dict(nnx.state(called, nnx.Cache))

    return _steps(empty, step), nnx.to_pure_dict(others)


def _position_name(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters
    return next((name for name in ("position", "positions") if name in parameters), "")


def _steps(empty: Callable[[Any, int], Any], step: _Step) -> Steps:
    """Make the steps of a model that decodes one token of one sequence."""

    def init_cache(w: Any, sequences: int, positions: int) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros((sequences, *leaf.shape), leaf.dtype), empty(w, positions))

    def decode(w: Any, cache: Any, token: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        return jax.vmap(step, in_axes=(None, 0, 0, 0))(w, cache, token, position)

    def prefill(w: Any, tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, Any]:
        rows, positions = tokens.shape
        cache = init_cache(w, rows, positions)
        at = jnp.zeros(rows, jnp.int32)
        logits = jnp.zeros_like(decode(w, cache, tokens[:, 0], at)[0])

        def body(carry: tuple[Any, jax.Array], column: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            before, kept = carry
            token, place = column
            made, after = decode(w, before, token, jnp.broadcast_to(place, (rows,)))
            real = place < length
            chosen = jax.tree.map(
                lambda new, old: jnp.where(real.reshape(rows, *(1 for _ in new.shape[1:])), new, old), after, before
            )
            return (chosen, jnp.where(real[:, None], made, kept)), None

        (cache, logits), _ = jax.lax.scan(body, (cache, logits), (tokens.T, jnp.arange(positions, dtype=jnp.int32)))
        return logits, cache

    return init_cache, prefill, decode
