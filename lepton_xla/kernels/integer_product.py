"""A float matrix, rounded to eight bits with a scale for each row, times a matrix of int8 codes, and what follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.kernels import installation
from lepton_xla.kernels.epilogue import Epilogue
from lepton_xla.quant import FORMATS, QTensor, absmax_scale, encode, magnitude

# On NVIDIA GPUs XLA may choose a Triton kernel that doubles int8 products with K of 16 or less; with 24 or more none
# was wrong (H200, jaxlib 0.11.2; docs/benchmarks/gpu.md lists the checks).
SAFE_DEPTH = 32


def multiply(
    x: jax.Array,
    weight: QTensor,
    static_scale: jax.Array | None = None,
    epilogue: Epilogue | None = None,
    factor: jax.Array | None = None,
) -> jax.Array:
    """Round activations to int8, multiply them by the codes of a weight, scale the sums, and apply an epilogue.

    Args:
        x: float32 [M, K].
        weight: int8, column-major, [K, N], with one scale for each column or one for all.
        static_scale: the scale of the activations, float32 with one element; None: that of each row covers its largest
            magnitude.
        epilogue: what follows the product.
        factor: float32 [K], by which activations are multiplied before they are rounded; None: by nothing.

    Returns:
        float32 [M, N].

    >>> from lepton_xla.quant import quantize
    >>> weight = quantize(jnp.array([[127.0, 1.0], [-63.6, 0.0]]), "int8").by_columns()
    >>> multiply(jnp.array([[127.0, 0.4], [0.0, 0.0]]), weight).tolist()
    [[16129.0, 127.0], [0.0, 0.0]]
    """
    assert weight.transposed
    assert weight.values.ndim == 2
    assert x.dtype == jnp.float32
    static = jnp.zeros(0, jnp.float32) if static_scale is None else jnp.reshape(static_scale, (1,))
    factor = jnp.zeros(0, jnp.float32) if factor is None else factor
    bias, residual, activation = (epilogue or Epilogue()).operands()
    return PRIMITIVE.bind(x, weight.values, weight.scale, static, factor, bias, residual, activation=activation)


def with_factor(operands: Sequence[Any], x: jax.Array, factor: jax.Array) -> list[Any]:
    """The primitive's operands, its activations multiplied by a factor of each column before they are rounded."""
    return [x, *operands[1:4], factor, *operands[5:]]


def has_residual(operands: Sequence[Any]) -> bool:
    """Whether a float matrix is added to the product, of the primitive's operands in an equation."""
    return bool(operands[6].aval.shape[0] != 0)


def _shape(x: Any, codes: Any, *_: Any, **_params: Any) -> tuple[tuple[Any, ...], Any]:
    return (x.shape[0], codes.shape[0]), jnp.dtype("float32")


def _by_xla(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    static: jax.Array,
    factor: jax.Array,
    bias: jax.Array,
    residual: jax.Array,
    *,
    activation: int,
) -> jax.Array:
    """The same in XLA's own operations."""
    int8 = FORMATS["int8"]
    x = x * factor[None] if factor.shape[0] else x
    rows = absmax_scale(magnitude(x, (1,)), int8) if static.shape[0] == 0 else jnp.reshape(static, (1, 1))
    missing = max(0, SAFE_DEPTH - x.shape[1])
    left, right = (jnp.pad(each, ((0, 0), (0, missing))) for each in (encode(x, rows, int8), codes))
    total = jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    product = total.astype(jnp.float32) * (rows * scale)
    return Epilogue.of_operands(bias, residual, activation).apply(product)


def _call(*operands: Any, activation: int) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    attributes = {"activation": np.int64(activation)}
    return (f"{installation.PREFIX}integer_product", operands, attributes) if installation.usable() else None


PRIMITIVE = _compat.row_primitive(
    "integer_product", _shape, _by_xla, _call, by_row=(0, 6), axes=lambda **_: "mk,nk,gn,s,k,n,mn->mn"
)
