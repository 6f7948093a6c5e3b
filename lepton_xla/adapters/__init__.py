"""What knows Flax: Linen and NNX modules become programs."""

from lepton_xla.adapters.modules import from_linen, from_nnx

__all__ = ["from_linen", "from_nnx"]
