"""A float matrix times a quantized one, whose codes are unpacked in registers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import _compat
from lepton_xla.kernels import installation
from lepton_xla.kernels.epilogue import Epilogue
from lepton_xla.quant import FORMATS, QTensor

# A kernel looks the value of a code of four bits up in a table of this size.
_LEVELS = 16


def fits(format_name: str) -> bool:
    """Whether there is a kernel for weights of a format: eight-bit integers, and codes that take four bits each.

    >>> [name for name in ("int8", "int4", "uint8", "nf4", "codebook16", "codebook256", "fp8_e4m3") if fits(name)]
    ['int8', 'int4', 'nf4', 'codebook16']
    """
    form = FORMATS[format_name]
    return format_name == "int8" or (form.per_byte == 2 and form.kind in ("int", "codebook"))


def multiply(x: jax.Array, weight: QTensor, epilogue: Epilogue | None = None) -> jax.Array:
    """Multiply activations by a quantized matrix, and apply an epilogue.

    Args:
        x: float32 [M, K].
        weight: row-major [K, N], in a format that `fits`.
        epilogue: what follows the product.

    Returns:
        float32 [M, N], the product with the dequantized weight up to rounding of float32 and, on some processors, of
        activations to 16 bits by the largest of up to 128 beside each other, and of the values of codes that are no
        integers by the largest of them. The number of threads changes nothing.

    >>> from lepton_xla.quant import quantize
    >>> multiply(jnp.ones((1, 2)), quantize(jnp.array([[7.0, 3.5], [-3.0, 0.5]]), "int4")).tolist()
    [[4.0, 4.0]]
    """
    assert not weight.transposed
    assert weight.values.ndim == 2
    assert x.dtype == jnp.float32
    # Side by side in one matrix, [groups, N or 1]; a codebook's [1, 1] too.
    bias, residual, activation = (epilogue or Epilogue()).operands()
    operands = x, weight.values, weight.scale, _levels(weight), bias, residual
    return PRIMITIVE.bind(*operands, format=weight.format, rows=weight.rows, activation=activation)


def _levels(weight: QTensor) -> jax.Array:
    """The values of the codes of four bits; empty for eight bits."""
    form = FORMATS[weight.format]
    if form.bits == 8:
        return jnp.zeros(0, jnp.float32)
    if weight.codebook is not None:
        return jnp.pad(weight.codebook, (0, _LEVELS - weight.codebook.shape[-1]))
    if form.levels:
        return jnp.asarray(form.levels, jnp.float32)
    codes = np.arange(_LEVELS)
    return jnp.asarray(np.where(codes < _LEVELS // 2, codes, codes - _LEVELS), jnp.float32)


def _shape(x: Any, values: Any, *_: Any, **_params: Any) -> tuple[tuple[Any, ...], Any]:
    return (x.shape[0], values.shape[1]), jnp.dtype("float32")


def _by_xla(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    levels: jax.Array,
    bias: jax.Array,
    residual: jax.Array,
    **params: Any,
) -> jax.Array:
    """The same in XLA's own operations, which dequantize the whole weight."""
    form = FORMATS[params["format"]]
    codebook = levels[: 1 << form.bits] if form.learned else None
    product = x @ QTensor(values, scale, params["format"], params["rows"], codebook=codebook).dequantize()
    return Epilogue.of_operands(bias, residual, params["activation"]).apply(product)


def _call(
    x: Any, values: Any, scale: Any, levels: Any, *epilogue: Any, **params: Any
) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    """The target of XLA's custom call, its operands and attributes; None if there is none here."""
    if not installation.usable():
        return None
    attributes = {"activation": np.int64(params["activation"])}
    if FORMATS[params["format"]].bits == 8:
        return f"{installation.PREFIX}weight_only_8", (x, values, scale, *epilogue), attributes
    return f"{installation.PREFIX}weight_only_4", (x, values, scale, levels, *epilogue), attributes


PRIMITIVE = _compat.row_primitive(
    "weight_only_product", _shape, _by_xla, _call, by_row=(0, 5), axes=lambda **_: "mk,jn,gn,l,n,mn->mn"
)
