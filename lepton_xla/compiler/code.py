"""Compiled code, serialized before it runs: XLA:CPU cannot serialize code with a sort that has run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lepton_xla.compiler import _xla
from lepton_xla.deferred import jax
from lepton_xla.errors import ArtifactError


@dataclasses.dataclass(frozen=True)
class Code:
    """Compiled code for devices of this process.

    Attributes:
        loaded: the executable.
        blob: its serialized bytes; None if XLA cannot serialize it. Loading the artifact then compiles the StableHLO.
        why_none: XLA's reason, if `blob` is None.
    """

    loaded: _xla.Loaded
    blob: bytes | None = None
    why_none: str = ""

    @property
    def calls_kernels(self) -> bool:
        """Whether it calls kernels of `lepton-xla-kernels`, without which it cannot run."""
        return self.blob is not None and _xla.calls_kernels(self.blob)

    @classmethod
    def made(cls, lowered: jax.stages.Lowered) -> Code:
        """Compile and serializes code.

        Raises:
            Exception: any error of XLA, if it does not compile; the caller adds what was compiled.
        """
        with _xla.without_cache():
            loaded = _xla.loaded(lowered.compile())
        try:
            return cls(loaded, _xla.serialize(loaded))
        except _xla.ERROR as error:
            return cls(loaded, None, _xla.reason(error))

    @classmethod
    def read(cls, blob: bytes, devices: Sequence[_xla.Device], name: str) -> Code:
        """Load serialized code, without compiling.

        Raises:
            ArtifactError: if the bytes are not code for these devices; names the bucket.
        """
        try:
            return cls(_xla.deserialize(blob, devices), blob)
        except Exception as error:  # XLA's client has its own error types
            raise ArtifactError(
                f"the executable of bucket {name} cannot be loaded here: {_xla.reason(error)}"
            ) from error
