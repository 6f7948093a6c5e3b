"""Ahead-of-time compilation into an artifact, and loading one."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lepton_xla.compiler.artifact import Artifact, Verification, verify
    from lepton_xla.compiler.build import compile
    from lepton_xla.compiler.fingerprint import Fingerprint
    from lepton_xla.compiler.loading import load
    from lepton_xla.compiler.manifest import Manifest
    from lepton_xla.compiler.protection import encrypt, sign
    from lepton_xla.compiler.requantizing import master_weights, requantize
    from lepton_xla.compiler.servable import Servable
    from lepton_xla.compiler.updates import make_update

__all__ = [
    "Artifact",
    "Fingerprint",
    "Manifest",
    "Servable",
    "Verification",
    "compile",
    "encrypt",
    "load",
    "make_update",
    "master_weights",
    "requantize",
    "sign",
    "verify",
]

# The module of each public name. They are imported on first use: loading needs little of what compiling does.
_HOMES = {
    "artifact": ("Artifact", "Verification", "verify"),
    "build": ("compile",),
    "fingerprint": ("Fingerprint",),
    "loading": ("load",),
    "manifest": ("Manifest",),
    "protection": ("encrypt", "sign"),
    "requantizing": ("master_weights", "requantize"),
    "servable": ("Servable",),
    "updates": ("make_update",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:  # otherwise a type checker would accept every misspelled name

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"lepton_xla.compiler.{_HOME[name]}"), name)
        globals()[name] = value
        return value
