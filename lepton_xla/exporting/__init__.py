"""Writes an artifact's program in formats of other frameworks, and compares what they compute with the artifact."""

from lepton_xla.exporting.exports import FORMATS, Export, export

__all__ = ["FORMATS", "Export", "export"]
