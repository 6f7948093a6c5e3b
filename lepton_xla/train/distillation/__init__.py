"""Distillation: a student learns from a teacher, both any JAX function."""

from lepton_xla.train.distillation.answers import Answers
from lepton_xla.train.distillation.features import Features
from lepton_xla.train.distillation.layers import every_nth_layer
from lepton_xla.train.distillation.logits import Labels, Logits
from lepton_xla.train.distillation.objectives import Distillation, distill
from lepton_xla.train.distillation.recording import teach

__all__ = ["Answers", "Distillation", "Features", "Labels", "Logits", "distill", "every_nth_layer", "teach"]
