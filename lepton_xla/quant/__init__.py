"""Number formats and arithmetic: what a quantized array is."""

from lepton_xla.quant.formats import FORMATS, Format
from lepton_xla.quant.grid import Grid, absmax_scale, encode, magnitude, make_grid
from lepton_xla.quant.qtensor import QTensor, fake_quantize, quantize

__all__ = [
    "FORMATS",
    "Format",
    "Grid",
    "QTensor",
    "absmax_scale",
    "encode",
    "fake_quantize",
    "magnitude",
    "make_grid",
    "quantize",
]
