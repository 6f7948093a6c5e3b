"""Convolutions of images with their channels last, with what follows them: bias, activation, residual."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla import _compat
from lepton_xla.kernels import installation
from lepton_xla.quant import FORMATS, QTensor, absmax_scale, encode, magnitude

NUMBERS = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
"""Of images [N, H, W, C] and windows [H, W, C, O]."""
FLOAT = "convolution"
"""The name of the primitive of those in float."""
_ACTIVATIONS = ("none", "clamp", "silu")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the windows of a convolution lie; pairs are of height and width.

    Attributes:
        window: positions of a window.
        strides: between windows.
        dilation: between the positions of a window.
        padding: zeros above and below, left and right.
    """

    window: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    def size(self, size: Any, axis: int) -> Any:
        """The size of the result along an axis of the image, which has `size`."""
        reach = (self.window[axis] - 1) * self.dilation[axis] + 1
        return (size + sum(self.padding[axis]) - reach) // self.strides[axis] + 1

    def numbers(self) -> np.ndarray:
        """As the kernel takes it."""
        (top, bottom), (left, right) = self.padding
        return np.array([*self.window, *self.strides, *self.dilation, top, bottom, left, right], np.int64)


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What becomes of a sum after its bias is added.

    Attributes:
        activation: `clamp` to `low` and `high`, which keeps NaN, or `silu`: x * logistic(x).
        low, high: of `clamp`.
        add_first: whether a residual is added before the activation, and not after it.
    """

    activation: Literal["none", "clamp", "silu"] = "none"
    low: float = -math.inf
    high: float = math.inf
    add_first: bool = True

    def attributes(self) -> dict[str, np.ndarray]:
        """As the kernel takes them."""
        kind = [_ACTIVATIONS.index(self.activation), int(self.add_first)]
        return {"activation": np.array(kind, np.int64), "bounds": np.array([self.low, self.high], np.float32)}

    def apply(self, out: jax.Array, bias: jax.Array, residual: jax.Array) -> jax.Array:
        """The same in XLA's own operations; an empty bias or residual is none."""
        out = out + jnp.reshape(bias, (1, 1, 1, -1)) if bias.shape[0] else out
        added = residual.ndim == out.ndim
        out = out + residual if added and self.add_first else out
        if self.activation == "clamp":
            out = lax.min(lax.max(out, jnp.float32(self.low)), jnp.float32(self.high))
        elif self.activation == "silu":
            out = out * lax.logistic(out)
        return out + residual if added and not self.add_first else out


def convolve(x: jax.Array, weight: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolve images, all channels with all or each with its own filter.

    Args:
        x: float32 [N, H, W, C].
        weight: float32 [h, w, C, O], or [h, w, 1, C] for a filter a channel.
        geometry: where the windows lie; h and w are its window.

    Returns:
        float32 [N, H', W', O].

    >>> convolve(jnp.ones((1, 3, 3, 1)), jnp.ones((2, 2, 1, 1)), Geometry((2, 2)))[0, :, :, 0].tolist()
    [[4.0, 4.0], [4.0, 4.0]]
    """
    assert x.dtype == weight.dtype == jnp.float32
    if not x.shape[3]:  # the kernel divides by the number of channels
        return jnp.zeros(*shape(x, weight, geometry=geometry))
    none = jnp.zeros(0, jnp.float32)
    operands = FloatOperands(x, weight, gate=none, bias=none, residual=none)
    return operands.bind({"geometry": geometry, "epilogue": Epilogue()})


def convolve_codes(
    x: jax.Array, weight: QTensor, geometry: Geometry, static_scale: jax.Array | None = None
) -> jax.Array:
    """Round images to int8, convolve them with the codes of a weight, and scale the sums.

    Args:
        x: float32 [N, H, W, C].
        weight: int8, row-major, [h * w * C, O], or [h * w, C] for a filter a channel, with one scale for each column or
            one for all.
        geometry: where the windows lie; h and w are its window.
        static_scale: the scale of x, float32 with one element; None: that of each example covers its largest magnitude.

    Returns:
        float32 [N, H', W', O].

    >>> from lepton_xla.quant import quantize
    >>> weight = quantize(jnp.full((4, 1), 127.0), "int8")
    >>> convolve_codes(jnp.ones((1, 3, 3, 1)) * 127, weight, Geometry((2, 2)))[0, :, :, 0].tolist()
    [[64516.0, 64516.0], [64516.0, 64516.0]]
    """
    assert not weight.transposed
    assert x.dtype == jnp.float32
    if not x.shape[3]:
        return jnp.zeros(*shape(x, weight.values, geometry=geometry))
    static = jnp.zeros(0, jnp.float32) if static_scale is None else jnp.reshape(static_scale, (1,))
    none = jnp.zeros(0, jnp.float32)
    operands = Operands(x, weight.values, weight.scale, static, result=none, gate=none, bias=none, residual=none)
    return operands.bind({"geometry": geometry, "epilogue": Epilogue()})


class FloatOperands(NamedTuple):
    """Those of a convolution in float, as its equation has them; what has no elements is not there.

    Attributes:
        x: the images.
        weight: float32 [h, w, C, O].
        gate: what images are multiplied by, float32 [N, 1, 1, C]; only where a window is one position.
        bias, residual: of the epilogue.
    """

    x: Any
    weight: Any
    gate: Any
    bias: Any
    residual: Any

    def bind(self, params: Mapping[str, Any]) -> jax.Array:
        """The convolution of these operands."""
        return _CONVOLUTION.bind(*self, **params)

    def may_be_gated(self, geometry: Geometry) -> bool:
        """Whether images may be multiplied by a gate, and are not yet."""
        return self.gate.ndim == 1 and geometry == Geometry((1, 1)) and self.weight.shape[2] == self.x.shape[3]


class Operands(NamedTuple):
    """Those of a convolution of codes, as its equation has them; what has no elements is not there.

    Attributes:
        x: the images, float32, or `in_codes`.
        codes, scale: of the weight.
        static: the scale of the images.
        result: the scale of the result, which is rounded and written `in_codes`.
        gate: what images are multiplied by before they are rounded, float32 [N, 1, 1, C]; not with a filter a channel,
            and with a static scale.
        bias, residual: of the epilogue.
    """

    x: Any
    codes: Any
    scale: Any
    static: Any
    result: Any
    gate: Any
    bias: Any
    residual: Any

    def bind(self, params: Mapping[str, Any]) -> jax.Array:
        """The convolution of these operands."""
        return _INTEGER_CONVOLUTION.bind(*self, **params)

    def may_be_gated(self, geometry: Geometry) -> bool:
        """Whether images may be multiplied by a gate, and are not yet."""
        filters = self.codes.shape[0] == math.prod(geometry.window) and self.x.shape[3] != 1
        static = self.static.shape[0] == 1 and self.x.dtype == jnp.float32
        return static and self.gate.ndim == 1 and not filters


def in_codes(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Round images as a convolution of codes would: to codes with 128 added, uint8, which it then takes instead.

    >>> in_codes(jnp.array([-1.0, 0.0, 0.5, 9.0]), jnp.array([0.5])).tolist()
    [126, 128, 129, 146]
    """
    return (encode(x, scale, FORMATS["int8"]).astype(jnp.int32) + 128).astype(jnp.uint8)


def followed(name: str, operands: Any, bias: Any, residual: Any, geometry: Geometry, epilogue: Epilogue) -> jax.Array:
    """A convolution, by the name of its primitive, with another epilogue; None keeps the bias or residual."""
    primitive = PRIMITIVES[name]
    *given, old_bias, old_residual = operands
    bias, residual = (old if new is None else new for new, old in ((bias, old_bias), (residual, old_residual)))
    return primitive.bind(*given, bias, residual, geometry=geometry, epilogue=epilogue)


def shape(x: Any, *operands: Any, geometry: Geometry, **_: Any) -> tuple[tuple[Any, ...], Any]:
    """Shape and dtype of a convolution in float of `x`; the first of the other operands is the weight."""
    sizes = (geometry.size(size, axis) for axis, size in enumerate(x.shape[1:3]))
    return (x.shape[0], *sizes, operands[0].shape[-1]), jnp.dtype("float32")


def _shape_of_codes(*operands: Any, geometry: Geometry, **_: Any) -> tuple[tuple[Any, ...], Any]:
    given = Operands(*operands)
    sizes, dtype = shape(given.x, given.codes, geometry=geometry)
    return sizes, jnp.dtype("uint8") if given.result.shape[0] else dtype


def by_xla(*operands: jax.Array, geometry: Geometry, epilogue: Epilogue) -> jax.Array:
    """The same in XLA's own operations."""
    x, weight, gate, bias, residual = FloatOperands(*operands)
    x = x * gate if gate.ndim == 4 else x
    depthwise = weight.shape[2] == 1 and x.shape[3] != 1
    out = _shifted(x, weight, geometry) if depthwise else _convolved(x, weight, geometry)
    return epilogue.apply(out, bias, residual)


def _convolved(x: jax.Array, weight: jax.Array, geometry: Geometry, dtype: Any = None) -> jax.Array:
    return lax.conv_general_dilated(
        x, weight, geometry.strides, geometry.padding, rhs_dilation=geometry.dilation, dimension_numbers=NUMBERS,
        preferred_element_type=dtype,
    )  # fmt: skip


def _shifted(x: jax.Array, weight: jax.Array, geometry: Geometry) -> jax.Array:
    """A filter a channel as a sum of shifted images: XLA:CPU is slow at these as convolutions."""
    padded = jnp.pad(x, ((0, 0), *geometry.padding, (0, 0)))
    total = None
    for position in itertools.product(*map(range, geometry.window)):
        part = padded
        for axis, offset in enumerate(position):
            start = offset * geometry.dilation[axis]
            last = start + (geometry.size(x.shape[axis + 1], axis) - 1) * geometry.strides[axis]
            part = lax.slice_in_dim(part, start, last + 1, geometry.strides[axis], axis + 1)
        term = part * jnp.reshape(weight[position], (1, 1, 1, -1))
        total = term if total is None else total + term
    assert total is not None
    return total


def codes_by_xla(*operands: jax.Array, geometry: Geometry, epilogue: Epilogue) -> jax.Array:
    """The same in XLA's own operations."""
    given, int8 = Operands(*operands), FORMATS["int8"]
    x, static = given.x, given.static
    if given.gate.ndim == 4:
        x = x * given.gate
    examples = (
        absmax_scale(magnitude(x, (1, 2, 3)), int8) if static.shape[0] == 0 else jnp.reshape(static, (1, 1, 1, 1))
    )
    codes = (x.astype(jnp.int32) - 128).astype(jnp.int8) if x.dtype == jnp.uint8 else encode(x, examples, int8)
    channels = x.shape[3]
    if given.codes.shape[0] == math.prod(geometry.window) and channels != 1:
        weight = jnp.reshape(given.codes, (*geometry.window, 1, channels)).astype(jnp.int32)
        total = _shifted(codes.astype(jnp.int32), weight, geometry)
    else:
        weight = jnp.reshape(given.codes, (*geometry.window, channels, given.codes.shape[1]))
        total = _convolved(codes, weight, geometry, jnp.int32)
    out = total.astype(jnp.float32) * (examples * jnp.reshape(given.scale, (1, 1, 1, -1)))
    out = epilogue.apply(out, given.bias, given.residual)
    return in_codes(out, jnp.reshape(given.result, (1, 1, 1, 1))) if given.result.shape[0] else out


def _call(
    name: str, *operands: Any, geometry: Geometry, epilogue: Epilogue
) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    if not installation.usable():
        return None
    return f"{installation.PREFIX}{name}", operands, {"geometry": geometry.numbers(), **epilogue.attributes()}


def _float_call(*operands: Any, **params: Any) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    return _call("convolution", *operands, **params)


def _integer_call(*operands: Any, **params: Any) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    return _call("integer_convolution", *operands, **params)


_CONVOLUTION = _compat.row_primitive(FLOAT, shape, by_xla, _float_call, by_row=(0, 2, 4))
_INTEGER_CONVOLUTION = _compat.row_primitive(
    "integer_convolution", _shape_of_codes, codes_by_xla, _integer_call, by_row=(0, 5, 7)
)
PRIMITIVES = {FLOAT: _CONVOLUTION, "integer_convolution": _INTEGER_CONVOLUTION}
OPERANDS = {FLOAT: FloatOperands, "integer_convolution": Operands}
"""Those of each of them."""
