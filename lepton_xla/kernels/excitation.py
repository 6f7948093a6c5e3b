"""Squeeze-excite (Hu et al. 2018, arXiv:1709.01507): a factor for each channel of an image, of the means of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lepton_xla import _compat
from lepton_xla.kernels import convolution, installation
from lepton_xla.kernels.convolution import Epilogue, Geometry


class Step(NamedTuple):
    """A product of rows [N, K] and what follows.

    Attributes:
        weight: float32 [K, M], or int8 codes.
        bias: float32 [M]; None: none.
        scale: of codes, float32 [1, M] or [1, 1].
        static: the scale that rows are rounded by before they are multiplied with codes, float32 [1].
    """

    weight: jax.Array
    bias: jax.Array | None = None
    scale: jax.Array | None = None
    static: jax.Array | None = None

    def operands(self) -> tuple[jax.Array, ...]:
        """As the equation has them: what is missing has no elements."""
        none = jnp.zeros(0, jnp.float32)
        scale = jnp.zeros((1, 0), jnp.float32) if self.scale is None else self.scale
        static, bias = (none if each is None else each for each in (self.static, self.bias))
        return self.weight, scale, static, bias


def excite(x: jax.Array, narrow: Step, wide: Step, epilogue: Epilogue) -> jax.Array:
    """Compute the factors: logistic(activation(means * narrow) * wide).

    Args:
        x: float32 [N, H, W, C].
        narrow: the first product, of the means [N, C].
        wide: the second one.
        epilogue: what follows the first one; without a residual.

    Returns:
        float32 [N, 1, 1, C'].

    >>> one = Step(jnp.ones((1, 1)))
    >>> round(float(excite(jnp.ones((1, 2, 2, 1)), one, one, Epilogue("clamp", 0.0))[0, 0, 0, 0]), 3)
    0.731
    """
    assert x.dtype == jnp.float32
    return PRIMITIVE.bind(x, *narrow.operands(), *wide.operands(), epilogue=epilogue)


def _shape(x: Any, *operands: Any, **_: Any) -> tuple[tuple[Any, ...], Any]:
    return (x.shape[0], 1, 1, operands[4].shape[1]), jnp.dtype("float32")


def by_xla(x: jax.Array, *operands: jax.Array, epilogue: Epilogue) -> jax.Array:
    """The same in XLA's own operations."""
    means = jnp.mean(x, (1, 2), keepdims=True)
    return lax.logistic(_product(_product(means, operands[:4], epilogue), operands[4:], Epilogue()))


def _product(x: jax.Array, operands: Sequence[jax.Array], epilogue: Epilogue) -> jax.Array:
    weight, scale, static, bias = operands
    none, geometry = jnp.zeros(0, jnp.float32), Geometry((1, 1))
    if weight.dtype == jnp.float32:
        return convolution.by_xla(x, weight[None, None], none, bias, none, geometry=geometry, epilogue=epilogue)
    given = convolution.Operands(x, weight, scale, static, result=none, gate=none, bias=bias, residual=none)
    return convolution.codes_by_xla(*given, geometry=geometry, epilogue=epilogue)


def _call(*operands: Any, epilogue: Epilogue) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    if not installation.usable():
        return None
    return f"{installation.PREFIX}excitation", operands, dict(epilogue.attributes())


PRIMITIVE = _compat.row_primitive("excitation", _shape, by_xla, _call)
