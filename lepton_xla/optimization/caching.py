"""Has the cache of a model that generates stored in int8."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.errors import RecipeError, UnsupportedError
from lepton_xla.program import Program
from lepton_xla.report import PassReport
from lepton_xla.trees import name_leaves


def store_cache(program: Program, length: int) -> Program:
    """Have `compile` store the cache of a program in int8, after a check that a step writes its position alone.

    Args:
        program: what `Generator` made.
        length: a length of prompts at which it can be traced.

    Raises:
        RecipeError: if the program does not generate.
        UnsupportedError: if `decode` writes other positions too, or no array of the cache has positions.
    """
    started, generation = time.perf_counter(), program.generation
    if generation is None:
        raise RecipeError("the recipe has cache = 'int8', and this program has no cache: it is not of a Generator")
    if all(axis is None for axis in generation.position_axes):
        raise UnsupportedError("cache = 'int8': no array of the cache has an axis of positions")
    _check_decode(program, length)
    kept = dataclasses.replace(generation, cache_codes="int8")
    report = PassReport("cache", time.perf_counter() - started, metrics={"cache_codes": "int8"})
    return program.replace(generation=kept, history=(*program.history, report))


def _check_decode(program: Program, length: int) -> None:
    """Check, by a step on random numbers, that every array is changed at the position of the step only."""
    generation = program.generation
    assert generation is not None
    random, slots = np.random.default_rng(0), generation.slots
    place = generation.capacity // 2
    cache = [_drawn(random, spec.at({}), place) for spec in generation.cache]
    prompt, lengths = jnp.zeros((1, length), jnp.int32), jnp.ones(1, jnp.int32)
    token, position = jnp.zeros(slots, jnp.int32), jnp.full(slots, place, jnp.int32)

    def step(weights: Any, *arrays: Any) -> list[jax.Array]:
        out = name_leaves(program.fn(weights, prompt, lengths, *arrays, token, position))
        return [out[f"decode/cache/{index}"] for index in range(len(arrays))]

    after = jax.jit(step)(program.weights, *cache)
    for index, (axis, before, found) in enumerate(zip(generation.position_axes, cache, after, strict=True)):
        if axis is None or not jnp.issubdtype(before.dtype, jnp.floating):
            continue
        kept, others = (np.delete(np.asarray(array, np.float32), place, axis=axis) for array in (before, found))
        if not np.array_equal(kept, others):
            raise UnsupportedError(
                f"cache = 'int8': decode changes array {index} of the cache at other positions than its own; "
                "a cache that is rounded is written one position at a time"
            )


def _drawn(random: np.random.Generator, like: jax.ShapeDtypeStruct, place: int) -> jax.Array:
    """Random floats; integers are taken for counters, such as those of Flax's modules, which write where they stand."""
    if jnp.issubdtype(like.dtype, jnp.floating):
        return jnp.asarray(random.standard_normal(like.shape), like.dtype)
    return jnp.full(like.shape, place, like.dtype)
