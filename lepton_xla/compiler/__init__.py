"""Ahead-of-time compilation into an artifact, and loading one."""

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
