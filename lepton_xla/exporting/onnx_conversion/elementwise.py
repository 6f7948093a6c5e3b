"""Operations that treat each element alone, and conversions."""

from __future__ import annotations

import dataclasses

import numpy as np

from lepton_xla.compiler.operations import Operation
from lepton_xla.exporting.onnx_conversion.converter import Converter, Rule
from lepton_xla.exporting.onnx_conversion.graph import Graph, Value, can_be_coded

_SAME = {
    "abs": "Abs", "add": "Add", "ceil": "Ceil", "cosine": "Cos", "divide": "Div", "erf": "Erf", "exponential": "Exp",
    "floor": "Floor", "log": "Log", "logistic": "Sigmoid", "maximum": "Max", "minimum": "Min", "multiply": "Mul",
    "negate": "Neg", "power": "Pow", "round_nearest_even": "Round", "select": "Where", "sign": "Sign", "sine": "Sin",
    "sqrt": "Sqrt", "subtract": "Sub", "tan": "Tan", "tanh": "Tanh",
}  # fmt: skip
_LOGIC = {
    "and": ("And", "BitwiseAnd"),
    "or": ("Or", "BitwiseOr"),
    "xor": ("Xor", "BitwiseXor"),
    "not": ("Not", "BitwiseNot"),
}
_COMPARISONS = {"EQ": "Equal", "LT": "Less", "LE": "LessOrEqual", "GT": "Greater", "GE": "GreaterOrEqual"}


def names(converter: Converter, operands: list[Value]) -> list[str]:
    """The operands' tensors, of one type, and not broadcast where another operand has the whole shape."""
    codes = any(value.is_coded for value in operands)
    alike: list[Value] = []
    for value in operands:
        if codes and not value.is_coded and can_be_coded(value):
            value = dataclasses.replace(value, name=converter.graph.cast(value.name, "float32"), narrow=None)
        alike.append(value)
    if all(value.narrow is not None for value in alike):
        return [value.name for value in alike]
    return [value.narrow or value.name for value in alike]


def _same(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    return converter.graph.node(_SAME[operation.name.partition(".")[2]], *names(converter, operands))


def _logic(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    logical, bitwise = _LOGIC[operation.name.partition(".")[2]]
    kind = logical if operation.types[0].dtype == "bool" else bitwise
    return converter.graph.node(kind, *names(converter, operands))


def _compare(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    direction = operation.attributes["comparison_direction"]
    found = names(converter, operands)
    if direction == "NE":
        return converter.graph.node("Not", converter.graph.node("Equal", *found))
    return converter.graph.node(_COMPARISONS[direction], *found)


def _clamp(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    low, value, high = (value.name for value in operands)
    return converter.graph.node("Min", converter.graph.node("Max", value, low), high)


def _rsqrt(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    return converter.graph.node("Reciprocal", converter.graph.node("Sqrt", operands[0].name))


def _remainder(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    return converter.graph.node("Mod", *names(converter, operands), fmod=1)


def _is_finite(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    kinds = (converter.graph.node(kind, operands[0].name) for kind in ("IsNaN", "IsInf"))
    return converter.graph.node("Not", converter.graph.node("Or", *kinds))


def _shifted(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    """The logarithm of one more, or one less than the exponential."""
    one = converter.graph.constant(1, operation.types[0].dtype)
    if operation.name.endswith("log_plus_one"):
        return converter.graph.node("Log", converter.graph.node("Add", operands[0].name, one))
    return converter.graph.node("Sub", converter.graph.node("Exp", operands[0].name), one)


def _erfc(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    one = converter.graph.constant(1, operation.types[0].dtype)
    return converter.graph.node("Sub", one, converter.graph.node("Erf", operands[0].name))


def _shift(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    """A shift in floats, which hold 16 bits times a power of two: ONNX shifts unsigned integers only, QONNX none."""
    (value, bits), graph, kind = operands, converter.graph, np.dtype(operation.types[0].dtype)
    if kind.itemsize > 2:
        raise converter.refuse(operation)
    # The result is as wide as the value: ONNX broadcasts the other one by itself.
    name = value.name if value.is_coded else graph.cast(value.name, "float32")
    turns = bits.name if bits.is_coded else graph.cast(bits.narrow or bits.name, "float32")
    factor = graph.node("Pow", graph.constant(2, np.float32), turns)
    if operation.name.endswith("shift_left"):
        made = _wrapped(graph, graph.node("Mul", name, factor), kind)
    else:
        made = graph.node("Floor", graph.node("Div", name, factor))
    return made if value.is_coded else graph.cast(made, kind.name)


def _bitcast(converter: Converter, operation: Operation, operands: list[Value]) -> str:
    """Integers of as many bits and another sign."""
    (value,), graph, kind = operands, converter.graph, np.dtype(operation.types[0].dtype)
    before = np.dtype(value.type.dtype)
    if {before.kind, kind.kind} - {"i", "u"} or before.itemsize != kind.itemsize:
        raise converter.refuse(operation)
    return _wrapped(graph, value.name, kind) if value.is_coded else graph.cast(value.name, kind.name)


def _wrapped(graph: Graph, name: str, kind: np.dtype) -> str:
    """Floats of integers, those outside of a dtype as they come in at its other end."""
    lowest, count = (graph.constant(number, np.float32) for number in (np.iinfo(kind).min, 1 << 8 * kind.itemsize))
    turns = graph.node("Floor", graph.node("Div", graph.node("Sub", name, lowest), count))
    return graph.node("Sub", name, graph.node("Mul", turns, count))


def _convert(converter: Converter, operation: Operation, operands: list[Value]) -> str | Value:
    (value,), graph, made = operands, converter.graph, operation.types[0]
    dtype = np.dtype(made.dtype)
    if converter.codes and dtype.kind in "iu" and dtype.itemsize == 1 and not value.is_coded:
        name = value.name if value.type.dtype == "float32" else graph.cast(value.name, "float32")
        return Value(converter.quant(name, dtype), made, is_coded=True)
    if value.is_coded:
        if can_be_coded(Value("", made)) or dtype == np.float32:
            return dataclasses.replace(value, type=made, array=None, is_coded=dtype != np.float32)
        return graph.cast(value.name, made.dtype)
    narrow = None if value.narrow is None else graph.cast(value.narrow, made.dtype)
    return Value(graph.cast(value.name, made.dtype), made, narrow=narrow)


RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_LOGIC, _logic),
    "compare": _compare,
    "clamp": _clamp,
    "rsqrt": _rsqrt,
    "erfc": _erfc,
    "shift_left": _shift,
    "shift_right_arithmetic": _shift,
    "bitcast_convert": _bitcast,
    "remainder": _remainder,
    "is_finite": _is_finite,
    "log_plus_one": _shifted,
    "exponential_minus_one": _shifted,
    "convert": _convert,
}
