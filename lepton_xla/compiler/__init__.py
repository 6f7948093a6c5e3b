"""Ahead-of-time compilation into an artifact, and loading one."""

from typing import TYPE_CHECKING

from lepton_xla.deferred import exports

if TYPE_CHECKING:
    from lepton_xla.compiler.artifact import Artifact, Verification, verify
    from lepton_xla.compiler.build import compile
    from lepton_xla.compiler.fingerprint import Fingerprint
    from lepton_xla.compiler.loading import load
    from lepton_xla.compiler.manifest import Manifest
    from lepton_xla.compiler.protection import encrypt, sign
    from lepton_xla.compiler.requantizing import master_weights, requantize
    from lepton_xla.compiler.servable import Servable
    from lepton_xla.compiler.targets import TARGETS, Target, add_targets
    from lepton_xla.compiler.updates import make_update

__all__ = [
    "TARGETS",
    "Artifact",
    "Fingerprint",
    "Manifest",
    "Servable",
    "Target",
    "Verification",
    "add_targets",
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
    "targets": ("TARGETS", "Target", "add_targets"),
    "updates": ("make_update",),
}

if not TYPE_CHECKING:  # otherwise a type checker would accept every misspelled name
    __getattr__, __dir__ = exports(__name__, _HOMES)
