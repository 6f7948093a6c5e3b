"""Learning while serving: from sampled requests and their feedback to a new version, judged before it is pushed."""

from lepton_xla.learning.judging import judge
from lepton_xla.learning.learner import Learner
from lepton_xla.learning.plans import LearningPlan

__all__ = ["Learner", "LearningPlan", "judge"]
