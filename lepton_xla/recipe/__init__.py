"""Recipes: how to optimize a model, as data. This package imports no pass."""

from lepton_xla.recipe.recipes import Recipe, preset_text, presets
from lepton_xla.recipe.rules import PruneRule, QuantizeRule, ShrinkRule
from lepton_xla.recipe.toml_text import to_toml

__all__ = ["PruneRule", "QuantizeRule", "Recipe", "ShrinkRule", "preset_text", "presets", "to_toml"]
