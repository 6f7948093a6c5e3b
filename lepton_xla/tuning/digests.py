"""Digests that tell what a journal, a study or a certificate is of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat

# Addresses in the text of functions, which differ between processes.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|\bid=\d+")


def digest_of(batches: Iterable[Mapping[str, Any]], *, before: str = "", after: str = "") -> str:
    """SHA-256 of arrays: of their names, dtypes, shapes and elements, in order.

    Args:
        batches: arrays by name.
        before, after: text that is in the digest too.

    >>> digest_of([{"x": np.zeros(2)}]) == digest_of([{"x": np.zeros((2, 1))}])
    False
    """
    found = hashlib.sha256(before.encode())
    for batch in batches:
        for name, value in batch.items():
            array = np.asarray(value)
            found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    found.update(after.encode())
    return found.hexdigest()


def digest_of_function(fn: Callable[..., Any], *args: Any) -> str:
    """SHA-256 of what a function computes: of its jaxpr, and of the arrays that it closes over.

    Args:
        fn: a function that JAX can trace.
        args: its arguments; of arrays only shapes and dtypes count.

    >>> like = jax.ShapeDtypeStruct((2,), "float32")
    >>> doubled = digest_of_function(lambda x: 2 * x, like)
    >>> digest_of_function(lambda y: 2 * y, like) == doubled, digest_of_function(lambda x: 3 * x, like) == doubled
    (True, False)
    >>> by = lambda table: digest_of_function(lambda x: jax.jit(lambda x: x * table)(x), like)  # at any depth
    >>> ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
    >>> by(ones) == by(ones.copy()), by(ones) == by(zeros)
    (True, False)
    """
    closed = jax.make_jaxpr(fn)(*args)
    consts = {str(index): _as_array(each) for index, each in enumerate(_constants(closed))}
    return digest_of([consts], before=_ADDRESS.sub("", str(closed)))


def _constants(jaxpr: Any) -> Iterator[Any]:
    """What a jaxpr and those within it close over."""
    within, consts = _compat.open_jaxpr(jaxpr)
    yield from consts
    for eqn in within.eqns:
        for inner in _compat.inner_jaxprs(eqn):
            yield from _constants(inner)


def _as_array(value: Any) -> Any:
    """The elements of an array, those of random keys too."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(value)
    return value
