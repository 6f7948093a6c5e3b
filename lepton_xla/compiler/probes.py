"""Test inputs for the checks of a model: the user's examples, or valid random values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.program import TensorSpec

# Primitives between an index and the lookup in a table: layout changes, wrapping negative indices, clamping.
_INDEXING = frozenset({
    "add", "broadcast_in_dim", "clamp", "concatenate", "convert_element_type", "copy", "expand_dims", "pjit",
    "reshape", "select_n", "slice", "squeeze", "stop_gradient", "transpose",
})  # fmt: skip


def probe(
    inputs: Mapping[str, TensorSpec],
    sizes: Mapping[str, int],
    examples: Mapping[str, np.ndarray],
    tables: Mapping[str, int],
    *,
    seed: int,
    scale: float = 1.0,
    lowest: int = 0,
) -> list[np.ndarray]:
    """Make values for every input.

    Args:
        inputs: the model's.
        sizes: sizes of the symbolic dimensions.
        examples: the user's examples, by name, repeated or truncated to size; other inputs are random.
        tables: rows of the smallest table that an input indexes, by name. Such an input gets values from 1 on, because
            0 often means padding.
        seed: seed of the random numbers; it also selects the first row of the examples.
        scale: factor of floats.
        lowest: smallest value of integers that index no table; the largest is 1, so that they are valid as a mask.
    """
    random = np.random.default_rng(seed)
    arrays: list[np.ndarray] = []
    for name, spec in inputs.items():
        shape, dtype = spec.at(sizes).shape, jnp.dtype(spec.dtype)
        if name in examples:
            array = _resize(np.asarray(examples[name]), shape, seed)
        elif dtype == np.dtype(bool) or jnp.issubdtype(dtype, jnp.integer):
            high = 2 if dtype == np.dtype(bool) else min(tables.get(name, 2), int(jnp.iinfo(dtype).max) + 1)
            low = min(1 if name in tables else lowest, high - 1)
            array = random.integers(low, high, shape)
        else:
            array = random.standard_normal(shape)
        if jnp.issubdtype(dtype, jnp.floating):
            array = array * scale
        arrays.append(np.asarray(array, order="C").astype(dtype))
    return arrays


def table_sizes(jaxpr: Any, inputs: Sequence[str]) -> dict[str, int]:
    """Rows of the smallest table that each input indexes, by name; inputs that index no table are omitted.

    Args:
        jaxpr: the jaxpr of the model; the inputs are its last variables.
        inputs: their names.

    >>> jaxpr = jax.make_jaxpr(lambda table, ids: table[ids])(jnp.ones((10, 2)), jnp.array([1, 2]))
    >>> table_sizes(jaxpr, ["table", "ids"])
    {'ids': 10}
    """
    found: dict[str, int] = {}
    opened, _ = _compat.open_jaxpr(jaxpr)
    last = opened.invars[len(opened.invars) - len(inputs) :]
    _follow(opened, dict(zip(last, ({name} for name in inputs), strict=True)), found)
    return found


def _follow(jaxpr: Any, carried: dict[Any, set[str]], found: dict[str, int]) -> list[set[str]]:
    """Follow inputs to the tables that they index; return the inputs that each output of the jaxpr still is."""
    read = lambda atom: set[str]() if isinstance(atom, _compat.LITERAL) else carried.get(atom, set())  # noqa: E731
    for eqn in jaxpr.eqns:
        names = [read(atom) for atom in eqn.invars]
        if not any(names):
            continue
        inner = [_compat.open_jaxpr(each)[0] for each in _compat.inner_jaxprs(eqn)]
        outs = [set[str]() for _ in eqn.outvars]
        if len(inner) == 1 and len(inner[0].invars) == len(eqn.invars):  # jit, remat, scan, custom derivatives
            given = _follow(inner[0], dict(zip(inner[0].invars, names, strict=True)), found)
            outs = given if len(given) == len(outs) else outs
        elif eqn.primitive.name == "gather":
            rows = eqn.invars[0].aval.shape[min(eqn.params["dimension_numbers"].start_index_map, default=0)]
            for name in names[1]:
                found[name] = min(rows, found.get(name, rows))
        elif eqn.primitive.name in _INDEXING:
            outs = [set[str]().union(*names)]
        carried.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _resize(array: np.ndarray, shape: Sequence[int], seed: int) -> np.ndarray:
    """Repeat or truncates an example to a shape; the seed selects the first row."""
    array = np.roll(array, -seed, axis=0) if array.ndim else array
    for axis, size in enumerate(shape):
        array = np.take(array, np.arange(size) % max(array.shape[axis], 1), axis=axis)
    return array
