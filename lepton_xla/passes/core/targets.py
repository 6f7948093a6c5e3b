"""`Target`: the device that programs are made for and timed on."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os

import jax

from lepton_xla import _compat
from lepton_xla.environment import machine
from lepton_xla.kernels import installation


@dataclasses.dataclass(frozen=True)
class Target:
    """A device and everything else that determines the speed of a program; times hold only for an equal target.

    Attributes:
        platform: `cpu`, `gpu` or `tpu`.
        device_kind: the device's model name.
        runtime: the runtime's own version text, such as that of CUDA.
        processor: the host's processor, with a digest of its features.
        cores: number of cores that this process may use.
        versions: of jax, jaxlib, lepton-xla, and the kernels, with a digest of their code, if usable.
        xla_flags: the part of `XLA_FLAGS` that can change compiled code, sorted.
        settings: settings of JAX that change how a program is compiled.

    >>> gpu = lx.passes.Target("gpu", device_kind="NVIDIA H100")
    >>> gpu.queues, len(gpu.digest)
    (True, 16)
    >>> lx.passes.Target.here() == lx.passes.Target.here()
    True
    """

    platform: str
    device_kind: str = ""
    runtime: str = ""
    processor: str = ""
    cores: int = 1
    versions: str = ""
    xla_flags: str = ""
    settings: str = ""

    @property
    def has_kernels(self) -> bool:
        """Whether this project's kernels run on it: it is a CPU, and they are installed and switched on.

        >>> lx.passes.Target("gpu").has_kernels
        False
        """
        return self.platform == "cpu" and installation.usable()

    @classmethod
    def here(cls) -> Target:
        """Describe this process's default device."""
        device = jax.devices()[0]
        versions = [f"{name} {_version(name)}" for name in ("jax", "jaxlib", "lepton-xla")]
        if installation.usable():
            versions.append(f"{installation.PACKAGE} {installation.installed()} {installation.build()}")
        return cls(
            platform=jax.default_backend(),
            device_kind=device.device_kind,
            runtime=_compat.runtime_version(device),
            processor=f"{machine.cpu_model()}, {machine.cpu_features_digest()}",
            cores=machine.usable_cores(),
            versions=", ".join(versions),
            xla_flags=machine.relevant_xla_flags(os.environ.get("XLA_FLAGS", "")),
            settings=_compat.compile_settings(),
        )

    @property
    def queues(self) -> bool:
        """Whether a call only queues work for the device, and returns before it is done."""
        return self.platform != "cpu"

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, the same in every process with equal fields."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from source, not installed
        return "of its sources"
