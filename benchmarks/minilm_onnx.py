"""MiniLM as an ONNX graph with both sizes symbolic, for the runtimes that take one.

Written node by node with the operators that those runtimes have fused kernels for (`LayerNormalization`, `Gelu`), so
that they are measured at their best.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from models.minilm import HEAD_DIM, HEADS, LAYERS, WIDTH
from onnx import TensorProto, helper, numpy_helper


class Graph:
    """Nodes and constants of a graph that is being written."""

    def __init__(self, weights: dict[str, Any]) -> None:
        self.weights = weights
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def weight(self, name: str, *, transpose: bool = False) -> str:
        value = np.asarray(self.weights[name])
        return self.constant(name, value.T if transpose else value)

    def linear(self, name: str, x: str) -> str:
        return self.op(
            "Add", self.op("MatMul", x, self.weight(name + ".weight", transpose=True)), self.weight(name + ".bias")
        )

    def norm(self, name: str, x: str) -> str:
        return self.op(
            "LayerNormalization", x, self.weight(name + ".weight"), self.weight(name + ".bias"), axis=-1, epsilon=1e-12
        )


def build(weights: dict[str, Any]) -> onnx.ModelProto:
    """The graph: `ids`, `mask` int32 [batch, seq] to `output` float32 [batch, 384].

    Args:
        weights: by checkpoint names, as `models.minilm.load_weights` gives them.
    """
    g = Graph(weights)
    ints = lambda name, *values: g.constant(name, np.array(values, np.int64))  # noqa: E731
    seq = g.op("Shape", "ids", start=1, end=2)
    places = g.op("Slice", g.weight("embeddings.position_embeddings.weight"), ints("zero", 0), seq, ints("axis0", 0))
    kinds = g.constant("kind", np.asarray(weights["embeddings.token_type_embeddings.weight"])[0])
    words = g.op("Gather", g.weight("embeddings.word_embeddings.weight"), "ids")
    hidden = g.norm("embeddings.LayerNorm", g.op("Add", g.op("Add", words, places), kinds))
    present = g.op("Cast", "mask", to=TensorProto.FLOAT)
    absent = g.op("Sub", g.constant("one", np.float32(1)), present)
    bias = g.op("Mul", g.op("Unsqueeze", absent, ints("axes12", 1, 2)), g.constant("far", np.float32(-1e9)))
    split, joined = ints("split", 0, 0, HEADS, HEAD_DIM), ints("joined", 0, 0, WIDTH)
    shrink = g.constant("shrink", np.float32(HEAD_DIM**-0.5))
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}."

        def heads(name: str, perm: list[int], layer: str = layer, hidden: str = hidden) -> str:
            projected = g.linear(layer + "attention.self." + name, hidden)
            return g.op("Transpose", g.op("Reshape", projected, split), perm=perm)

        query, key, value = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]), heads("value", [0, 2, 1, 3])
        scores = g.op("Softmax", g.op("Add", g.op("Mul", g.op("MatMul", query, key), shrink), bias), axis=-1)
        mixed = g.op("Transpose", g.op("MatMul", scores, value), perm=[0, 2, 1, 3])
        attended = g.linear(layer + "attention.output.dense", g.op("Reshape", mixed, joined))
        hidden = g.norm(layer + "attention.output.LayerNorm", g.op("Add", hidden, attended))
        wide = g.op("Gelu", g.linear(layer + "intermediate.dense", hidden))
        hidden = g.norm(layer + "output.LayerNorm", g.op("Add", hidden, g.linear(layer + "output.dense", wide)))
    share = g.op("Unsqueeze", present, ints("axis2", 2))
    total = g.op("ReduceSum", g.op("Mul", hidden, share), ints("axis1", 1), keepdims=0)
    pooled = g.op("Div", total, g.op("ReduceSum", share, "axis1", keepdims=0))
    length = g.op("ReduceL2", pooled, ints("axis_1", -1), keepdims=1)
    g.nodes.append(helper.make_node("Div", [pooled, length], ["output"], name="output"))
    graph = helper.make_graph(
        g.nodes,
        "minilm",
        [helper.make_tensor_value_info(name, TensorProto.INT32, ["batch", "seq"]) for name in ("ids", "mask")],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", WIDTH])],
        list(g.constants.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model
