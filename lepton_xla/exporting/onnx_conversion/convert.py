"""A whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.compiler.operations import Module
from lepton_xla.exporting.onnx_conversion import elementwise, products, shapes
from lepton_xla.exporting.onnx_conversion.converter import Converter
from lepton_xla.exporting.onnx_conversion.graph import QONNX_DOMAIN, Graph, Value, read_by

# The first with integers of 4 bits, and the file format that it came with.
OPSET = 21
_IR_VERSION = 10


def to_onnx(
    onnx: Any,
    module: Module,
    weights: Sequence[np.ndarray],
    inputs: Mapping[str, tuple[int | str, ...]],
    outputs: Mapping[str, tuple[int | str, ...]],
    *,
    codes: bool,
    name: str,
) -> Any:
    """Make the ONNX model of a program.

    Args:
        onnx: the package.
        module: the program, a function of weights and inputs.
        weights: in the order of the program's first arguments.
        inputs: names and shapes of its other arguments.
        outputs: names and shapes of its results.
        codes: whether to write QONNX: small integers as floats behind Quant.
        name: of the model.

    Raises:
        UnsupportedError: if ONNX cannot hold one of the program's operations.
    """
    graph = Graph(onnx)
    rules = elementwise.RULES | shapes.RULES | products.RULES
    converter = Converter(module, graph, rules, codes=codes, format="qonnx" if codes else "onnx")
    main = module.functions["main"]
    types = main.types
    arguments = [
        converter.weight(array, Value("", kind)) for array, kind in zip(weights, types[: len(weights)], strict=True)
    ]
    taken = [Value(each, kind) for each, kind in zip(inputs, types[len(weights) :], strict=True)]
    results = converter.region(main, [*arguments, *taken], {})
    for each, value in zip(outputs, results, strict=True):
        last = graph.cast(value.name, value.type.dtype) if value.is_coded else value.name
        graph.nodes.append(onnx.helper.make_node("Identity", [last], [each]))
    nodes = graph.without_dead_nodes(list(outputs))
    read = {name for node in nodes for name in read_by(node)}
    made = onnx.helper.make_graph(
        nodes,
        name,
        [_info(onnx, graph, value, shape) for value, shape in zip(taken, inputs.values(), strict=True)],
        [
            _info(onnx, graph, Value(each, value.type), outputs[each])
            for each, value in zip(outputs, results, strict=True)
        ],
        [
            onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), each)
            for each, array in graph.initializers.items()
            if each in read
        ],
    )
    domains = [("", OPSET), *([(QONNX_DOMAIN, 1)] if codes else [])]
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in domains]
    return onnx.helper.make_model(made, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="lepton_xla")


def _info(onnx: Any, graph: Graph, value: Value, shape: tuple[int | str, ...]) -> Any:
    return onnx.helper.make_tensor_value_info(value.name, graph.dtype(value.type.dtype), list(shape))
