"""Compression while training: fake quantization, sparsity and shrinking on a schedule."""

from lepton_xla.train.compression.compressions import Compression
from lepton_xla.train.compression.stages import Stage

__all__ = ["Compression", "Stage"]
