"""Finds the state that a call of a stateful module writes; programs are pure functions and keep no state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lepton_xla import _compat


def written(fn: Callable[..., Any], state: Mapping[str, Any], *inputs: Any) -> tuple[list[str], list[str]]:
    """Names of the state that a call changes, in two lists: all, and those that the outputs also depend on.

    Args:
        fn: `fn(state, *inputs) -> outputs, state afterwards`; both states are flat dicts.
        state: shapes of the state, by name.
        inputs: shapes of the inputs.

    Returns:
        State that is new or comes out as another value than it went in; and the part of it that the outputs read. A
        value that only passes through a `jit` or `checkpoint` has not changed.
    """
    closed, (outputs, after) = jax.make_jaxpr(fn, return_shape=True)(state, *inputs)
    jaxpr, _ = _compat.open_jaxpr(closed)
    count = len(jax.tree.leaves(outputs))
    # State comes first in the inputs and last in the outputs, in the order in which JAX flattens a dict: by key.
    place = {name: index for index, name in enumerate(sorted(state))}
    origins = _compat.handed_through(jaxpr)[count:]
    changed = [name for name, origin in zip(sorted(after), origins, strict=True) if origin != place.get(name, -1)]
    read = _compat.inputs_read(jaxpr, [index < count for index in range(len(jaxpr.outvars))])
    return changed, [name for name in changed if name in place and read[place[name]]]
