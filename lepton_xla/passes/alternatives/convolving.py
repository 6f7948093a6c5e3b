"""Convolutions of float32 images by a kernel of this project, which XLA calls on CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.kernels import convolution
from lepton_xla.kernels.convolution import NUMBERS, Geometry


def geometry_of(params: Mapping[str, Any], image: Any, window: Any) -> Geometry | None:
    """Where the windows of a `conv_general_dilated` lie, if the kernels have it: images with their channels last.

    Args:
        params: its parameters.
        image, window: its operands, or their shapes.
    """
    numbers = params["dimension_numbers"]
    sizes = tuple(window.shape[axis] for axis in numbers.rhs_spec[2:])
    padding = tuple(tuple(pair) for pair in params["padding"])
    known = (*window.shape, image.shape[-1], *(size for pair in padding for size in pair))
    fits = (
        image.ndim == 4
        and tuple(numbers.lhs_spec) == tuple(numbers.out_spec) == NUMBERS.lhs_spec
        and all(isinstance(size, int) for size in known)
        and min(window.shape) > 0
        and min(size for pair in padding for size in pair) >= 0
        and tuple(params["lhs_dilation"]) == (1, 1)
        and params["batch_group_count"] == 1
        and params.get("out_sharding") is None
    )
    if not fits:
        return None
    first, second = padding
    return Geometry(
        (sizes[0], sizes[1]),
        (params["window_strides"][0], params["window_strides"][1]),
        (params["rhs_dilation"][0], params["rhs_dilation"][1]),
        ((first[0], first[1]), (second[0], second[1])),
    )


def fits(eqn: Any) -> bool:
    """Whether the kernel computes an equation: a convolution of all channels, or with a filter a channel."""
    if eqn.primitive.name != "conv_general_dilated":
        return False
    image, window = (var.aval for var in eqn.invars)
    floats = all(operand.dtype == jnp.float32 for operand in (image, window, eqn.outvars[0].aval))
    return floats and 0 not in eqn.outvars[0].aval.shape and has_kernel(eqn.params, image, window)


def has_kernel(params: Mapping[str, Any], image: Any, window: Any) -> bool:
    """Whether kernels have the geometry of a `conv_general_dilated`: of all channels, or with a filter a channel.

    Args:
        params: its parameters.
        image, window: its operands, or their shapes.
    """
    if geometry_of(params, image, window) is None:
        return False
    groups, spec = params["feature_group_count"], params["dimension_numbers"].rhs_spec
    return groups == 1 or (groups == image.shape[3] == window.shape[spec[0]] and window.shape[spec[1]] == 1)


def convolve(params: Mapping[str, Any], image: jax.Array, window: jax.Array) -> jax.Array:
    """Compute a convolution that `fits`.

    Args:
        params: parameters of the `conv_general_dilated`.
        image: its left operand.
        window: its right operand.
    """
    geometry = geometry_of(params, image, window)
    assert geometry is not None
    outputs, inputs, *positions = params["dimension_numbers"].rhs_spec
    return convolution.convolve(image, jnp.transpose(window, (*positions, inputs, outputs)), geometry)
