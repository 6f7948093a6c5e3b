"""Products of sites as matrix products, activation `[B, M, K]` by weight `[B, K, N]`, for dots and convolutions.

`B` are batch axes of a dot, or feature groups of a convolution. `K` is the contracted dimension; for a convolution,
window positions by input channels of a group, channels fastest. Stored codes are matrices `[*batch, K, N]`, with the
feature groups of a convolution concatenated in `N`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lepton_xla.passes.core.layouts import Layout, LayoutOp, Step, lay_out
from lepton_xla.passes.core.sites import Site


def weight_order(site: Site) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of the weight operand: batch, contracted, free."""
    assert site.weight_operand is not None
    if site.kind == "dot_general":
        return operand_order(site, site.weight_operand)
    if site.kind == "gather":  # a table [V, D] is the matrix [D, V]: a scale a row that is looked up
        return (), (1,), (0,)
    out, inner, *window = site.params["dimension_numbers"].rhs_spec
    return (), (*window, inner), (out,)


def operand_order(site: Site, side: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of one operand of a `dot_general`: batch, contracted, free."""
    contract, batch = site.params["dimension_numbers"]
    axes = range(len(site.operands[side].shape))
    free = tuple(axis for axis in axes if axis not in (*contract[side], *batch[side]))
    return tuple(batch[side]), tuple(contract[side]), free


def contracted_size(site: Site) -> int:
    """K: how many products are added up for one element of the result."""
    return math.prod(site.weight.shape[axis] for axis in weight_order(site)[1])


def code_matrix(site: Site, weight: jax.Array) -> jax.Array:
    """The weight operand, one step of a stack, as codes are stored: `[*batch, K, N]`, feature groups side by side."""
    batch, contract, free = weight_order(site)
    moved = jnp.transpose(weight, (*batch, *contract, *free))
    sizes = [math.prod(weight.shape[axis] for axis in axes) for axes in (contract, free)]
    return jnp.reshape(moved, (*(weight.shape[axis] for axis in batch), *sizes))


def code_operand(site: Site, matrix: jax.Array) -> jax.Array:
    """The weight operand that a `code_matrix` stands for, or what goes with it: K, N or both may be 1."""
    batch, contract, free = weight_order(site)
    shape = site.weight.shape
    rows, columns = matrix.shape[-2:]
    sizes = [
        *(size for size in matrix.shape[:-2]),
        *(shape[axis] if rows > 1 else 1 for axis in contract),
        *(shape[axis] if columns > 1 else 1 for axis in free),
    ]
    order = (*batch, *contract, *free)
    return jnp.transpose(jnp.reshape(matrix, sizes), [order.index(axis) for axis in range(len(order))])


def weight_matrix(site: Site, weight: jax.Array) -> jax.Array:
    """The weight operand, one step of a stack, as `[B, K, N]`."""
    return _apart(site, code_matrix(site, weight), ())


def weight_operand(site: Site, matrix: jax.Array) -> jax.Array:
    """The weight operand that a `[B, K, N]` matrix stands for: the inverse of `weight_matrix`."""
    return code_operand(site, _joined(site, matrix, ()))


def _apart(site: Site, array: jax.Array, lead: Sequence[int]) -> jax.Array:
    """`[*lead, *batch, rows, N]` as `[*lead, B, rows, N]`: the feature groups of a convolution are its B."""
    rows, columns = array.shape[-2:]
    if site.kind == "conv_general_dilated":
        groups = site.params["feature_group_count"]
        return jnp.swapaxes(jnp.reshape(array, (*lead, rows, groups, columns // groups)), -3, -2)
    batch, _, _ = weight_order(site)
    return jnp.reshape(array, (*lead, math.prod(site.weight.shape[axis] for axis in batch), rows, columns))


def _joined(site: Site, array: jax.Array, lead: Sequence[int]) -> jax.Array:
    """The inverse of `_apart`."""
    groups, rows, columns = array.shape[-3:]
    if site.kind == "conv_general_dilated":
        return jnp.reshape(jnp.swapaxes(array, -3, -2), (*lead, rows, groups * columns))
    batch, _, _ = weight_order(site)
    return jnp.reshape(array, (*lead, *(site.weight.shape[axis] for axis in batch), rows, columns))


def activation_matrix(site: Site, activation: jax.Array) -> jax.Array:
    """Reshape the activation operand to float32 `[B, M, K]`; for a convolution, extract the patches of its windows."""
    assert site.weight_operand is not None
    activation = activation.astype(jnp.float32)
    if site.kind == "dot_general":
        batch, contract, free = operand_order(site, 1 - site.weight_operand)
        moved = jnp.transpose(activation, (*batch, *free, *contract))
        sizes = [math.prod(activation.shape[axis] for axis in axes) for axes in (batch, free, contract)]
        return jnp.reshape(moved, sizes)
    params = site.params
    numbers = params["dimension_numbers"]
    channels_first = jnp.transpose(activation, numbers.lhs_spec)
    patches = lax.conv_general_dilated_patches(
        channels_first,
        [site.weight.shape[axis] for axis in numbers.rhs_spec[2:]],
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        precision=lax.Precision.HIGHEST,
    )  # [N, C * window, *space]
    groups, window = params["feature_group_count"], window_size(site)
    depth = patches.shape[1] // groups
    split = jnp.reshape(patches, (patches.shape[0], groups, depth // window, window, -1))
    return jnp.reshape(jnp.transpose(split, (1, 0, 4, 3, 2)), (groups, -1, depth))


def input_channels(site: Site, vector: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """Reduce `[..., B, K]` to input channels, `[..., B, C]`, over the positions of a window."""
    window = window_size(site)
    return reduce(jnp.reshape(vector, (*vector.shape[:-1], window, vector.shape[-1] // window)), axis=-2)


def window_size(site: Site) -> int:
    """Number of positions of a convolution's window; 1 for a dot."""
    if site.kind == "dot_general":
        return 1
    return math.prod(site.weight.shape[axis] for axis in site.params["dimension_numbers"].rhs_spec[2:])


def matrix_shape(site: Site) -> tuple[int, int, int]:
    """`B`, `K` and `N` of a site."""
    batch, rows, columns = jax.eval_shape(lambda weight: weight_matrix(site, weight), site.weight).shape
    return batch, rows, columns


def steps(site: Site, stored: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The sizes of a stored weight's axes that scans step over, in their order after its layout."""
    shape = jax.eval_shape(lambda array: lay_out(array, _layout(site)), stored).shape
    return tuple(shape[: site.stacked])


def stored_matrix(site: Site, stored: jax.Array) -> jax.Array:
    """Reshape a stored weight to `[*steps, B, K, N]`."""
    return each_step(site, lambda weight: weight_matrix(site, weight))(lay_out(stored, _layout(site)))


def stored_weight(site: Site, matrix: jax.Array, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Reshape a `[*steps, B, K, N]` matrix to the stored weight, in the shape and dtype of `like`.

    The inverse of `stored_matrix` up to the rounding of dtypes; the site's layout must not resize.
    """
    assert not any(op.resizes for op in site.layout if isinstance(op, LayoutOp))
    operand = each_step(site, lambda part: weight_operand(site, part))(matrix).astype(site.weight.dtype)
    # A layout only moves elements, so its transpose is its inverse.
    (stored,) = jax.linear_transpose(lambda array: lay_out(array, _layout(site)), like)(operand)
    return stored


def steps_lead(site: Site) -> bool:
    """Whether the axes that scans step over are the leading ones of the stored weight, in their order."""
    before = _before_steps(site)
    return all(isinstance(op, Step) or op.eqn.primitive.name in ("convert_element_type", "slice") for op in before)


def steps_first(site: Site, stored: jax.Array) -> jax.Array:
    """Move the axes that scans step over to the front of a stored weight, or of an array of its shape."""
    return stored if steps_lead(site) else lay_out(stored, _before_steps(site))


def steps_back(site: Site, laid: jax.Array, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Undo `steps_first` for a mask; the result has the shape of `like`."""
    if steps_lead(site):
        return laid
    forward = lambda array: lay_out(array, _before_steps(site))  # noqa: E731
    (stored,) = jax.linear_transpose(forward, like)(laid.astype(jax.eval_shape(forward, like).dtype))
    return stored != 0


def _before_steps(site: Site) -> Layout:
    """The site's layout up to the last scan that steps over the weight."""
    layout = _layout(site)
    last = max((index for index, op in enumerate(layout) if isinstance(op, Step)), default=-1)
    return layout[: last + 1]


def as_stored(site: Site, array: jax.Array) -> jax.Array:
    """Give `[*steps, B, rows, N]` the axes of stored codes: `[*steps, *batch, rows, N]`."""
    return _joined(site, array, array.shape[: site.stacked])


def from_stored(site: Site, array: jax.Array) -> jax.Array:
    """Give scales or zero points as they are stored, `[*steps, *batch, rows, N or 1]`, as `[*steps, B, rows, N]`."""
    groups, _, columns = matrix_shape(site)
    whole = groups * columns if site.kind == "conv_general_dilated" else columns
    return _apart(site, jnp.broadcast_to(array, (*array.shape[:-1], whole)), array.shape[: site.stacked])


def _layout(site: Site) -> Layout:
    """The site's layout without the operations of `shard_map`, which have no meaning outside of it."""
    marks = ("pvary", "pcast")
    return tuple(op for op in site.layout if not (isinstance(op, LayoutOp) and op.eqn.primitive.name in marks))


def each_step(site: Site, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Vectorize a function of one step of a stack over all steps."""
    for _ in range(site.stacked):
        function = jax.vmap(function)
    return function


def batched_map(function: Callable[..., Any], lead: Sequence[int], *trees: Any, at_once: int) -> Any:
    """Map a function over the leading axes `lead` of arrays, at most `at_once` elements at a time."""
    count = math.prod(lead)
    flat = jax.tree.map(lambda leaf: jnp.reshape(leaf, (count, *leaf.shape[len(lead) :])), trees)
    # Single elements are not batched: with loops inside, a batch of one takes several times as long.
    if count == 1:
        out = jax.tree.map(lambda leaf: leaf[None], function(*jax.tree.map(lambda leaf: leaf[0], flat)))
    else:
        at_once = min(at_once, count)
        out = lax.map(lambda parts: function(*parts), flat, batch_size=at_once if at_once > 1 else None)
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (*lead, *leaf.shape[1:])), out)
