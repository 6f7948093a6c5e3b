"""A recipe applied to a program: every pass in its order."""

from lepton_xla.optimization.pipeline import apply_plan, optimize, plan_for

__all__ = ["apply_plan", "optimize", "plan_for"]
