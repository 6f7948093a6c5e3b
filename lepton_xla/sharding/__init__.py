"""Meshes of devices, and which part of each weight a device holds."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lepton_xla.sharding.meshes import mesh
    from lepton_xla.sharding.placement import Entry, Placement
    from lepton_xla.sharding.rules import Rules

__all__ = ["Entry", "Placement", "Rules", "mesh"]

# The module of each public name. They are imported on first use, since they import JAX.
_HOME = {"Entry": "placement", "Placement": "placement", "Rules": "rules", "mesh": "meshes"}

if not TYPE_CHECKING:  # otherwise a type checker would accept every misspelled name

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"lepton_xla.sharding.{_HOME[name]}"), name)
        globals()[name] = value
        return value
