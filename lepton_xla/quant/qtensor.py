"""`QTensor`, a quantized array that is a pytree, and the symmetric arithmetic that makes one.

One rounding rule is used everywhere, in training, calibration and the lowered program: nearest code, ties to even,
saturating. So a fake-quantized and a lowered model differ by float rounding only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lepton_xla.quant.formats import FORMATS, Format


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized array: `values * scale`.

    Attributes:
        values: codes, of the format's dtype.
        scale: float32, broadcastable to `values`: size 1 along every axis that shares a scale.
        format: the format's name.
    """

    values: jax.Array
    scale: jax.Array
    format: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the codes."""
        return self.values.shape

    def dequantize(self, dtype: jnp.dtype | str = "float32") -> jax.Array:
        """The float array this stands for."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def absmax_scale(absmax: jax.Array, target: Format) -> jax.Array:
    """Scale that maps `absmax` onto the largest code.

    Args:
        absmax: largest magnitude of what shares a scale, any shape, float, not negative.
        target: the format.

    Returns:
        float32 of the same shape: never zero or subnormal, and finite where `absmax` is; 1 where that is 0. A NaN stays
        one, so that it shows in the result.
    """
    scale = absmax.astype(jnp.float32) / target.largest
    return jnp.where(scale == 0, jnp.float32(1), jnp.maximum(scale, jnp.finfo(jnp.float32).tiny))


def magnitude(array: jax.Array, axes: Sequence[int] | None) -> jax.Array:
    """Largest absolute value along `axes` (all of them for None), kept as size 1."""
    return jnp.max(jnp.abs(array), axis=None if axes is None else tuple(axes), keepdims=True, initial=0)


def encode(array: jax.Array, scale: jax.Array, target: Format) -> jax.Array:
    """Codes of `array` at the given scale, saturating."""
    codes = jnp.round(array.astype(jnp.float32) / scale)
    return jnp.clip(codes, -target.largest, target.largest).astype(target.dtype)


def quantize(array: jax.Array, name: str, axes: Sequence[int] | None) -> QTensor:
    """Quantizes symmetrically by absmax.

    Args:
        array: float array, any shape.
        name: the format, a key of `FORMATS`.
        axes: axes that share a scale: the contracted ones for per-channel, None (all) for per-tensor.

    Returns:
        A `QTensor` whose scale has size 1 along `axes`.
    """
    target = FORMATS[name]
    scale = absmax_scale(magnitude(array, axes), target)
    return QTensor(encode(array, scale, target), scale, name)


def fake_quantize(array: jax.Array, scale: jax.Array, name: str) -> jax.Array:
    """Rounds to what the format can hold, as floats, for training and evaluation.

    The gradient passes straight through the rounding (Bengio et al. 2013, arXiv:1308.3432) and is zero where the
    value saturates; the scale gets none.

    Args:
        array: float array.
        scale: broadcastable to `array`.
        name: the format, a key of `FORMATS`.
    """
    target = FORMATS[name]
    scale = lax.stop_gradient(scale)
    scaled = array.astype(jnp.float32) / scale
    codes = lax.stop_gradient(jnp.clip(jnp.round(scaled), -target.largest, target.largest))
    # What rounds to the largest code is not saturated: under an absmax scale the largest value of all is there.
    passing = jnp.where(jnp.abs(scaled) <= target.largest + 0.5, scaled, jnp.zeros_like(scaled))
    return ((codes + (passing - lax.stop_gradient(passing))) * scale).astype(array.dtype)
