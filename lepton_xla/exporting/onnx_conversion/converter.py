"""Walks the operations of a program and appends what each becomes in ONNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import ml_dtypes  # noqa: F401 # pyright: ignore[reportUnusedImport] (with it NumPy knows int4 by name)
import numpy as np

from lepton_xla.compiler.operations import Module, Operation, Region
from lepton_xla.errors import UnsupportedError
from lepton_xla.exporting.onnx_conversion.folding import fold, is_float
from lepton_xla.exporting.onnx_conversion.graph import QONNX_DOMAIN, Graph, Value, can_be_coded

type Rule = Callable[[Converter, Operation, list[Value]], str | Value]
"""Appends the nodes of an operation with one result; the result, or its name."""

# Of more elements, those that fit into 4 bits are stored so.
_FEW = 16
_MOST_TURNS = 256
# What a program checks of its sizes; the graph's inputs have no others.
_CHECKS = "shape_assertion"


class Converter:
    """Converts regions into one graph.

    Attributes:
        graph: what is built.
        codes: whether integers of 8 bits and less become floats behind QONNX's Quant.
    """

    def __init__(self, module: Module, graph: Graph, rules: dict[str, Rule], *, codes: bool, format: str) -> None:
        self.graph = graph
        self.codes = codes
        self._module = module
        self._rules = rules
        self._format = format

    def refuse(self, operation: Operation, why: str = "") -> UnsupportedError:
        """The error for an operation that the format cannot hold."""
        name = operation.name
        if name.endswith("custom_call"):
            name = f"{name} @{operation.attributes.get('call_target_name')}"
        types = ", ".join(f"{each.dtype}{list(each.shape)}" for each in operation.types)
        return UnsupportedError(f"{self._format}: cannot hold {name} -> {types}{why and ': '}{why}")

    def weight(self, array: np.ndarray, value: Value) -> Value:
        """Make a weight an initializer; in QONNX a float32, behind a Quant if it is an integer."""
        dtype = array.dtype
        if self.codes and is_float(dtype) and dtype.itemsize < 4:
            return Value(self.graph.constant(array, np.float32), value.type, array, is_coded=True)
        if self.codes and dtype.kind in "iu" and dtype.itemsize == 1:
            name = self.quant(self.graph.constant(array, np.float32), dtype)
            return Value(name, value.type, array, is_coded=True)
        return Value(self.graph.constant(array), value.type, array)

    def quant(self, name: str, dtype: np.dtype) -> str:
        """QONNX's node that says that floats are integers of a dtype."""
        bits = 4 if dtype.name.endswith("int4") else 2 if dtype.name.endswith("int2") else 8 * dtype.itemsize
        one, zero, width = (self.graph.constant(number, np.float32) for number in (1, 0, bits))
        return self.graph.node(
            "Quant", name, one, zero, width, domain=QONNX_DOMAIN,
            signed=int(not dtype.name.startswith("u")), narrow=0, rounding_mode="ROUND",
        )  # fmt: skip

    def region(self, region: Region, arguments: Sequence[Value], outer: dict[int, Value]) -> list[Value]:
        """Append a region's operations; its results."""
        values = outer | dict(zip(region.arguments, arguments, strict=True))
        for operation in region.operations:
            made = self._operation(operation, [values[number] for number in operation.operands], values)
            values.update(zip(operation.results, made, strict=True))
        return [values[number] for number in region.results]

    def _operation(self, operation: Operation, operands: list[Value], values: dict[int, Value]) -> list[Value]:
        kind = operation.name.partition(".")[2]
        if kind == "constant":
            return [self._constant(operation)]
        if kind in ("call", "composite"):
            called = self._module.functions[operation.attributes["callee" if kind == "call" else "decomposition"]]
            return self.region(called, operands, {})
        if kind == "case" and operands[0].array is not None:
            return self.region(operation.regions[int(operands[0].array)], [], values)
        if kind == "optimization_barrier":
            return operands
        if kind == "custom_call" and _CHECKS in str(operation.attributes["call_target_name"]):
            return []
        if kind == "while":
            return (self._unrolled if self.codes else self._loop)(operation, operands, values)
        if operation.types and all(value.array is not None for value in operands):
            found = fold(operation, [value.array for value in operands if value.array is not None])
            if found is not None:
                return [self._known(found, operation)]
        rule = self._rules.get(kind)
        if rule is None or len(operation.types) != 1:
            raise self.refuse(operation)
        made = rule(self, operation, operands)
        if isinstance(made, str):
            made = Value(made, operation.types[0])
        is_coded = made.is_coded or (can_be_coded(made) and any(value.is_coded for value in operands))
        return [dataclasses.replace(made, is_coded=is_coded)]

    def _unrolled(self, operation: Operation, operands: list[Value], values: dict[int, Value]) -> list[Value]:
        """The body as often as it runs: QONNX has no loops."""
        condition, body = operation.regions
        for _ in range(_MOST_TURNS):
            goes_on = self.region(condition, operands, values)[0].array
            if goes_on is None:
                raise self.refuse(operation, "a loop whose turns depend on inputs")
            if not goes_on:
                return operands
            operands = self.region(body, operands, values)
        raise self.refuse(operation, f"a loop of more than {_MOST_TURNS} turns")

    def _loop(self, operation: Operation, operands: list[Value], values: dict[int, Value]) -> list[Value]:
        """A Loop; what its body passes on unchanged is read from outside."""
        condition, body = operation.regions
        changes = [
            index
            for index, (taken, given) in enumerate(zip(body.arguments, body.results, strict=True))
            if taken != given
        ]
        first = self.region(condition, operands, values)[0]
        outside, helper = self.graph, self.graph.onnx.helper
        self.graph = Graph(outside.onnx, outside)
        inside = list(operands)
        for index in changes:
            inside[index] = dataclasses.replace(
                operands[index], name=self.graph.name("carried"), array=None, narrow=None
            )
        made = self.region(body, inside, values)
        if any(made[index].is_coded != operands[index].is_coded for index in changes):
            raise self.refuse(operation, "a loop that carries codes")
        again = self.region(condition, made, values)[0]
        outputs = [self.graph.node("Identity", name) for name in (again.name, *(made[index].name for index in changes))]
        turn, going = (self.graph.name(kind) for kind in ("turn", "going"))
        graph = helper.make_graph(
            self.graph.without_dead_nodes(outputs),
            self.graph.name("body"),
            [
                helper.make_tensor_value_info(turn, self.graph.dtype("int64"), []),
                helper.make_tensor_value_info(going, self.graph.dtype("bool"), []),
                *(self.graph.info(inside[index].name, inside[index]) for index in changes),
            ],
            [
                helper.make_tensor_value_info(outputs[0], self.graph.dtype("bool"), []),
                *(self.graph.info(name, made[index]) for name, index in zip(outputs[1:], changes, strict=True)),
            ],
        )
        self.graph = outside
        initial = [operands[index].name for index in changes]
        found = outside.node("Loop", "", first.name, *initial, outputs=len(changes), body=graph)
        results = list(operands)
        for index, name in zip(changes, [found] if isinstance(found, str) else found, strict=True):
            results[index] = dataclasses.replace(operands[index], name=name, array=None, narrow=None)
        return results

    def _constant(self, operation: Operation) -> Value:
        array, value = operation.attributes["value"], Value("", operation.types[0])
        return (
            self.weight(array, value) if is_float(array.dtype) else Value(self.graph.constant(array), value.type, array)
        )

    def _known(self, array: np.ndarray, operation: Operation) -> Value:
        """What was computed, as an initializer that is used only if something reads it."""
        kind = operation.types[0]
        is_small = array.dtype == np.int8 and array.size > _FEW and array.min() >= -8 and array.max() <= 7
        stored = array.astype("int4") if is_small else array
        if self.codes and array.dtype.kind in "iu" and array.dtype.itemsize == 1:
            return Value(self.quant(self.graph.constant(array, np.float32), stored.dtype), kind, array, is_coded=True)
        name = self.graph.constant(stored)
        return Value(self.graph.cast(name, "int8") if is_small else name, kind, array)
