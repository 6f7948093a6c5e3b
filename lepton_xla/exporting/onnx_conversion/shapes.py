"""Operations that move elements: shapes, slices, gathers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lepton_xla.compiler.operations import Operation
from lepton_xla.exporting.onnx_conversion.converter import Converter, Rule
from lepton_xla.exporting.onnx_conversion.graph import Graph, Value


def _reshape(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    graph = converter.graph
    if len(operands) == 1:
        return graph.reshape(operands[0].name, [(size, "") for size in operation.types[0].shape])
    return graph.node("Reshape", operands[0].name, graph.shape(operands[1]), allowzero=1)


def _broadcast(converter: Converter, operation: Operation, operands: list[Value]) -> Value:
    graph, made = converter.graph, operation.types[0]
    places = operation.attributes["broadcast_dimensions"]
    name = graph.transpose(operands[0].name, tuple(int(place) for place in np.argsort(places)))
    added = [axis for axis in range(len(made.shape)) if axis not in places]
    narrow = graph.node("Unsqueeze", name, graph.sizes(*added)) if added else name
    wanted = graph.shape(operands[1]) if len(operands) > 1 else graph.sizes(*made.sizes)
    if made.dtype != "bfloat16" or operands[0].is_coded:
        return Value(graph.node("Expand", narrow, wanted), made, narrow=narrow)
    # ONNX Runtime expands none of these.
    wide = graph.node("Expand", graph.cast(narrow, "float32"), wanted)
    return Value(graph.cast(wide, "bfloat16"), made, narrow=narrow)


def _transpose(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    return converter.graph.transpose(operands[0].name, operation.attributes["permutation"])


def _concatenate(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    return converter.graph.node("Concat", *(value.name for value in operands), axis=operation.attributes["dimension"])


def _slice(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    graph = converter.graph
    if len(operands) == 1:
        vectors = [graph.sizes(*operation.attributes[key]) for key in ("start_indices", "limit_indices", "strides")]
    else:
        vectors = [graph.shape(value) for value in operands[1:]]
    axes = graph.sizes(*range(len(operation.types[0].shape)))
    return graph.node("Slice", operands[0].name, vectors[0], vectors[1], axes, vectors[2])


def _reverse(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    graph, axes = converter.graph, operation.attributes["dimensions"]
    last, end, steps = (graph.sizes(*[number] * len(axes)) for number in (-1, np.iinfo(np.int64).min, -1))
    return graph.node("Slice", operands[0].name, last, end, graph.sizes(*axes), steps)


def _pad(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    given = operation.attributes
    if any(given["interior_padding"]):
        raise converter.refuse(operation, "padding between elements")
    pads = converter.graph.sizes(*given["edge_padding_low"], *given["edge_padding_high"])
    return converter.graph.node("Pad", operands[0].name, pads, operands[1].name)


def _size(converter: Converter, operation: Operation, operands: list[Value]) -> str | Value:
    axis, graph = operation.attributes["dimension"], converter.graph
    known = operands[0].type.shape[axis]
    if known is not None:
        array = np.array(known, np.int32)
        return Value(graph.constant(array), operation.types[0], array)
    return graph.cast(graph.reshape(graph.size_of(operands[0].name, axis), []), "int32")


def _iota(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    graph, made = converter.graph, operation.types[0]
    axis = operation.attributes["iota_dimension"]
    shape = graph.shape(operands[0]) if operands else graph.sizes(*made.sizes)
    size = graph.reshape(graph.node("Gather", shape, graph.constant(axis, np.int64)), [])
    line = graph.node("Range", graph.constant(0, np.int64), size, graph.constant(1, np.int64))
    sizes = [-1 if place == axis else 1 for place in range(len(made.shape))]
    wide = graph.node("Reshape", line, graph.sizes(*sizes))
    return graph.cast(graph.node("Expand", wide, shape), made.dtype)


def _inside(graph: Graph, array: Value, axes: Sequence[int], sizes: Sequence[int] | str, starts: str) -> str:
    """Starts of slices of these sizes, or those in a tensor: StableHLO moves them inside the array, ONNX does not."""
    known = [array.type.shape[axis] for axis in axes]
    if None in known or isinstance(sizes, str):
        lengths = graph.node("Concat", *(graph.size_of(array.name, axis) for axis in axes), axis=0)
        last = graph.node("Sub", lengths, sizes if isinstance(sizes, str) else graph.sizes(*sizes))
    else:
        last = graph.sizes(*((length or 0) - size for length, size in zip(known, sizes, strict=True)))
    return graph.node("Max", graph.node("Min", starts, last), graph.sizes(0))


def _sliced(
    graph: Graph, array: Value, axes: Sequence[int], sizes: Sequence[int] | str, starts: Sequence[Value]
) -> str:
    """A slice of these sizes, or those in a tensor, from scalars or one vector."""
    known = [array.type.shape[axis] for axis in axes]
    places = [each.array for each in starts]
    if isinstance(sizes, str):
        start = _inside(graph, array, axes, sizes, _vector(graph, starts))
        end = graph.node("Add", start, sizes)
    elif None not in known and all(place is not None for place in places):
        last = np.subtract(known, sizes)  # pyright: ignore
        first = np.clip(np.concatenate([np.ravel(place) for place in places]).astype(np.int64), 0, last)  # pyright: ignore
        start, end = graph.sizes(*first), graph.sizes(*(first + sizes))
    else:
        start = _inside(graph, array, axes, sizes, _vector(graph, starts))
        end = graph.node("Add", start, graph.sizes(*sizes))
    return graph.node("Slice", array.name, start, end, graph.sizes(*axes))


def _one_slice(
    graph: Graph, array: Value, indices: Value, axes: Sequence[int], sizes: Sequence[int] | str, dropped: Sequence[int]
) -> str:
    found = _sliced(graph, array, axes, sizes, [indices])
    return graph.node("Squeeze", found, graph.sizes(*dropped)) if dropped else found


def _vector(graph: Graph, scalars: Sequence[Value]) -> str:
    parts = [graph.node("Reshape", each.name, graph.sizes(-1)) for each in scalars]
    return graph.cast(graph.node("Concat", *parts, axis=0), "int64")


def _dynamic_slice(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    graph, sizes = converter.graph, operation.attributes["slice_sizes"]
    return _sliced(graph, operands[0], range(len(sizes)), sizes, operands[1:])


def _update(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    graph, (array, part) = converter.graph, operands[:2]
    sizes = zip(array.type.shape, part.type.shape, operands[2:], strict=True)
    # A symbolic axis that is written from its start is taken to be whole; were it not, Concat would refuse.
    axes = [
        axis
        for axis, (size, new, start) in enumerate(sizes)
        if size != new or (size is None and (start.array is None or start.array.any()))
    ]
    if len(axes) != 1 or part.type.shape[axes[0]] is None:
        raise converter.refuse(operation, "an update of a part of several axes")
    (axis,) = axes
    size = part.type.shape[axis] or 0
    start = _inside(graph, array, [axis], [size], _vector(graph, [operands[2 + axis]]))
    before = graph.node("Slice", array.name, graph.sizes(0), start, graph.sizes(axis))
    end = graph.node("Add", start, graph.sizes(size))
    after = graph.node("Slice", array.name, end, graph.size_of(array.name, axis), graph.sizes(axis))
    return graph.node("Concat", before, part.name, after, axis=axis)


def _gather(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    """One slice, or a look-up of whole slices by the indices of one or more axes."""
    graph, (array, indices) = converter.graph, operands[:2]
    numbers = operation.attributes["dimension_numbers"]
    taken, offsets = numbers["start_index_map"], numbers["offset_dims"]
    dropped = numbers["collapsed_slice_dims"]
    kept = [axis for axis in range(len(array.type.shape)) if axis not in dropped]
    sizes = dict.fromkeys(dropped, 1) | {
        axis: operation.types[0].shape[place] for axis, place in zip(kept, offsets, strict=False)
    }
    vector = numbers["index_vector_dim"]
    if indices.type.shape == (len(taken),) and vector == 0:
        wanted = [sizes[axis] for axis in taken]
        if None not in wanted:
            return _one_slice(graph, array, indices, taken, [size or 0 for size in wanted], dropped)
        if len(operands) > 2:
            those = graph.node("Gather", graph.shape(operands[2]), graph.sizes(*taken))
            return _one_slice(graph, array, indices, taken, those, dropped)
    whole = [axis for axis in range(len(array.type.shape)) if axis not in taken]
    if (
        numbers["operand_batching_dims"]
        or sorted(taken) != sorted(dropped)
        or any(array.type.shape[axis] not in (None, sizes[axis]) for axis in whole)
    ):
        raise converter.refuse(operation, "a gather of parts of slices")
    rank = len(indices.type.shape)
    places = graph.cast(indices.name, "int64")
    if vector == rank:
        places = graph.node("Unsqueeze", places, graph.sizes(rank))
        rank += 1
    else:
        places = graph.transpose(places, (*(axis for axis in range(rank) if axis != vector), vector))
    places = _inside(graph, array, taken, [1] * len(taken), places)
    found = graph.node("GatherND", graph.transpose(array.name, (*taken, *whole)), places)
    # GatherND puts the slices' axes last.
    count = rank - 1 + len(whole)
    batch = [axis for axis in range(count) if axis not in offsets]
    order = [0] * count
    for source, axis in enumerate((*batch, *offsets)):
        order[axis] = source
    return graph.transpose(found, tuple(order))


RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "dynamic_reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "dynamic_broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "slice": _slice,
    "real_dynamic_slice": _slice,
    "reverse": _reverse,
    "pad": _pad,
    "get_dimension_size": _size,
    "iota": _iota,
    "dynamic_iota": _iota,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _update,
    "gather": _gather,
    "dynamic_gather": _gather,
}
