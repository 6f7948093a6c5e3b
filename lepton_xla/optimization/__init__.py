"""Applies a recipe to a program: all passes in order."""

from lepton_xla.optimization.pipeline import apply_plan, optimize, plan_for

__all__ = ["apply_plan", "optimize", "plan_for"]
