"""MobileNetV2 and EfficientNet-B0 as ONNX graphs with batch norms folded, for the runtimes that take one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from minilm_onnx import Graph
from models import efficientnet, mobilenet
from models.untrained import SIZE
from onnx import TensorProto, helper

NAMES = ("mobilenetv2", "efficientnet-b0")


class _Network:
    """Layers of one network on a value of the graph, each with the weights of a Linen module."""

    def __init__(self, variables: Any, epsilon: float, activate: Callable[[Graph, str], str]) -> None:
        self.params, self.statistics = variables["params"], variables["batch_stats"]
        self.epsilon = epsilon
        self.graph = Graph({})
        self._activate = activate

    def activated(self, x: str) -> str:
        return self._activate(self.graph, x)

    def normed(self, x: str, module: tuple[str, ...], size: int, stride: int = 1) -> tuple[str, int]:
        """A convolution and its batch norm; the value and its height after it."""
        params, statistics = self.params, self.statistics
        for name in module:
            params, statistics = params[name], statistics[name]
        norm, found = params["BatchNorm_0"], statistics["BatchNorm_0"]
        scale = np.asarray(norm["scale"]) / np.sqrt(np.asarray(found["var"]) + self.epsilon)
        kernel = np.asarray(params["Conv_0"]["kernel"]) * scale
        bias = np.asarray(norm["bias"]) - np.asarray(found["mean"]) * scale
        return self.convolution(x, "/".join(module), kernel, bias, size, stride), -(-size // stride)

    def convolution(self, x: str, name: str, kernel: np.ndarray, bias: np.ndarray, size: int, stride: int = 1) -> str:
        """A convolution padded as XLA's SAME is; with one input channel in the kernel, a depthwise one."""
        window = kernel.shape[0]
        total = max((-(-size // stride) - 1) * stride + window - size, 0)
        low, high = total // 2, total - total // 2
        g = self.graph
        weight = g.constant(name + "/kernel", kernel.transpose(3, 2, 0, 1))
        attributes = {"kernel_shape": [window] * 2, "strides": [stride] * 2, "pads": [low, low, high, high]}
        groups = kernel.shape[3] if kernel.shape[2] == 1 and kernel.shape[3] > 1 and window > 1 else 1
        return g.op("Conv", x, weight, g.constant(name + "/bias", bias), group=groups, **attributes)

    def finished(self, x: str, name: str) -> onnx.ModelProto:
        """The means over positions, and the dense layer at the end."""
        g, head = self.graph, self.params["Dense_0"]
        flat = g.op("Flatten", g.op("GlobalAveragePool", x))
        kernel, bias = (g.constant(f"head/{part}", np.asarray(head[part])) for part in ("kernel", "bias"))
        g.nodes.append(helper.make_node("Gemm", [flat, kernel, bias], ["output"], name="output"))
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
        output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 1000])
        graph = helper.make_graph(g.nodes, name, [image], [output], list(g.constants.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model)
        return model


def build(name: str, variables: Any) -> onnx.ModelProto:
    """The graph of `image` float32 [batch, 3, 224, 224] to `output` float32 [batch, 1000].

    Args:
        name: one of `NAMES`.
        variables: of its Linen module.
    """
    plain = name == "mobilenetv2"
    net = _Network(variables, 1e-5, _relu6) if plain else _Network(variables, 1e-3, _silu)
    stages = mobilenet.STAGES if plain else [(wide, *rest) for wide, _, *rest in efficientnet.STAGES]
    x, size = net.normed("image", ("_Normed_0",), SIZE, 2)
    x, channels, index = net.activated(x), 32, 0
    for expansion, features, blocks, stride in stages:
        for block in range(blocks):
            module, step = f"_Block_{index}", 1 if block else stride
            layers = iter(f"_Normed_{layer}" for layer in range(3))
            y = net.activated(net.normed(x, (module, next(layers)), size)[0]) if expansion > 1 else x
            y, height = net.normed(y, (module, next(layers)), size, step)
            y = net.activated(y)
            y = y if plain else _excited(net, module, y)
            y = net.normed(y, (module, next(layers)), height)[0]
            x = net.graph.op("Add", x, y) if step == 1 and channels == features else y
            channels, size, index = features, height, index + 1
    return net.finished(net.activated(net.normed(x, ("_Normed_1",), size)[0]), name)


def _relu6(g: Graph, x: str) -> str:
    return g.op("Clip", x, g.constant("zero", np.float32(0)), g.constant("six", np.float32(6)))


def _silu(g: Graph, x: str) -> str:
    return g.op("Mul", x, g.op("Sigmoid", x))


def _excited(net: _Network, module: str, x: str) -> str:
    """Squeeze-excite."""
    params, g = net.params[module]["_SqueezeExcite_0"], net.graph
    y = g.op("GlobalAveragePool", x)
    for layer in ("Conv_0", "Conv_1"):
        kernel, bias = (np.asarray(params[layer][part]) for part in ("kernel", "bias"))
        y = net.convolution(y, f"{module}/{layer}", kernel, bias, 1)
        y = _silu(g, y) if layer == "Conv_0" else g.op("Sigmoid", y)
    return g.op("Mul", x, y)
