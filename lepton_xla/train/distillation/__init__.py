"""Distillation: a student learns from a teacher, both any JAX function."""

from lepton_xla.train.distillation.logits import Labels, Logits
from lepton_xla.train.distillation.objectives import Distillation, distill

__all__ = ["Distillation", "Labels", "Logits", "distill"]
