"""Why a model gives a class its score: passes that make of a program the program of its attributions."""

from lepton_xla.explanation.gradients import integrated_gradients
from lepton_xla.explanation.occlusions import occlusion

__all__ = ["integrated_gradients", "occlusion"]
