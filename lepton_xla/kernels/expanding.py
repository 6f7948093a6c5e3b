"""A convolution of one position and the depthwise one behind it, so that the wide image between them is not written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.kernels import convolution, installation
from lepton_xla.kernels.convolution import Epilogue, Geometry


def expand(
    x: jax.Array,
    widening: tuple[jax.Array, jax.Array, Epilogue],
    filters: tuple[jax.Array, jax.Array, Epilogue],
    geometry: Geometry,
) -> jax.Array:
    """Compute for each pixel as many channels as the first weight has columns, and convolve each with its own filter.

    Args:
        x: float32 [N, H, W, C], with at least one channel.
        widening: the weight of the first convolution, float32 [1, 1, C, O], its bias, float32 [O] or [0], and what
            follows.
        filters: likewise of the second one, [h, w, 1, O].
        geometry: where the windows of the second one lie; h and w are its window.

    Returns:
        float32 [N, H', W', O].

    >>> none, plain = jnp.zeros(0), Epilogue()
    >>> both = (jnp.ones((1, 1, 1, 1)) * 2, none, plain), (jnp.ones((2, 2, 1, 1)), none, plain)
    >>> expand(jnp.ones((1, 3, 3, 1)), *both, Geometry((2, 2)))[0, :, :, 0].tolist()
    [[8.0, 8.0], [8.0, 8.0]]
    """
    (weight, bias, before), (window, second, after) = widening, filters
    return PRIMITIVE.bind(x, weight, bias, window, second, geometry=geometry, before=before, after=after)


def _shape(x: Any, *operands: Any, geometry: Geometry, **_: Any) -> tuple[tuple[Any, ...], Any]:
    return convolution.shape(x, operands[2], geometry=geometry)


def _by_xla(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    window: jax.Array,
    second: jax.Array,
    *,
    geometry: Geometry,
    before: Epilogue,
    after: Epilogue,
) -> jax.Array:
    """The same in XLA's own operations."""
    none = jnp.zeros(0, jnp.float32)
    wide = convolution.by_xla(x, weight, none, bias, none, geometry=Geometry((1, 1)), epilogue=before)
    return convolution.by_xla(wide, window, none, second, none, geometry=geometry, epilogue=after)


def _call(
    *operands: Any, geometry: Geometry, before: Epilogue, after: Epilogue
) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    if not installation.usable():
        return None
    first = {f"expand_{name}": value for name, value in before.attributes().items()}
    return f"{installation.PREFIX}expanding", operands, {"geometry": geometry.numbers(), **first, **after.attributes()}


PRIMITIVE = _compat.row_primitive("expanding", _shape, _by_xla, _call)
