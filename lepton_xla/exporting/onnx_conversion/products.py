"""Operations that combine elements: products, convolutions, windows, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lepton_xla.compiler.operations import Operation, Region
from lepton_xla.exporting.onnx_conversion.converter import Converter, Rule
from lepton_xla.exporting.onnx_conversion.graph import Graph, Value

_REDUCTIONS = {
    "stablehlo.add": ("ReduceSum", "Add", 0.0),
    "stablehlo.multiply": ("ReduceProd", "Mul", 1.0),
    "stablehlo.maximum": ("ReduceMax", "Max", -np.inf),
    "stablehlo.minimum": ("ReduceMin", "Min", np.inf),
    "stablehlo.and": ("ReduceMin", "And", True),
    "stablehlo.or": ("ReduceMax", "Or", False),
}
# ONNX Runtime's convolution of integers takes them unsigned.
_MIDDLE = 128


def _parts(graph: Graph, value: Value, axes: Sequence[int]) -> list[tuple[int | None, str]]:
    return [
        (size, "" if size is not None else graph.size_of(value.name, axis))
        for axis, size in ((axis, value.type.shape[axis]) for axis in axes)
    ]


def _joined(parts: list[tuple[int | None, str]]) -> tuple[int | None, str]:
    """One size of all, if at most one of several is unknown."""
    sizes = [size for size, _ in parts]
    return (None if None in sizes else int(np.prod(sizes, dtype=np.int64)), "")  # pyright: ignore


def _matrix(graph: Graph, value: Value, groups: tuple[Sequence[int], Sequence[int], Sequence[int]]) -> str:
    """The operand with its axes in this order, each of the two last groups as one axis."""
    batch, first, second = groups
    name = graph.transpose(value.name, (*batch, *first, *second))
    if len(first) == len(second) == 1:
        return name
    sizes = [*_parts(graph, value, batch)]
    for group in (first, second):
        parts = _parts(graph, value, group)
        size, vector = _joined(parts)
        if size is None and any(each is None for each, _ in sizes):  # a second unknown size is computed
            vectors = [inner if each is None else graph.sizes(each) for each, inner in parts]
            vector = vectors[0]
            for each in vectors[1:]:
                vector = graph.node("Mul", vector, each)
        sizes.append((size, vector))
    return graph.reshape(name, sizes)


def _dot(converter: Converter, operation: Operation, operands: list[Value]) -> str | Value:
    graph, (left, right) = converter.graph, operands
    numbers = operation.attributes["dot_dimension_numbers"]
    sides = []
    for side, value in (("lhs", left), ("rhs", right)):
        batch, contracted = (numbers[f"{side}_{kind}_dimensions"] for kind in ("batching", "contracting"))
        free = [axis for axis in range(len(value.type.shape)) if axis not in (*batch, *contracted)]
        sides.append((batch, free, contracted))
    (batch, left_free, left_contracted), (right_batch, right_free, right_contracted) = sides
    # MatMul takes any number of axes on the left where nothing is batched.
    plain = not batch and len(left_contracted) == 1 and left_contracted[0] == len(left.type.shape) - 1 and left_free
    first = left.name if plain else _matrix(graph, left, (batch, left_free, left_contracted))
    second = _matrix(graph, right, (right_batch, right_contracted, right_free))
    made = operation.types[0]
    if _is_integer(left) and not (left.is_coded or right.is_coded):
        if not (left.type.dtype.endswith("int8") and right.type.dtype.endswith("int8") and made.dtype == "int32"):
            raise converter.refuse(operation, f"a product of {left.type.dtype} and {right.type.dtype}")
        # The maximum changes nothing. Without it ONNX Runtime 1.32 joins the product and the scales that follow, and
        # its answers are off by up to 0.3 %.
        found = graph.node("MatMulInteger", first, second)
        found = graph.node("Max", found, graph.constant(np.iinfo(np.int32).min, np.int32))
    else:
        found = graph.node("MatMul", first, second)
    if left.type.dtype != made.dtype and not _is_integer(left):
        found = graph.cast(found, made.dtype)
    if (plain or len(left_free) == 1) and len(right_free) == 1:
        return found
    parts = [
        *_parts(graph, left, batch),
        *_parts(graph, left, left_free),
        *_parts(graph, right, right_free),
    ]
    return graph.reshape(found, parts)


def _is_integer(value: Value) -> bool:
    return np.dtype(value.type.dtype).kind in "iu"


def _convolution(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    graph, (left, right) = converter.graph, operands
    given = operation.attributes
    numbers = given["dimension_numbers"]
    spatial = len(numbers["input_spatial_dimensions"])
    if any(each != 1 for each in given.get("lhs_dilation") or ()) or given["batch_group_count"] != 1:
        raise converter.refuse(operation, "a transposed convolution")
    if any(given.get("window_reversal") or ()):
        raise converter.refuse(operation, "a reversed window")
    image = graph.transpose(
        left.name,
        (numbers["input_batch_dimension"], numbers["input_feature_dimension"], *numbers["input_spatial_dimensions"]),
    )
    kernel = graph.transpose(
        right.name,
        (
            numbers["kernel_output_feature_dimension"],
            numbers["kernel_input_feature_dimension"],
            *numbers["kernel_spatial_dimensions"],
        ),
    )
    padding = np.asarray(given["padding"] if "padding" in given else np.zeros((spatial, 2)), np.int64)
    options: dict[str, Any] = {
        "strides": list(given.get("window_strides") or [1] * spatial),
        "dilations": list(given.get("rhs_dilation") or [1] * spatial),
        "pads": padding.T.reshape(-1).tolist(),
        "group": given["feature_group_count"],
    }
    if _is_integer(left) and not (left.is_coded or right.is_coded):
        middle = graph.constant(_MIDDLE, np.uint8)
        found = graph.node("ConvInteger", _unsigned(graph, image), _unsigned(graph, kernel), middle, middle, **options)
    else:
        found = graph.node("Conv", image, kernel, **options)
    order = (
        numbers["output_batch_dimension"],
        numbers["output_feature_dimension"],
        *numbers["output_spatial_dimensions"],
    )
    return graph.transpose(found, tuple(int(place) for place in np.argsort(order)))


def _unsigned(graph: Graph, name: str) -> str:
    moved = graph.node("Add", graph.cast(name, "int32"), graph.constant(_MIDDLE, np.int32))
    return graph.cast(moved, "uint8")


def _combination(converter: Converter, operation: Operation) -> tuple[str, str, float]:
    """ONNX's reduction, its operation on two, and where it starts, of what a reduction does with two elements."""
    body: Region = operation.regions[0]
    if len(body.operations) != 1 or body.operations[0].name not in _REDUCTIONS:
        raise converter.refuse(operation, "a reduction by a function of its own")
    return _REDUCTIONS[body.operations[0].name]


def _reduce(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    graph, (value, start) = converter.graph, operands
    kind, pair, neutral = _combination(converter, operation)
    axes = graph.sizes(*operation.attributes["dimensions"])
    logical = value.type.dtype == "bool"
    found = graph.node(kind, graph.cast(value.name, "int32") if logical else value.name, axes, keepdims=0)
    if logical:
        found = graph.cast(found, "bool")
    known = start.array is not None and (_starts_at(start.array, neutral))
    return found if known else graph.node(pair, found, start.name)


def _starts_at(array: np.ndarray, neutral: float) -> bool:
    if array.dtype.kind in "iu" and np.isinf(neutral):
        limits = np.iinfo(array.dtype)
        return int(array) == (limits.min if neutral < 0 else limits.max)
    return bool(array == neutral)


def _window(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    """Pooling: ONNX pools the last axes of what has two before them."""
    graph, (value, start) = converter.graph, operands
    _, _, neutral = _combination(converter, operation)
    given, rank = operation.attributes, len(value.type.shape)
    kinds = {"stablehlo.maximum": "MaxPool", "stablehlo.add": "AveragePool"}
    kind = kinds.get(operation.regions[0].operations[0].name)
    window = list(given["window_dimensions"])
    ones = [1] * rank
    strides, dilations = (list(given.get(key) or ones) for key in ("window_strides", "window_dilations"))
    padding = np.asarray(given["padding"] if "padding" in given else np.zeros((rank, 2)), np.int64)
    pooled = [axis for axis in range(rank) if (window[axis], strides[axis], *padding[axis]) != (1, 1, 0, 0)]
    others = [axis for axis in range(rank) if axis not in pooled]
    if kind is None or start.array is None or not _starts_at(start.array, neutral) or len(others) > 2:
        raise converter.refuse(operation, "windows that are no pooling")
    if any(each != 1 for each in given.get("base_dilations") or ones):
        raise converter.refuse(operation, "a dilated input")
    order = (*others, *pooled)
    name = graph.transpose(value.name, order)
    added = list(range(2 - len(others)))
    if added:
        name = graph.node("Unsqueeze", name, graph.sizes(*added))
    options: dict[str, Any] = {
        "kernel_shape": [window[axis] for axis in pooled],
        "strides": [strides[axis] for axis in pooled],
        "dilations": [dilations[axis] for axis in pooled],
        "pads": padding[pooled].T.reshape(-1).tolist(),
    }
    if kind == "AveragePool":
        options["count_include_pad"] = 1
    found = graph.node(kind, name, **options)
    if kind == "AveragePool":
        count = float(np.prod([window[axis] for axis in pooled]))
        found = graph.node("Mul", found, graph.constant(count, value.type.dtype))
    if added:
        found = graph.node("Squeeze", found, graph.sizes(*added))
    return graph.transpose(found, tuple(int(place) for place in np.argsort(order)))


RULES: dict[str, Rule] = {
    "dot_general": _dot,
    "convolution": _convolution,
    "reduce": _reduce,
    "reduce_window": _window,
}
