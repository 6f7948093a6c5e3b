"""A loaded artifact with its portable program and its weights on the host, for other formats."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import export

from lepton_xla.compiler import _mlir, _xla
from lepton_xla.compiler.loading import load
from lepton_xla.compiler.opening import open_files, read_manifest
from lepton_xla.compiler.operations import Module
from lepton_xla.compiler.reading import read_all
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
        unpacking: the program that makes these of `stored`; None if they are stored as they are.
        stored: the weights as the artifact has them.
    """

    servable: Servable
    exported: Any
    weights: tuple[np.ndarray, ...]
    unpacking: Any = None
    stored: tuple[np.ndarray, ...] = ()

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
        files = open_files(store, manifest)
        program = export.deserialize(bytearray(files.read(manifest.programs[0].file)))
        servable = load(location)
        weights = tuple(map(servable.runtime.devices.read, servable.runtime.weights))
        if manifest.expand is None:
            return cls(servable, program, weights, None, weights)
        unpacking = export.deserialize(bytearray(files.read(manifest.expand.file)))
        return cls(
            servable, program, weights, unpacking, tuple(read_all(manifest.weights, manifest.packed_rows, files))
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

    def operations(self, sizes: Mapping[str, int] | None = None) -> Module:
        """The program for CPUs as plain data, a function of the stored weights and inputs.

        Args:
            sizes: of all symbols; without them they stay symbolic.
        """
        if sizes is None:
            inputs = self._inputs()
        else:
            inputs = [jax.ShapeDtypeStruct(spec.shape_at(sizes), spec.dtype) for spec in self.servable.inputs.values()]
        stored = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in self.stored]

        def whole(*args: Any) -> Any:
            weights = args[: len(stored)]
            if self.unpacking is not None:
                weights = self.unpacking.call(*weights)
            return self.exported.call(*weights, *args[len(stored) :])

        jitted = jax.jit(whole, keep_unused=True)
        if sizes is None:
            return _mlir.read_module(export.export(jitted, platforms=["cpu"])(*stored, *inputs).mlir_module())
        return _mlir.read_module(_mlir.with_static_sizes(jitted.lower(*stored, *inputs)))

    def _inputs(self) -> list[jax.ShapeDtypeStruct]:
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in self.exported.in_avals]
        return shapes[len(self.weights) :]
