"""How arithmetic (element-wise operations, sums, products) relates the axes of its operands and results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lepton_xla.passes.core.walker import Context
from lepton_xla.passes.shrinking.dimensions import (
    Dimension,
    is_protected,
    leaf,
    product,
    protect,
    size_of,
    unify,
)
from lepton_xla.passes.shrinking.labels import (
    Findings,
    Handler,
    Labelled,
    Product,
    every,
    guard,
    literal,
    opaque,
    pair,
)

# Element-wise primitives f with f(0) = 0, or f(0, 0) = 0 for two operands.
_ZERO_TO_ZERO = {
    "abs", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bitcast_convert_type", "cbrt", "ceil",
    "conj", "convert_element_type", "copy", "copy_p", "erf", "erf_inv", "expm1", "floor", "imag", "log1p", "max", "min",
    "mulhi", "name", "neg", "or", "pcast", "population_count", "pvary", "real", "reduce_precision", "reshard", "round",
    "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}  # fmt: skip
_ELEMENTWISE = _ZERO_TO_ZERO | {
    "acos", "acosh", "bessel_i0e", "bessel_i1e", "clamp", "clz", "complex", "cos", "cosh", "digamma", "div", "eq",
    "eq_to", "erfc", "exp", "exp2", "ge", "gt", "igamma", "igamma_grad_a", "igammac", "integer_pow", "is_finite", "le",
    "le_to", "lgamma", "log", "log2", "logistic", "lt", "lt_to", "mul", "ne", "nextafter", "not", "one_minus_square",
    "polygamma", "pow", "regularized_incomplete_beta", "rem", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "zeta",
}  # fmt: skip


def elementwise(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """All operands have the same axes, except for scalars and broadcast axes of size one."""
    del context
    name, sizes = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name in ("mul", "div"):
        _note_scales(study, operands)
        _protect_means(eqn, operands)
    axes: list[Dimension] = []
    zero: list[bool] = []
    for axis, size in enumerate(sizes):
        along = [operand.axes[axis] for operand in operands if operand.axes and operand.axes[axis].size == size]
        for other in along[1:]:
            unify(along[0], other, f"axes that do not line up meet in `{name}`")
        flags = [_flag(operand, atom, axis, size) for operand, atom in zip(operands, eqn.invars, strict=True)]
        axes.append(along[0])
        zero.append(_zero_after(eqn, flags))
    alone = len(operands) == 1
    path = operands[0].path if alone and name in ("convert_element_type", "copy", "copy_p") else None
    return [Labelled(tuple(axes), tuple(zero), path, operands[0].means if alone else ())]


def _flag(operand: Labelled, atom: Any, axis: int, size: Any) -> bool:
    """Whether an operand is zero at the removed units of an axis of the result."""
    if operand.axes and operand.axes[axis].size == size:
        return operand.zero_at(axis)
    return literal(atom) == 0 if not operand.axes else False


def _zero_after(eqn: Any, flags: list[bool]) -> bool:
    """Whether the result is zero if the flagged operands are zero."""
    name = eqn.primitive.name
    match name:
        case "mul" | "and":
            return any(flags)
        case "div" | "rem" | "pow" | "shift_left" | "shift_right_arithmetic" | "shift_right_logical":
            return flags[0] and (name != "pow" or (literal(eqn.invars[1]) or 0) > 0)
        case "integer_pow":
            return flags[0] and eqn.params["y"] > 0
        case "select_n":
            return all(flags[1:])
        case "clamp":
            low, high = literal(eqn.invars[0]), literal(eqn.invars[2])
            return flags[1] and low is not None and high is not None and low <= 0 <= high
        case "max" | "min":
            sign = 1 if name == "max" else -1
            bounds = [literal(atom) for atom in eqn.invars]
            return all(
                flag or (bound is not None and sign * bound <= 0) for flag, bound in zip(flags, bounds, strict=True)
            ) and any(flags)
        case _:
            return name in _ZERO_TO_ZERO and all(flags)


def _note_scales(study: Findings, operands: list[Labelled]) -> None:
    """Note a weight vector that an activation is multiplied by."""
    for operand in operands:
        if operand.path is not None:
            wide = [dimension for dimension in study.weights[operand.path] if not is_protected(dimension)]
            study.scales += [(wide[0], operand.path)] if len(wide) == 1 else []


def _protect_means(eqn: Any, operands: list[Labelled]) -> None:
    """Protect axes that are summed and divided by their size, because the program holds the size as a constant."""
    for operand, other in zip(operands, reversed(eqn.invars), strict=True):
        by = literal(other)
        for axes, count in operand.means:
            if by and math.isclose(by if eqn.primitive.name == "div" else 1 / by, count, rel_tol=1e-2):
                guard(axes, f"a mean over it is divided by the constant {count}")


def _along(names: str) -> Handler:
    """A handler for primitives that depend on positions along the axes of one parameter, and not along other axes."""

    def handler(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
        del study, context
        given = eqn.params[names]
        special = {given} if isinstance(given, int) else set(given)
        for operand in operands:
            pair(operands[0].axes, operand.axes, eqn)
        for axis in special:
            protect(operands[0].axes[axis], f"`{eqn.primitive.name}` runs along it")
        zero = every(operands) if eqn.primitive.name in ("rev", "cumsum") else (False,) * len(operands[0].axes)
        return [Labelled(operands[0].axes, zero) for _ in eqn.outvars]

    return handler


def _reduce(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Sum may lose units that are zero in them; other reductions may lose none."""
    del study, context
    name, operand, gone = eqn.primitive.name, operands[0], eqn.params["axes"]
    for axis in gone:
        if name != "reduce_sum":
            protect(operand.axes[axis], f"`{name}` runs over it")
        elif not operand.zero_at(axis):
            protect(operand.axes[axis], f"`{name}` runs over it where removed units would not be zero")
    kept = [k for k in range(len(operand.axes)) if k not in gone]
    over = tuple(operand.axes[k] for k in gone)
    count = math.prod(d.size for d in over)
    means = ((over, count),) if name == "reduce_sum" and isinstance(count, int) else ()
    passes = name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_or", "reduce_and")
    axes, zero = tuple(operand.axes[k] for k in kept), tuple(passes and operand.zero_at(k) for k in kept)
    return [Labelled(axes, zero, None, means) for _ in eqn.outvars]


def _reduce_window(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Axes that the window does not span pass through."""
    del study, context
    params, operand, sizes = eqn.params, operands[0], eqn.outvars[0].aval.shape
    plain = (1, 1, (0, 0), 1, 1)
    fields = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    arrays = operands[: len(eqn.outvars)]
    for other in arrays[1:]:
        pair(operand.axes, other.axes, eqn)
    axes: list[Dimension] = []
    reason = f"`{eqn.primitive.name}` runs over it"
    for k, dimension in enumerate(operand.axes):
        default = (1,) * len(sizes)
        given = tuple(tuple(v) if isinstance(v := (params.get(f) or default)[k], Sequence) else v for f in fields)
        if given == plain:
            axes.append(dimension)
        else:
            protect(dimension, reason)
            axes.append(leaf(sizes[k], reason))
    zero = tuple(operand.zero_at(k) for k in range(len(axes)))
    passes = eqn.primitive.name in ("reduce_window_sum", "reduce_window_max")
    return [Labelled(tuple(axes), zero if passes else (False,) * len(axes)) for _ in eqn.outvars]


def _dot_general(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    (contract, batch) = eqn.params["dimension_numbers"]
    left, right = operands
    for i, j in zip(*contract, strict=True):
        unify(left.axes[i], right.axes[j], "axes that do not line up meet in `dot_general`")
        if not (left.zero_at(i) or right.zero_at(j)):
            protect(left.axes[i], "`dot_general` sums over it where removed units would not be zero")
    axes: list[Dimension] = []
    zero: list[bool] = []
    for i, j in zip(*batch, strict=True):
        unify(left.axes[i], right.axes[j], "axes that do not line up meet in `dot_general`")
        axes.append(left.axes[i])
        zero.append(left.zero_at(i) or right.zero_at(j))
    free: list[list[int]] = []
    for side, operand in enumerate(operands):
        free.append([k for k in range(len(operand.axes)) if k not in (*contract[side], *batch[side])])
        axes += [operand.axes[k] for k in free[side]]
        zero += [operand.zero_at(k) for k in free[side]]
    paths = [operand.path for operand in operands]
    if paths == [None, None]:
        study.batched += [left.axes[i] for i in batch[0]]
    for side, operand in enumerate(operands):
        if operand.path is not None:
            made = (*free[side], *batch[side])
            study.products.append(Product(operand.path, tuple(operand.axes[k] for k in made), False))
    return [Labelled(tuple(axes), tuple(zero))]


def _ragged_dot_general(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """A product of rows with the matrix of their group, as in a mixture of experts; the groups are protected."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    left, right, counts = operands
    if batch[0] or set(numbers.lhs_ragged_dimensions) & set(contract[0]):
        return opaque(study, context, eqn, operands)
    guard([*counts.axes, *(right.axes[k] for k in groups)], "`ragged_dot_general` groups by it")
    guard([left.axes[k] for k in numbers.lhs_ragged_dimensions], "`ragged_dot_general` groups by it")
    for i, j in zip(*contract, strict=True):
        unify(left.axes[i], right.axes[j], "axes that do not line up meet in `ragged_dot_general`")
        if not (left.zero_at(i) or right.zero_at(j)):
            protect(left.axes[i], "`ragged_dot_general` sums over it where removed units would not be zero")
    rows = [k for k in range(len(left.axes)) if k not in contract[0]]
    columns = [k for k in range(len(right.axes)) if k not in (*contract[1], *groups)]
    made = tuple(right.axes[k] for k in columns)
    if right.path is not None:
        study.products.append(Product(right.path, made, False))
    zero = (*(left.zero_at(k) for k in rows), *(right.zero_at(k) for k in columns))
    return [Labelled((*(left.axes[k] for k in rows), *made), zero)]


def _conv(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    params = eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return opaque(study, context, eqn, operands)
    left, right = operands
    (batch, channels), (made, summed), (out_batch, out_made) = (
        spec[:2] for spec in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    )
    for operand, spec in ((left, numbers.lhs_spec), (right, numbers.rhs_spec)):
        guard([operand.axes[k] for k in spec[2:]], "a convolution's window runs over it")
    why = "axes that do not line up meet in `conv_general_dilated`"
    group = leaf(groups)
    unify(left.axes[channels], product([group, right.axes[summed]]), why)
    if groups > 1:
        unify(right.axes[made], product([group, leaf(right.axes[made].size // groups)]), why)
        study.changes[context.key] = lambda kept: {"feature_group_count": size_of(group, kept)}
    if not (left.zero_at(channels) or right.zero_at(summed)):
        protect(right.axes[summed], "a convolution sums over it where removed units would not be zero")
    sizes = eqn.outvars[0].aval.shape
    axes = [leaf(size, "a convolution's window runs over it") for size in sizes]
    zero = [False] * len(sizes)
    axes[out_batch], zero[out_batch] = left.axes[batch], left.zero_at(batch)
    axes[out_made], zero[out_made] = right.axes[made], right.zero_at(made)
    if right.path is not None:
        study.products.append(Product(right.path, (right.axes[made],), True))
    return [Labelled(tuple(axes), tuple(zero))]


def _top_k(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    axis = eqn.params.get("axis", len(operands[0].axes) - 1) % len(operands[0].axes)
    axes = list(operands[0].axes)
    protect(axes[axis], "`top_k` ranks along it")
    axes[axis] = leaf(eqn.outvars[0].aval.shape[axis], "`top_k` ranks along it")
    return [Labelled(tuple(axes), (False,) * len(axes)) for _ in eqn.outvars]


ARITHMETIC: dict[str, Handler] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor",
         "argmax", "argmin"), _reduce,
    ),
    **dict.fromkeys(("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"), _reduce_window),
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "rev": _along("dimensions"),
    "sort": _along("dimension"),
    "top_k": _top_k,
}  # fmt: skip
