"""Executables of one model and the weights they share: arrays of exactly a bucket's sizes in, arrays out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from lepton_xla.compiler import _xla
from lepton_xla.compiler.code import Code
from lepton_xla.errors import InputError
from lepton_xla.program import TensorSpec

type Runner = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""Inputs of one bucket's exact shapes, in order, to outputs in order."""


class Runtime:
    """Runs compiled code; safe to use from several threads.

    Args:
        inputs: the model's inputs, in call order.
        weights: device arrays, in argument order.
        device: where everything is.

    Attributes:
        weights: may be replaced as a whole by a list of equal shapes and dtypes, between two runs; a run that has begun
            keeps the list it began with.
    """

    def __init__(self, inputs: Mapping[str, TensorSpec], weights: Sequence[jax.Array], device: _xla.Device) -> None:
        self.weights = list(weights)
        self._inputs = dict(inputs)
        self._symbols = tuple(dict.fromkeys(name for spec in inputs.values() for name in spec.symbols))
        self._device = device
        self._runners: dict[tuple[int, ...], Runner] = {}

    def add(self, sizes: Mapping[str, int], executable: _xla.Loaded) -> None:
        """Makes a bucket known."""
        slots = []
        for name, spec in self._inputs.items():
            at = spec.at(sizes)
            slots.append((name, at.shape, at.dtype, _xla.putter(at.shape, at.dtype, self._device)))
        self._runners[self._key(sizes)] = functools.partial(self._execute, slots, _xla.executor(executable))

    def runner(self, sizes: Mapping[str, int]) -> Runner:
        """The function that runs one bucket; for a caller that keeps it and saves the look-up.

        Raises:
            KeyError: where there is no such bucket.
        """
        return self._runners[self._key(sizes)]

    def run(self, sizes: Mapping[str, int], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs one bucket on arrays of exactly its shapes and dtypes, in order; returns outputs in order, read-only.

        The input arrays must not be written to by another thread during the call.

        Raises:
            KeyError: where there is no such bucket.
            InputError: where an array is not of exactly the bucket's shape and dtype.
            ExecutionError: where the code fails, such as for want of memory.
        """
        return self._runners[self._key(sizes)](arrays)

    def _key(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple([sizes[name] for name in self._symbols])

    def _execute(
        self,
        slots: Sequence[tuple[str, tuple[int, ...], np.dtype, Callable[[np.ndarray], jax.Array]]],
        execute: Callable[[list[jax.Array]], list[jax.Array]],
        arrays: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        arguments = list(self.weights)
        for (name, shape, dtype, put), array in zip(slots, arrays, strict=True):
            # XLA trusts the sizes it is told, so a wrong one would read memory that is not the array's.
            if array.shape != shape or array.dtype != dtype:
                raise InputError(f"input {name!r}: {array.dtype}{array.shape} came, {dtype}{shape} was expected")
            arguments.append(put(array))
        try:
            return [np.asarray(output) for output in execute(arguments)]
        except _xla.ERROR as error:
            raise _xla.failed(error) from error


def run_expand(code: Code, stored: Sequence[jax.Array]) -> list[jax.Array]:
    """Weights as the buckets' programs take them, from those that are stored.

    Raises:
        ExecutionError: where the code fails, such as for want of memory.
    """
    try:
        return jax.block_until_ready(_xla.executor(code.loaded)(list(stored)))
    except _xla.ERROR as error:
        raise _xla.failed(error, "the unpacking of the weights") from error
