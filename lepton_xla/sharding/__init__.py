"""Meshes of devices, and which part of each weight a device holds."""

from typing import TYPE_CHECKING

from lepton_xla.deferred import exports

if TYPE_CHECKING:
    from lepton_xla.sharding.meshes import mesh
    from lepton_xla.sharding.placement import Entry, Placement
    from lepton_xla.sharding.rules import Rules

__all__ = ["Entry", "Placement", "Rules", "mesh"]

# The module of each public name. They are imported on first use, since they import JAX.
_HOMES = {"meshes": ("mesh",), "placement": ("Entry", "Placement"), "rules": ("Rules",)}

if not TYPE_CHECKING:  # otherwise a type checker would accept every misspelled name
    __getattr__, __dir__ = exports(__name__, _HOMES)
