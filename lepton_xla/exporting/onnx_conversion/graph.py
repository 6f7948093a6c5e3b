"""An ONNX graph under construction."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lepton_xla.compiler.operations import ArrayType

QONNX_DOMAIN = "qonnx.custom_op.general"


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the program, as the graph names it.

    Attributes:
        name: of the tensor.
        type: its shape and dtype in StableHLO.
        array: its elements, if they do not depend on inputs.
        narrow: the tensor to use where ONNX broadcasts by itself, if this is a broadcast.
        is_coded: whether the graph holds these integers or short floats as float32, as QONNX does.
    """

    name: str
    type: ArrayType
    array: np.ndarray | None = None
    narrow: str | None = None
    is_coded: bool = False


def can_be_coded(value: Value) -> bool:
    """Whether QONNX may hold a value as float32: integers and short floats."""
    return value.type.dtype not in ("bool", "float32", "float64")


class Graph:
    """Nodes and initializers, in an order that ONNX accepts."""

    def __init__(self, onnx: Any, outer: Graph | None = None) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {} if outer is None else outer.initializers
        self._names: list[int] = [0] if outer is None else outer._names
        self._known: dict[Any, str] = {} if outer is None else outer._known

    def name(self, kind: str) -> str:
        """A new name."""
        self._names[0] += 1
        return f"{kind}_{self._names[0]}"

    def node(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append a node; the name of its output, or a list of them if there are several."""
        names = [self.name(kind.lower()) for _ in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: Any, dtype: Any = None) -> str:
        """The name of an initializer with these elements; small ones are shared."""
        array = np.asarray(array, dtype)
        key = (array.dtype, array.shape, array.tobytes()) if array.size <= 64 else id(array)
        if key not in self._known:
            self._known[key] = self.name("constant")
            self.initializers[self._known[key]] = array
        return self._known[key]

    def sizes(self, *sizes: int) -> str:
        """A constant vector of int64, as ONNX wants shapes and axes."""
        return self.constant(np.array(sizes, np.int64))

    def dtype(self, name: str) -> int:
        """ONNX's number of a dtype."""
        return self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name))

    def info(self, name: str, value: Value) -> Any:
        """What ONNX says of an input or output."""
        dtype = "float32" if value.is_coded else value.type.dtype
        return self.onnx.helper.make_tensor_value_info(name, self.dtype(dtype), list(value.type.shape))

    def cast(self, name: str, dtype: str) -> str:
        """Cast a tensor."""
        return self.node("Cast", name, to=self.dtype(dtype))

    def shape(self, value: Value) -> str:
        """The elements of a vector of StableHLO as a shape."""
        if value.array is not None:
            return self.sizes(*value.array.reshape(-1).tolist())
        return self.cast(value.name, "int64")

    def size_of(self, name: str, axis: int) -> str:
        """One size of a tensor, as a vector of one."""
        return self.node("Shape", name, start=axis, end=axis + 1)

    def reshape(self, name: str, parts: list[tuple[int | None, str]]) -> str:
        """Reshape to these sizes; an unknown one is given by the vector of one beside it."""
        unknown = [size for size, _ in parts if size is None]
        if len(unknown) <= 1:
            wanted = self.sizes(*(-1 if size is None else size for size, _ in parts))
        else:
            vectors = [vector if size is None else self.sizes(size) for size, vector in parts]
            wanted = self.node("Concat", *vectors, axis=0)
        # A size of zero is one, and not the input's.
        return self.node("Reshape", name, wanted, allowzero=int(any(size == 0 for size, _ in parts)))

    def transpose(self, name: str, order: tuple[int, ...]) -> str:
        """Transpose, unless it is the identity."""
        return name if order == tuple(range(len(order))) else self.node("Transpose", name, perm=list(order))

    def without_dead_nodes(self, outputs: list[str]) -> list[Any]:
        """The nodes that the outputs need."""
        needed, kept = set(outputs), list[Any]()
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(read_by(node))
        return kept[::-1]


def read_by(node: Any) -> set[str]:
    """The tensors that a node reads, those that its bodies read included."""
    found = set(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            found |= read_by(inner)
        found.update(output.name for output in attribute.g.output)
    return found
