"""How right a model is, and what making it small cost: metrics with intervals, of models side by side."""

from lepton_xla.evaluation.comparing import Comparison, Side, compare
from lepton_xla.evaluation.damage import ClassDamage
from lepton_xla.evaluation.figures import Figures, measure
from lepton_xla.evaluation.intervals import Interval
from lepton_xla.evaluation.pages import page

__all__ = ["ClassDamage", "Comparison", "Figures", "Interval", "Side", "compare", "measure", "page"]
