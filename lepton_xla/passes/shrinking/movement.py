"""How operations that move elements relate the axes of their operands and results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lepton_xla.passes.core.walker import Context
from lepton_xla.passes.shrinking.dimensions import (
    Dimension,
    Kept,
    concat,
    is_protected,
    leaf,
    product,
    protect,
    reshaped,
    size_of,
    split_off,
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


def shaped(study: Findings, context: Context, outs: list[Labelled], parameter: str) -> list[Labelled]:
    """Notes that a parameter holds the shape of the result."""
    study.changes[context.key] = lambda kept: {parameter: tuple(size_of(d, kept) for d in outs[0].axes)}
    return outs


def _reshape(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    operand, sizes = operands[0], eqn.outvars[0].aval.shape
    if eqn.params.get("dimensions") is not None or 0 in sizes:
        return opaque(study, context, eqn, operands)
    axes: list[Dimension | None] = [None] * len(sizes)
    zero = [True] * len(sizes)
    for source, target in blocks([d.size for d in operand.axes], sizes):
        parts = [operand.axes[k] for k in source]
        flag = all(operand.zero_at(k) for k in source)
        why = "a `reshape` cuts across it"
        for k, dimension in zip(target, reshaped(product(parts), [sizes[k] for k in target], why), strict=True):
            axes[k], zero[k] = dimension, flag
    found = tuple(leaf(1) if dimension is None else dimension for dimension in axes)
    out = Labelled(found, tuple(zero), operand.path, operand.means)
    return shaped(study, context, [out], "new_sizes")


def blocks(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes that a reshape maps to each other, ignoring sizes of one."""
    source = [k for k, size in enumerate(before) if size != 1]
    target = [k for k, size in enumerate(after) if size != 1]
    found: list[tuple[list[int], list[int]]] = []
    while source and target:
        pairs = sorted(
            ((p, q) for p in range(1, len(source) + 1) for q in range(1, len(target) + 1)), key=lambda pq: sum(pq)
        )
        p, q = next(
            (
                (p, q)
                for p, q in pairs
                if math.prod(before[k] for k in source[:p]) == math.prod(after[k] for k in target[:q])
            ),
            (len(source), len(target)),
        )
        found.append((source[:p], target[:q]))
        source, target = source[p:], target[q:]
    return found


def _broadcast_in_dim(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    operand, sizes = operands[0], eqn.outvars[0].aval.shape
    nothing = not operand.axes and literal(eqn.invars[0]) == 0
    axes, zero = [leaf(size) for size in sizes], [nothing] * len(sizes)
    for k, axis in enumerate(eqn.params["broadcast_dimensions"]):
        if operand.axes[k].size == sizes[axis]:
            axes[axis], zero[axis] = operand.axes[k], operand.zero_at(k)
    out = Labelled(tuple(axes), tuple(zero), operand.path, operand.means)
    return shaped(study, context, [out], "shape")


def _iota(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del operands
    axes = tuple(map(leaf, eqn.outvars[0].aval.shape))
    protect(axes[eqn.params["dimension"]], "`iota` counts along it")
    return shaped(study, context, [Labelled(axes, (False,) * len(axes))], "shape")


def random_bits(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Handler of random numbers where a smaller draw may have other values, as for dropout."""
    keys = operands[0].axes
    axes = (*keys, *map(leaf, eqn.params["shape"]))
    study.changes[context.key] = lambda kept: {"shape": tuple(size_of(d, kept) for d in axes[len(keys) :])}
    return [Labelled(axes, (False,) * len(axes))]


def _transpose(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    return [taken(operands[0], eqn.params["permutation"])]


def _squeeze(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    gone = {axis % len(operands[0].axes) for axis in eqn.params["dimensions"]}
    return [taken(operands[0], [k for k in range(len(operands[0].axes)) if k not in gone])]


def taken(operand: Labelled, order: Sequence[int]) -> Labelled:
    axes, zero = tuple(operand.axes[k] for k in order), tuple(operand.zero[k] for k in order)
    return Labelled(axes, zero, operand.path, operand.means)


def _tile(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    axes = tuple(
        product([leaf(count, "`tile` repeats it"), dimension])
        for count, dimension in zip(eqn.params["reps"], operands[0].axes, strict=True)
    )
    return [Labelled(axes, tuple(operands[0].zero_at(k) for k in range(len(axes))))]


def _concatenate(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    axis = eqn.params["dimension"]
    for other in operands[1:]:
        for k, (a, b) in enumerate(zip(operands[0].axes, other.axes, strict=True)):
            if k != axis:
                unify(a, b, "axes that do not line up meet in `concatenate`")
    axes = list(operands[0].axes)
    axes[axis] = concat([operand.axes[axis] for operand in operands])
    return [Labelled(tuple(axes), every(operands))]


def _slice(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    params, operand = eqn.params, operands[0]
    strides = params["strides"] or (1,) * len(operand.axes)
    axes: list[Dimension] = []
    cuts: dict[int, list[Dimension]] = {}  # axis -> dimensions before the selected part
    for k, (dimension, start, stride) in enumerate(zip(operand.axes, params["start_indices"], strides, strict=True)):
        size = eqn.outvars[0].aval.shape[k]
        if size == dimension.size:
            axes.append(dimension)
            cuts[k] = []
        elif stride != 1 or size == 0 or is_protected(dimension):
            protect(dimension, "`slice` takes every other position of it" if stride != 1 else "`slice` cuts it")
            axes.append(leaf(size, "`slice` cuts it"))
        else:
            head, rest = (None, dimension) if start == 0 else split_off(dimension, start, "`slice` cuts across it")
            cuts[k] = [head] if head is not None else []
            axes.append(rest if rest.size == size else split_off(rest, size, "`slice` cuts across it")[0])

    def change(kept: Kept) -> dict[str, Any]:
        starts, limits = list(params["start_indices"]), list(params["limit_indices"])
        for k, before in cuts.items():
            starts[k] = sum(size_of(head, kept) for head in before)
            limits[k] = starts[k] + size_of(axes[k], kept)
        return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}

    study.changes[context.key] = change
    return [Labelled(tuple(axes), tuple(operand.zero_at(k) for k in range(len(axes))), operand.path)]


def _split(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    operand, axis = operands[0], eqn.params["axis"]
    parts: list[Dimension] = []
    rest = operand.axes[axis]
    for size in eqn.params["sizes"][:-1]:
        part, rest = split_off(rest, size, "`split` cuts across it")
        parts.append(part)
    parts.append(rest)
    study.changes[context.key] = lambda kept: {"sizes": tuple(size_of(part, kept) for part in parts)}
    return [
        Labelled((*operand.axes[:axis], part, *operand.axes[axis + 1 :]), operand.zero, operand.path) for part in parts
    ]


def _pad(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    operand, config = operands[0], eqn.params["padding_config"]
    empty = literal(eqn.invars[1]) == 0
    axes: list[Dimension] = []
    zero: list[bool] = []
    ends: dict[int, tuple[Dimension, Dimension]] = {}
    padded = any(tuple(entry) != (0, 0, 0) for entry in config)
    for k, (low, high, interior) in enumerate(config):
        dimension = operand.axes[k]
        zero.append(operand.zero_at(k) and (empty or not padded))
        if (low, high, interior) == (0, 0, 0):
            axes.append(dimension)
        elif is_protected(dimension) or interior or low < 0 or high < 0:
            protect(dimension, "`pad` changes it")
            axes.append(leaf(eqn.outvars[0].aval.shape[k], "`pad` changes it"))
        else:
            before, after = leaf(low), leaf(high)
            ends[k] = before, after
            axes.append(concat([before, dimension, after]))

    def change(kept: Kept) -> dict[str, Any]:
        entries = [
            (*(size_of(end, kept) for end in ends[k]), 0) if k in ends else entry for k, entry in enumerate(config)
        ]
        return {"padding_config": tuple(entries)}

    study.changes[context.key] = change
    return [Labelled(tuple(axes), tuple(zero))]


def _gather(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Axes that are read as a whole pass through; indexed axes are protected."""
    table, indices = operands
    numbers, slices = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    out, reason = eqn.outvars[0].aval.shape, "`gather` takes positions of it"
    axes: list[Dimension | None] = [None] * len(out)
    zero = [False] * len(out)
    for k, j in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        unify(table.axes[k], indices.axes[j], "axes that do not line up meet in `gather`")
    windows = [
        k for k in range(len(table.axes)) if k not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
    guard([table.axes[k] for k in numbers.collapsed_slice_dims], reason)
    whole: dict[int, Dimension] = {}
    for axis, k in zip(numbers.offset_dims, windows, strict=True):
        if slices[k] == table.axes[k].size:  # taken whole, so the only valid index is zero
            axes[axis], zero[axis], whole[k] = table.axes[k], table.zero_at(k), table.axes[k]
        else:
            protect(table.axes[k], reason)
            axes[axis] = leaf(out[axis], reason)
    rest = iter(indices.axes[:-1])
    if indices.axes:
        protect(indices.axes[-1], reason)
    found = tuple(next(rest) if dimension is None else dimension for dimension in axes)
    study.changes[context.key] = lambda kept: {
        "slice_sizes": tuple(size_of(whole[k], kept) if k in whole else size for k, size in enumerate(slices))
    }
    if table.path is not None:
        study.products.append(Product(table.path, tuple(whole.values()), False))
    return [Labelled(found, tuple(zero))]


def _scatter(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    """Axes that are written as a whole pass through; indexed axes are protected."""
    del study, context
    target, indices, updates = operands
    numbers, reason = eqn.params["dimension_numbers"], f"`{eqn.primitive.name}` writes to positions of it"
    guard(indices.axes, reason)
    skipped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [k for k in range(len(target.axes)) if k not in skipped]
    guard([target.axes[k] for k in skipped], reason)
    guard([d for k, d in enumerate(updates.axes) if k not in numbers.update_window_dims], reason)
    zero = [False] * len(target.axes)
    for axis, k in zip(numbers.update_window_dims, windows, strict=True):
        if updates.axes[axis].size == target.axes[k].size and k not in numbers.scatter_dims_to_operand_dims:
            unify(updates.axes[axis], target.axes[k], reason)
            zero[k] = updates.zero_at(axis) and target.zero_at(k)
        else:
            guard([updates.axes[axis], target.axes[k]], reason)
    return [Labelled(target.axes, tuple(zero))]


def _dynamic_slice(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    operand, sizes = operands[0], eqn.outvars[0].aval.shape
    axes: list[Dimension] = []
    for dimension, size in zip(operand.axes, sizes, strict=True):
        if size == dimension.size:
            axes.append(dimension)
        else:
            protect(dimension, "`dynamic_slice` takes positions of it")
            axes.append(leaf(size, "`dynamic_slice` takes positions of it"))
    zero = tuple(operand.zero_at(k) for k in range(len(axes)))
    return shaped(study, context, [Labelled(tuple(axes), zero, operand.path)], "slice_sizes")


def _dynamic_update_slice(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    target, update, reason = operands[0], operands[1], "`dynamic_update_slice` writes to positions of it"
    for a, b in zip(target.axes, update.axes, strict=True):
        if a.size == b.size:
            unify(a, b, reason)
        else:
            guard([a, b], reason)
    return [Labelled(target.axes, every([target, update]))]


def _stack(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    for other in operands[1:]:
        pair(operands[0].axes, other.axes, eqn)
    axis, axes, zero = eqn.params["axis"], list(operands[0].axes), list(every(operands))
    axes.insert(axis, leaf(len(operands), "`stack` makes it"))
    zero.insert(axis, False)
    return [Labelled(tuple(axes), tuple(zero))]


def _unstack(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context
    axis = eqn.params["axis"]
    protect(operands[0].axes[axis], "`unstack` takes each position of it")
    cut = taken(operands[0], [k for k in range(len(operands[0].axes)) if k != axis])
    return [cut for _ in eqn.outvars]


def _as_they_are(study: Findings, context: Context, eqn: Any, operands: list[Labelled]) -> list[Labelled]:
    del study, context, eqn
    return [Labelled(operand.axes, operand.zero, operand.path) for operand in operands]


MOVEMENT: dict[str, Handler] = {
    **dict.fromkeys(("device_put", "optimization_barrier"), _as_they_are),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"), _scatter),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}  # fmt: skip
