"""Compiled code with its bytes, which are taken before it runs: code that sorts cannot be written once it has run."""

from __future__ import annotations

import dataclasses

import jax

from lepton_xla.compiler import _xla
from lepton_xla.errors import ArtifactError


@dataclasses.dataclass(frozen=True)
class Code:
    """Compiled code for this process's first device.

    Attributes:
        loaded: what runs.
        blob: its bytes; None where XLA cannot write them, so that whoever loads the artifact compiles its StableHLO.
        why_none: XLA's reason for that.
    """

    loaded: _xla.Loaded
    blob: bytes | None = None
    why_none: str = ""

    @classmethod
    def made(cls, lowered: jax.stages.Lowered) -> Code:
        """Compiles code that is to be written.

        Raises:
            Exception: of XLA's kinds, where it does not compile; the caller knows what it is the code of.
        """
        with _xla.without_cache():
            loaded = _xla.loaded(lowered.compile())
        try:
            return cls(loaded, _xla.serialize(loaded))
        except _xla.ERROR as error:
            return cls(loaded, None, _xla.reason(error))

    @classmethod
    def read(cls, blob: bytes, device: _xla.Device, name: str) -> Code:
        """Makes bytes ready to run; nothing is compiled.

        Raises:
            ArtifactError: naming the bucket, where the bytes are no code for this device.
        """
        try:
            return cls(_xla.deserialize(blob, device), blob)
        except Exception as error:  # the client's own kinds
            raise ArtifactError(
                f"the executable of bucket {name} cannot be loaded here: {_xla.reason(error)}"
            ) from error
