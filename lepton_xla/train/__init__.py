"""Sparsity during training."""

from lepton_xla.recipe import PruneRule
from lepton_xla.train.schedules import Schedule, one_shot, periodic, polynomial
from lepton_xla.train.sparsity import Regrow, SparsityState, finalize, masks_of, sparsify

__all__ = [
    "PruneRule",
    "Regrow",
    "Schedule",
    "SparsityState",
    "finalize",
    "masks_of",
    "one_shot",
    "periodic",
    "polynomial",
    "sparsify",
]
