"""Texts, images and categories to arrays, and classes to their names: the part of a model that runs on the host.

It is data, stored in the artifact, and imports no JAX.
"""

from lepton_xla.conversion.converter import Converter
from lepton_xla.conversion.steps import Categories, Conversion, Images, Labels, Texts

__all__ = ["Categories", "Conversion", "Converter", "Images", "Labels", "Texts"]
