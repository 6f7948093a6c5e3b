"""A cache of generation in int8: codes, and a scale for each position and head.

Each array of floats that has positions is stored as int8 codes and a float32 scale for each of its rows along the last
axis: `value = scale * code`, where the scale is the largest magnitude of the row, over 127. A step reads the codes, and
rounds what it has written: one position of each slot. So no value is rounded twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.program import Generation, TensorSpec
from lepton_xla.quant import FORMATS, absmax_scale, encode, magnitude


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """How the arrays of a cache are stored.

    Attributes:
        generation: what is known of the model.
    """

    generation: Generation

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The stored arrays: codes and scales in the place of an array that is rounded."""
        found: list[TensorSpec] = []
        for index, spec in enumerate(self.generation.cache):
            if self.rounds(index):
                found += [TensorSpec(spec.shape, "int8"), TensorSpec((*spec.shape[:-1], 1), "float32")]
            else:
                found.append(spec)
        return tuple(found)

    @property
    def axes(self) -> tuple[int, ...]:
        """Of each stored array, the axis of its slots."""
        return tuple(
            axis for index, axis in enumerate(self.generation.axes) for _ in range(2 if self.rounds(index) else 1)
        )

    def rounds(self, index: int) -> bool:
        """Whether an array is stored in codes: floats that have positions, and more than one value at each."""
        generation = self.generation
        if generation.cache_codes == "none":
            return False
        spec, position = generation.cache[index], generation.position_axes[index]
        last = len(spec.shape) - 1
        inner = position is not None and last not in (position, generation.axes[index]) and spec.shape[-1] != 1
        return inner and jnp.issubdtype(jnp.dtype(spec.dtype), jnp.floating)

    def read(self, stored: Sequence[jax.Array]) -> list[jax.Array]:
        """The arrays that the model takes."""
        left, arrays = list(stored), list[jax.Array]()
        for index, spec in enumerate(self.generation.cache):
            first = left.pop(0)
            if self.rounds(index):
                first = (first.astype(jnp.float32) * left.pop(0)).astype(spec.dtype)
            arrays.append(first)
        return arrays

    def write(self, stored: Sequence[jax.Array], arrays: Sequence[jax.Array], position: jax.Array) -> list[jax.Array]:
        """The stored arrays after a step, of which `position[slots]` was written."""
        left, after = list(stored), list[jax.Array]()
        generation = self.generation
        for index, array in enumerate(arrays):
            before = left.pop(0)
            if not self.rounds(index):
                after.append(array)
                continue
            slot, place = generation.axes[index], generation.position_axes[index]
            rows = jnp.arange(generation.slots, dtype=position.dtype)
            at = tuple({slot: rows, place: position}.get(axis, slice(None)) for axis in range(array.ndim))
            codes, scales = rounded(array[at])
            after += [before.at[at].set(codes), left.pop(0).at[at].set(scales)]
        return after

    def fill(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """The stored arrays of arrays, all of whose positions are written."""
        return [
            part for index, array in enumerate(arrays) for part in (rounded(array) if self.rounds(index) else (array,))
        ]


def rounded(values: Any) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of values along their last axis.

    >>> codes, scales = rounded(jnp.array([[1.0, -0.5], [0.0, 0.0]]))
    >>> codes.tolist(), scales.shape
    ([[127, -64], [0, 0]], (2, 1))
    """
    int8 = FORMATS["int8"]
    scales = absmax_scale(magnitude(values, (-1,)), int8)
    return encode(values, scales, int8), scales
