"""Converts a program's StableHLO to an ONNX graph, operation by operation."""

from lepton_xla.exporting.onnx_conversion.convert import OPSET, to_onnx

__all__ = ["OPSET", "to_onnx"]
