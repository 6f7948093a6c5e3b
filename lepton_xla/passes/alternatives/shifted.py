"""Grouped convolutions with few input channels per group, such as depthwise ones, as shifted multiply-adds.

XLA:CPU has no kernel for them. For depthwise ones its generic loop takes 15 to 50 times as long as these multiply-adds,
which it fuses into one vectorized loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Each weight of an output channel becomes a term, and compile time grows with the number of terms.
MAX_TERMS = 128


def fits(eqn: Any) -> bool:
    """Whether `convolve` can compute an equation: a grouped convolution of real numbers with few terms per sum."""
    if eqn.primitive.name != "conv_general_dilated":
        return False
    params, (image, window) = eqn.params, (var.aval for var in eqn.invars)
    return (
        params["feature_group_count"] != 1
        and params["batch_group_count"] == 1
        and all(isinstance(size, int) for size in window.shape)
        and 1 <= math.prod(window.shape[axis] for axis in params["dimension_numbers"].rhs_spec[1:]) <= MAX_TERMS
        and not any(jnp.issubdtype(operand.dtype, jnp.complexfloating) for operand in (image, window))
        and 0 not in eqn.outvars[0].aval.shape
    )


def convolve(
    params: Mapping[str, Any], image: jax.Array, window: jax.Array, dtype: Any, *, channels_last: bool = False
) -> jax.Array:
    """Compute a convolution that `fits`, as a sum over the positions k of its window and the I input channels of a
    group.

    `out[n, p, g * M + m] = sum_ki padded[n, stride * p + dilation * k, g * I + i] * window[k, i, g * M + m]`, where M
    is the number of output channels per group. Sums of 16-bit floats are float32, those of integers at least int32.

    Args:
        params: parameters of the `conv_general_dilated`.
        image: its left operand.
        window: its right operand.
        dtype: dtype of the result.
        channels_last: whether to move the channels to the last axis first.
    """
    numbers, groups, wide = params["dimension_numbers"], params["feature_group_count"], _accumulator(jnp.dtype(dtype))
    batch, channel, *spatial = numbers.lhs_spec
    if channels_last:
        image = jnp.transpose(image, (batch, *spatial, channel))
        batch, channel, *spatial = 0, image.ndim - 1, *range(1, image.ndim - 1)
    config = [(0, 0, 0)] * image.ndim
    for axis, (low, high), dilation in zip(spatial, params["padding"], params["lhs_dilation"], strict=True):
        config[axis] = (low, high, dilation - 1)
    padded = lax.pad(image, np.zeros((), image.dtype), config)
    outputs, inputs, *positions = numbers.rhs_spec
    filters = jnp.transpose(window, (*positions, inputs, outputs)).astype(wide)
    *sizes, depth, count = filters.shape
    # If a group has several channels, they get an axis of their own, after that of the groups.
    several = (depth, count) != (1, groups)
    shape = [1] * image.ndim
    shape[channel : channel + 1] = [groups, count // groups] if several else [groups]
    total = None
    for *position, index in itertools.product(*map(range, (*sizes, depth))):
        part = padded
        steps = zip(spatial, position, sizes, params["rhs_dilation"], params["window_strides"], strict=True)
        for axis, offset, size, dilation, stride in steps:
            end = part.shape[axis] - dilation * (size - 1 - offset)
            part = lax.slice_in_dim(part, dilation * offset, end, stride, axis)
        part = lax.slice_in_dim(part, index, None, depth, channel).astype(wide)
        part = jnp.expand_dims(part, channel + 1) if several else part
        term = part * filters[(*position, index)].reshape(shape)
        total = term if total is None else total + term
    assert total is not None
    if several:
        total = total.reshape(*total.shape[:channel], count, *total.shape[channel + 2 :])
    here = (batch, channel, *spatial)
    order = [here[numbers.out_spec.index(axis)] for axis in range(total.ndim)]
    return jnp.transpose(total.astype(dtype), order)


def has_channels_last(eqn: Any) -> bool:
    """Whether the left operand of a convolution has its channels last."""
    spec = eqn.params["dimension_numbers"].lhs_spec
    return spec[1] == len(spec) - 1


def _accumulator(dtype: Any) -> Any:
    """The dtype of sums; integers wrap around as they would in the narrower result dtype."""
    if dtype.itemsize >= 4:
        return dtype
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.float32
    return jnp.uint32 if jnp.issubdtype(dtype, jnp.unsignedinteger) else jnp.int32
