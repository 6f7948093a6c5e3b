"""Number formats and arithmetic: what a quantized array is."""

from lepton_xla.quant.formats import FORMATS, Format
from lepton_xla.quant.qtensor import QTensor, absmax_scale, encode, fake_quantize, magnitude, quantize

__all__ = ["FORMATS", "Format", "QTensor", "absmax_scale", "encode", "fake_quantize", "magnitude", "quantize"]
