"""Measurements that help to write a recipe, and a search that writes it."""

from lepton_xla.certificates import Certificate
from lepton_xla.tuning.choices import CHOICES, Choice, Methods
from lepton_xla.tuning.constraints import Budget, Constraints
from lepton_xla.tuning.judging import Drop
from lepton_xla.tuning.results import Tuning
from lepton_xla.tuning.searching import tune
from lepton_xla.tuning.sensitivities import Sensitivity, SiteSensitivity, sensitivity
from lepton_xla.tuning.trials import Trial

__all__ = [
    "CHOICES",
    "Budget",
    "Certificate",
    "Choice",
    "Constraints",
    "Drop",
    "Methods",
    "Sensitivity",
    "SiteSensitivity",
    "Trial",
    "Tuning",
    "sensitivity",
    "tune",
]
