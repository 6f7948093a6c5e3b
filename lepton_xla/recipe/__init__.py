"""Recipes: what to do to a model, as data. Nothing here knows a pass."""

from lepton_xla.recipe.recipes import Recipe, preset_text, presets
from lepton_xla.recipe.rules import PruneRule, QuantizeRule, ShrinkRule

__all__ = ["PruneRule", "QuantizeRule", "Recipe", "ShrinkRule", "preset_text", "presets"]
