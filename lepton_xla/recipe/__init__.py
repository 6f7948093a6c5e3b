"""Recipes: how to optimize a model, as data. This package imports no pass."""

from lepton_xla.recipe.recipes import Recipe, preset_text, presets
from lepton_xla.recipe.rules import PruneRule, QuantizeRule, ShrinkRule

__all__ = ["PruneRule", "QuantizeRule", "Recipe", "ShrinkRule", "preset_text", "presets"]
