"""Reads StableHLO through the MLIR that comes with jaxlib; only this file and `_xla.py` use it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from lepton_xla.compiler.operations import ArrayType, Module, Operation, Region

_FIELDS = {
    "ConvDimensionNumbers": (
        "input_batch_dimension", "input_feature_dimension", "input_spatial_dimensions",
        "kernel_input_feature_dimension", "kernel_output_feature_dimension", "kernel_spatial_dimensions",
        "output_batch_dimension", "output_feature_dimension", "output_spatial_dimensions",
    ),
    "DotDimensionNumbers": (
        "lhs_batching_dimensions", "rhs_batching_dimensions", "lhs_contracting_dimensions",
        "rhs_contracting_dimensions",
    ),
    "GatherDimensionNumbers": (
        "offset_dims", "collapsed_slice_dims", "operand_batching_dims", "start_indices_batching_dims",
        "start_index_map", "index_vector_dim",
    ),
}  # fmt: skip
_DTYPES = {"i1": "bool", "index": "int64", "f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16"}


def with_static_sizes(lowered: jax.stages.Lowered) -> bytes:
    """A program's StableHLO with all its sizes as those of its arguments."""
    module: Any = lowered.compiler_ir("stablehlo")
    text = mlir.module_to_bytecode(module)
    return _jax.mlir.refine_polymorphic_shapes(text, True, True)


def read_module(code: bytes) -> Module:
    """The operations of a program in StableHLO."""
    with mlir.make_ir_context():
        module = ir.Module.parse(code)
        numbers: dict[Any, int] = {}
        return Module(
            {
                ir.StringAttr(each.attributes["sym_name"]).value: _region(each.regions[0], numbers)
                for each in module.body.operations
            }
        )


def _region(region: Any, numbers: dict[Any, int]) -> Region:
    (block,) = region.blocks
    arguments = tuple(_number(value, numbers) for value in block.arguments)
    types = tuple(_type(value.type) for value in block.arguments)
    operations: list[Operation] = []
    results: tuple[int, ...] = ()
    for each in block.operations:
        operation = each.operation
        operands = tuple(_number(value, numbers) for value in operation.operands)
        if operation.name in ("stablehlo.return", "func.return"):
            results = operands
            continue
        made = tuple(_number(value, numbers) for value in operation.results)
        kinds = tuple(_type(value.type) for value in operation.results)
        attributes = {name: _plain(operation.attributes[name]) for name in operation.attributes}
        inner = tuple(_region(part, numbers) for part in operation.regions)
        operations.append(Operation(operation.name, operands, made, kinds, attributes, inner))
    return Region(arguments, types, tuple(operations), results)


def _number(value: Any, numbers: dict[Any, int]) -> int:
    return numbers.setdefault(value, len(numbers))


def _type(kind: Any) -> ArrayType:
    if not isinstance(kind, ir.RankedTensorType):  # such as a token
        return ArrayType((), str(kind))
    sizes = tuple(None if kind.is_dynamic_dim(axis) else kind.get_dim_size(axis) for axis in range(kind.rank))
    name = str(kind.element_type)
    if name not in _DTYPES and not name.startswith("f8"):
        name = name.replace("ui", "uint") if name.startswith("ui") else name.replace("i", "int", 1)
    return ArrayType(sizes, _DTYPES.get(name, name))


def _plain(attribute: Any) -> Any:
    if isinstance(attribute, (ir.IntegerAttr, ir.FloatAttr, ir.StringAttr, ir.BoolAttr, ir.FlatSymbolRefAttr)):
        return attribute.value
    if isinstance(attribute, (ir.DenseI64ArrayAttr, ir.DenseBoolArrayAttr, ir.ArrayAttr)):
        return tuple(_plain(each) if isinstance(each, ir.Attribute) else each for each in attribute)
    if isinstance(attribute, ir.DenseElementsAttr):
        return _elements(attribute)
    for name, fields in _FIELDS.items():
        kind = getattr(stablehlo, name)
        if kind.isinstance(attribute):
            found = kind(attribute)
            values = {field: getattr(found, field) for field in fields}
            return {field: value if isinstance(value, int) else tuple(value) for field, value in values.items()}
    if stablehlo.ComparisonDirectionAttr.isinstance(attribute):
        return stablehlo.ComparisonDirectionAttr(attribute).value
    return str(attribute)


def _elements(attribute: Any) -> np.ndarray:
    kind = _type(attribute.type)
    if kind.dtype == "bfloat16":  # MLIR hands its bits out under no type that NumPy knows
        import ml_dtypes

        values = [float(value) for value in ir.DenseFPElementsAttr(attribute)]
        return np.array(values, ml_dtypes.bfloat16).reshape(kind.sizes)
    return np.array(attribute).astype(kind.dtype).reshape(kind.sizes)
