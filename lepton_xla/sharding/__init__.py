"""Meshes of devices, and which part of each weight a device holds."""

from lepton_xla.sharding.meshes import mesh
from lepton_xla.sharding.placement import Entry, Placement
from lepton_xla.sharding.rules import Rules

__all__ = ["Entry", "Placement", "Rules", "mesh"]
