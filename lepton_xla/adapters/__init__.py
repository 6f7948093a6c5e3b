"""Converts Flax modules, Linen and NNX, to programs. Only this package knows Flax."""

from lepton_xla.adapters.generators import Generator
from lepton_xla.adapters.modules import from_linen, from_nnx

__all__ = ["Generator", "from_linen", "from_nnx"]
