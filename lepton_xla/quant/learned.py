"""Rounding for training: with learned scales (LSQ), and stochastic."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla.errors import ModelError, UnsupportedError
from lepton_xla.quant.formats import Format
from lepton_xla.quant.grid import as_blocks, decode, group_size, settle
from lepton_xla.quant.qtensor import straight_through

# Prefix of the names of parts that are given as logarithms to base 2.
LOG2 = "log2_"
SCALE_PARTS = ("scale", "zero_point", "codebook", "activation", LOG2 + "scale", LOG2 + "activation")


def initial_scale(matrix: jax.Array, target: Format, granularity: str) -> jax.Array:
    """Initial value of a learned step size: 2 mean(|w|) / sqrt(largest code) (LSQ, arXiv:1902.08153, section 2.1).

    Args:
        matrix: float [..., K, N].
        target: an integer format.
        granularity: `channel`, `tensor` or `group:g`.

    Returns:
        float32 [..., G, N] or [..., 1, 1], 1 where all weights are zero.

    >>> from lepton_xla.quant import FORMATS
    >>> round(float(initial_scale(jnp.ones((4, 1)), FORMATS["int8"], "channel")[0, 0]) * 127**0.5, 4)
    2.0
    """
    size = group_size(granularity)
    blocks = as_blocks(jnp.abs(matrix.astype(jnp.float32)), matrix.shape[-2] // size if size else 1)
    axes = (-3, -2, -1) if granularity == "tensor" else (-2,)
    scale = jnp.mean(blocks, axes, keepdims=True)[..., :, 0, :] * np.float32(2 / math.sqrt(_largest(target)))
    return jnp.where(scale == 0, jnp.float32(1), settle(scale, "tensor"))


def raw_scales(scales: Mapping[str, Mapping[str, jax.Array]] | None) -> dict[str, dict[str, jax.Array]]:
    """Convert scales that are given as logarithms to plain scales.

    Args:
        scales: name -> part -> array. A part named `log2_x` is the logarithm, to base 2, of the part `x`.

    Returns:
        The scales without logarithms; empty for None.

    Raises:
        ModelError: if a part is unknown, or is given both plainly and as a logarithm.

    >>> {part: float(array) for part, array in raw_scales({"w": {"log2_scale": jnp.float32(-2)}})["w"].items()}
    {'scale': 0.25}
    """
    raw: dict[str, dict[str, jax.Array]] = {}
    for name, parts in (scales or {}).items():
        for part, array in parts.items():
            plain = part.removeprefix(LOG2)
            if part not in SCALE_PARTS:
                raise ModelError(f"scales are given for {name!r} as {part!r}; parts are {', '.join(SCALE_PARTS)}")
            if plain in raw.setdefault(name, {}):
                raise ModelError(f"scales are given for {name!r} both as {plain!r} and as its logarithm; drop one")
            raw[name][plain] = array if part == plain else jnp.exp2(array)
    return raw


def learned_quantize(
    array: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    target: Format,
    shared: int,
    zero_point: jax.Array | None = None,
) -> jax.Array:
    """Dequantize codes with a gradient for the scale (Learned Step Size Quantization, arXiv:1902.08153).

    Args:
        array: float, any shape.
        codes: `encode(array, scale, target, zero_point)`.
        scale: float32, broadcastable to `array`.
        target: an integer or affine format.
        shared: number of elements that share a scale. Its gradient is multiplied by 1 / sqrt(shared * largest code),
            which balances its steps with those of the weights (section 2.2).
        zero_point: broadcastable to `array`, for affine formats.

    Returns:
        Exactly the values of `decode`, in the array's dtype.

    >>> from lepton_xla.quant import FORMATS, encode
    >>> int4, w = FORMATS["int4"], jnp.array([0.4, 1.7])
    >>> value = lambda scale: learned_quantize(w, encode(w, scale, int4), scale, int4, shared=2).sum()
    >>> [round(float(x), 3) for x in jax.value_and_grad(value)(jnp.float32(1))]
    [2.0, -0.027]
    """
    factor = np.float32(1 / math.sqrt(max(shared, 1) * _largest(target)))
    fixed = lax.stop_gradient(scale)
    zero = jnp.float32(0) if zero_point is None else lax.stop_gradient(zero_point.astype(jnp.float32))
    exact = array.astype(jnp.float32)
    position = lax.stop_gradient(exact) / fixed
    within = (position >= target.lowest - zero) & (position <= target.largest - zero)
    # The gradient of the step is the rounding error inside the range, and the last code where a value saturates.
    error = codes.astype(jnp.float32) - zero - jnp.where(within, position, jnp.zeros_like(position))
    moving = error * (scale * factor)
    value = straight_through(exact, decode(codes, fixed, target, zero_point), within)
    return (value + (moving - lax.stop_gradient(moving))).astype(array.dtype)


def stochastic_quantize(
    array: jax.Array, scale: jax.Array, target: Format, key: jax.Array, zero_point: jax.Array | None = None
) -> jax.Array:
    """Round stochastically: the mean over keys is the value itself (Gupta 2015, arXiv:1502.02551).

    Args:
        array: float, any shape. Zeros and values that are on a code stay unchanged.
        scale: float32, broadcastable to `array`.
        target: an integer or affine format.
        key: a `jax.random` key.
        zero_point: broadcastable to `array`, for affine formats.

    Returns:
        The rounded values in the array's dtype; the gradient passes straight through.

    >>> from lepton_xla.quant import FORMATS
    >>> values, key = np.full(1000, 0.25, np.float32), jax.random.key(0)
    >>> rounded = np.asarray(stochastic_quantize(values, np.float32(1), FORMATS["int8"], key))
    >>> np.unique(rounded).tolist(), bool(0.2 < rounded.mean() < 0.3)
    ([0.0, 1.0], True)
    """
    lowest, largest = target.lowest, _largest(target)
    scale = lax.stop_gradient(scale)
    exact = array.astype(jnp.float32)
    zero = jnp.float32(0) if zero_point is None else zero_point.astype(jnp.float32)
    codes = jnp.floor(exact / scale + jax.random.uniform(key, array.shape, jnp.float32)) + zero
    codes = jnp.clip(codes, lowest, largest)
    rounded = decode(codes, scale, target, zero_point)
    within = (codes > lowest) & (codes < largest)
    near = jnp.abs(exact - rounded) <= jnp.abs(scale) * 1.0001
    return straight_through(exact, rounded, within | near).astype(array.dtype)


def _largest(target: Format) -> float:
    if target.kind not in ("int", "affine"):
        raise UnsupportedError(
            f"{target.name} has no uniform step; learned scales and stochastic rounding need an integer format"
        )
    return target.largest
