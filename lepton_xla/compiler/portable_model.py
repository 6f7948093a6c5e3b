"""A loaded artifact with its portable program and its weights on the host, for other formats."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jax import export

from lepton_xla.compiler import _xla
from lepton_xla.compiler.loading import load
from lepton_xla.compiler.opening import open_files, read_manifest
from lepton_xla.compiler.servable import Servable
from lepton_xla.compiler.storage import Store
from lepton_xla.errors import UnsupportedError

# The StableHLO that TensorFlow 2.21 reads; JAX writes a newer one.
_VERSION = "1.13.0"


@dataclasses.dataclass(frozen=True)
class PortableModel:
    """What an artifact computes, as one program with symbolic sizes.

    Attributes:
        servable: the loaded artifact.
        exported: the program, a function of flat weights and inputs that returns flat outputs.
        weights: its weights.
    """

    servable: Servable
    exported: Any
    weights: tuple[np.ndarray, ...]

    @classmethod
    def read(cls, location: str | os.PathLike[str]) -> PortableModel:
        """Read an artifact.

        Raises:
            ArtifactError: as `load`.
            UnsupportedError: if it generates tokens, has weights only, or has a program for each size.
        """
        store = Store(location)
        manifest = read_manifest(store)
        if manifest.is_update or manifest.generation is not None:
            kind = "has weights only" if manifest.is_update else "generates tokens"
            raise UnsupportedError(f"{store.location}: {kind}; what is exported is one program of inputs and outputs")
        if len(manifest.programs) != 1 or manifest.programs[0].sizes is not None:
            raise UnsupportedError(
                f"{store.location}: has a portable program for each size, and not one for all: {manifest.programs_note}"
            )
        blob = open_files(store, manifest).read(manifest.programs[0].file)
        servable = load(location)
        return cls(
            servable, export.deserialize(bytearray(blob)), tuple(np.asarray(leaf) for leaf in servable.runtime.weights)
        )

    def module(self) -> bytes:
        """The program for CPUs as StableHLO that other frameworks read.

        Raises:
            UnsupportedError: if it has operations that they lack.
        """
        program = self.exported
        inputs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.in_avals]
        try:
            plain = export.export(jax.jit(lambda *args: program.call(*args), keep_unused=True), platforms=["cpu"])
            return _xla.module_for_others(plain(*inputs), _VERSION)
        except Exception as error:  # MLIR's errors have types of their own
            raise UnsupportedError(
                f"the program cannot be written as StableHLO {_VERSION}: {_xla.reason(error)}"
            ) from error
