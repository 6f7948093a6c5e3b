"""Generates tokens with a compiled model: sampling, sequences in slots, text. Imports no JAX."""

from lepton_xla.generation.engine import Engine, Generated, Stream
from lepton_xla.generation.sampling import Sampling

__all__ = ["Engine", "Generated", "Sampling", "Stream"]
