"""`QTensor`, a quantized matrix as a pytree, and fake quantization."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from lepton_xla.quant.formats import FORMATS, Format
from lepton_xla.quant.grid import Grid, decode, make_grid, matrix_codes, matrix_values
from lepton_xla.quant.packing import pack, unpack

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int, Num, Shaped, UInt8


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "zero_point", "codebook"],
    meta_fields=["format", "rows", "transposed"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized matrix [..., K, N], where K is contracted; leading axes are batches, and steps of a scan.

    Attributes:
        values: codes [..., K, N], or [..., N, K] if `transposed`; codes of fewer than eight bits are packed: uint8
            [..., ceil(K / codes per byte), N].
        scale: float32 [..., 1, N] per channel, [..., 1, 1] per matrix; bfloat16 [..., G, N] per group.
        format: the format's name.
        rows: K.
        zero_point: uint8, shaped like `scale`, for affine formats; else None.
        codebook: float32 [..., levels], for learned formats; else None.
        transposed: whether codes are stored column-major, as products of codes are fastest.

    >>> from lepton_xla.quant import quantize
    >>> weight = quantize(jnp.array([[7.0, 3.5], [-3.0, 0.5], [1.0, -1.0]]), "int4")
    >>> weight.shape, weight.values.shape, weight.grid.scale.tolist()
    ((3, 2), (2, 2), [[1.0, 0.5]])
    >>> weight.codes().tolist(), weight.dequantize()[0].tolist()
    ([[7, 7], [-3, 1], [1, -2]], [7.0, 3.5])
    """

    values: Shaped[Array, "*batch rows n"]
    scale: Float[Array, "*batch _ _"]
    format: str
    rows: int
    zero_point: UInt8[Array, "*batch _ _"] | None = None
    codebook: Float32[Array, "*batch levels"] | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized matrix: [..., K, N]."""
        return (*self.values.shape[:-2], self.rows, self.values.shape[-2 if self.transposed else -1])

    @property
    def grid(self) -> Grid:
        """The grid of the codes."""
        return Grid(self.scale, self.zero_point, self.codebook)

    def codes(self) -> Shaped[Array, "*batch k n"]:
        """Unpack the codes: [..., K, N] of the format's dtype."""
        if self.transposed:
            return jnp.swapaxes(self.values, -1, -2)
        return unpack(self.values, FORMATS[self.format], self.rows)

    def by_columns(self) -> QTensor:
        """Return the same matrix with its eight-bit codes stored column-major.

        >>> by_columns = quantize(jnp.ones((3, 2)), "int8").by_columns()
        >>> by_columns.shape, by_columns.values.shape
        ((3, 2), (2, 3))
        """
        assert FORMATS[self.format].bits == 8
        return self if self.transposed else self._turned()

    def by_rows(self) -> QTensor:
        """Return the same matrix with its codes stored row-major.

        >>> quantize(jnp.ones((3, 2)), "int8").by_columns().by_rows().values.shape
        (3, 2)
        """
        return self._turned() if self.transposed else self

    def _turned(self) -> QTensor:
        return dataclasses.replace(self, values=jnp.swapaxes(self.values, -1, -2), transposed=not self.transposed)

    def dequantize(self, dtype: jnp.dtype | str = "float32") -> Float[Array, "*batch k n"]:
        """Return the float matrix [..., K, N]."""
        return matrix_values(self.codes(), self.grid, FORMATS[self.format]).astype(dtype)

    def columns(self, index: Int[Array, " columns"]) -> QTensor:
        """Select columns: a `QTensor` of [K, len(index)].

        Args:
            index: int [n], each in [0, N). The matrix must have no leading axes.

        >>> quantize(jnp.array([[1.0, 2.0, 127.0]]), "int8", "tensor").columns(jnp.array([2, 0])).dequantize().tolist()
        [[127.0, 1.0]]
        """
        take = lambda array: array.at[:, index].get(mode="promise_in_bounds")  # noqa: E731
        of = lambda array: array if array is None or array.shape[-1] == 1 else take(array)  # noqa: E731
        values = self.values.at[index].get(mode="promise_in_bounds") if self.transposed else take(self.values)
        return dataclasses.replace(self, values=values, scale=of(self.scale), zero_point=of(self.zero_point))


def quantize(
    matrix: Float[Array, "*batch k n"],
    name: str,
    granularity: str = "channel",
    weight_range: str = "absmax",
    *,
    scale: Float[Array, "*batch _ _"] | None = None,
    zero_point: Num[Array, "*batch _ _"] | None = None,
    codebook: Float[Array, "*batch levels"] | None = None,
) -> QTensor:
    """Quantize a matrix on the grid that `make_grid` chooses, or on a given one.

    Args:
        matrix: float [..., K, N].
        name: the format, a key of `FORMATS`.
        granularity: `channel`, `tensor` (one scale for each [K, N]) or `group:g` along K.
        weight_range: `absmax` or `mse`, as `make_grid` takes it.
        scale, zero_point, codebook: parts of the grid, as `make_grid` takes them.

    Raises:
        RecipeError: if g does not divide K.

    >>> from lepton_xla.quant import quantize
    >>> quantize(jnp.array([[127.0, 1.0], [-63.6, 0.0]]), "int8").dequantize().round(2).tolist()
    [[127.0, 1.0], [-64.0, 0.0]]
    """
    target = FORMATS[name]
    grid = make_grid(matrix, target, granularity, weight_range, scale=scale, zero_point=zero_point, codebook=codebook)
    codes = matrix_codes(lax.stop_gradient(matrix), grid, target)
    return QTensor(pack(codes, target), grid.scale, name, matrix.shape[-2], grid.zero_point, grid.codebook)


def fake_quantize(
    array: Float[Array, "*shape"],
    codes: Shaped[Array, "*shape"],
    scale: Float[Array, "*#shape"],
    target: Format,
    zero_point: Num[Array, "*#shape"] | None = None,
    *,
    clips: bool = True,
) -> Float[Array, "*shape"]:
    """Dequantize codes with a straight-through gradient for the array: for training and evaluation.

    The gradient passes straight through the rounding (Bengio et al. 2013, arXiv:1308.3432) and is zero where an integer
    or small float saturates. The scale gets no gradient.

    Args:
        array: float, any shape.
        codes: `encode(array, scale, target, zero_point)`.
        scale: float32, broadcastable to `array`.
        target: a format whose levels are not learned.
        zero_point: broadcastable to `array`, for affine formats.
        clips: False asserts that no value saturates, as under an absmax scale, which saves the check.

    Returns:
        Exactly the values of `decode`, in the array's dtype.

    >>> from lepton_xla.quant import FORMATS, encode, fake_quantize
    >>> int8, scale, x = FORMATS["int8"], jnp.float32(1), jnp.array([0.6, 500.0])
    >>> rounded = lambda x: fake_quantize(x, encode(x, scale, int8), scale, int8)
    >>> rounded(x).tolist(), jax.grad(lambda x: rounded(x).sum())(x).tolist()
    ([1.0, 127.0], [1.0, 0.0])
    """
    scale = lax.stop_gradient(scale)
    exact = array.astype(jnp.float32)
    passing = inside(exact, scale, target) if clips and target.kind in ("int", "float") else True
    return straight_through(exact, decode(codes, scale, target, zero_point), passing).astype(array.dtype)


def inside(array: jax.Array, scale: jax.Array, target: Format) -> jax.Array:
    """Where values do not saturate.

    A value that rounds to the largest code counts as inside: under an absmax scale the largest value is one.

    >>> inside(jnp.array([127.4, 200.0]), jnp.float32(1), FORMATS["int8"]).tolist()
    [True, False]
    """
    position = array / scale
    return (position >= target.lowest - 0.5) & (position <= target.largest + 0.5)


def straight_through(array: jax.Array, rounded: jax.Array, passing: jax.Array | bool) -> jax.Array:
    """Return exactly `rounded`, with the gradient of `array` where `passing`, and none elsewhere.

    >>> jax.value_and_grad(lambda x: straight_through(x, jnp.round(x), True))(1.7)
    (Array(2., dtype=float32, weak_type=True), Array(1., dtype=float32, weak_type=True))
    """
    through = array if passing is True else jnp.where(passing, array, jnp.zeros_like(array))
    return lax.stop_gradient(rounded) + (through - lax.stop_gradient(through))
