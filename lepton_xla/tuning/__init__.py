"""Measurements that help to write a recipe."""

from lepton_xla.tuning.sensitivities import Sensitivity, SiteSensitivity, sensitivity

__all__ = ["Sensitivity", "SiteSensitivity", "sensitivity"]
