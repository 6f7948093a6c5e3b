"""Fingerprint of everything that compiled code depends on. If any of it differs, the code is compiled again."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Container, Iterable

import msgspec

from lepton_xla.compiler import _xla
from lepton_xla.compiler.instruction_sets import CAPS, cap_in, without_cap
from lepton_xla.environment.machine import cpu_features, cpu_features_digest, relevant_xla_flags
from lepton_xla.kernels.installation import INTERFACE, usable


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The target of one set of executables.

    Attributes:
        platform: `cpu`, `gpu` or `tpu`.
        platform_version: the runtime's own version text.
        device_kind: the device's model name.
        device_count: number of devices that an executable uses.
        machine: the host's architecture, such as `x86_64`.
        cpu_features: short hash of the CPU's feature flags; empty on an accelerator.
        jaxlib: its version.
        xla_flags: the flags of `XLA_FLAGS` that can change the code, sorted.
        kernels: the interface of the kernels of `lepton-xla-kernels` that the code calls; empty if it calls none.
        cap: the instructions that the code keeps to, such as `AVX2`, if it is for any CPU that has them; its
            `cpu_features` are empty then.
        needs: names of all CPU features that such code may use, separated by blanks.

    >>> here = Fingerprint.of()
    >>> here.platform, len(here.digest), here.differences(here)
    ('cpu', 16, [])
    """

    platform: str
    platform_version: str
    device_kind: str
    device_count: int
    machine: str
    cpu_features: str
    jaxlib: str
    xla_flags: str
    kernels: str = ""
    cap: str = ""
    needs: str = ""

    @classmethod
    def of(cls, device: _xla.Device = None, count: int = 1) -> Fingerprint:
        """The fingerprint of this process on `count` devices like `device`, by default the first one."""
        device = device or _xla.first_device()
        return cls(
            platform=device.platform,
            platform_version=_xla.platform_version(device),
            device_kind=device.device_kind,
            device_count=count,
            machine=platform.machine(),
            cpu_features=cpu_features_digest() if device.platform == "cpu" else "",
            jaxlib=_xla.jaxlib_version(),
            xla_flags=relevant_xla_flags(os.environ.get("XLA_FLAGS", "")),
        )

    def with_kernels(self) -> Fingerprint:
        """The fingerprint of code for the same target that calls kernels of this version.

        >>> here = Fingerprint.of()
        >>> here.with_kernels().platform == here.platform, here.with_kernels() == here
        (True, False)
        """
        return msgspec.structs.replace(self, kernels=str(INTERFACE))

    def among(self, digests: Container[str]) -> Fingerprint:
        """The fingerprint of the fastest code that runs here, of those with these digests; this one if there is none.

        >>> here = Fingerprint.of()
        >>> here.among({here.digest}) == here.among(()) == here
        True
        """
        calling = self.with_kernels()
        return calling if self.platform == "cpu" and usable() and calling.digest in digests else self

    def capped(self, needs: Iterable[str]) -> Fingerprint:
        """The fingerprint of code that was compiled here under a cap, for any CPU that has these features.

        >>> Fingerprint.of().capped(["avx2", "avx"]).needs
        'avx avx2'
        """
        flags = os.environ.get("XLA_FLAGS", "")
        return msgspec.structs.replace(
            self, cpu_features="", xla_flags=without_cap(flags), cap=cap_in(flags), needs=" ".join(sorted(needs))
        )

    def best(self, targets: Iterable[Fingerprint]) -> Fingerprint:
        """The fingerprint of the best code for this machine, of those for these targets; this one if there is none.

        Best is code for just this machine, then code for any CPU with the widest instructions that this one has. A
        process with a cap takes code of no other cap.

        >>> here = Fingerprint.of()
        >>> here.best([here.capped(["no_such_feature"])]) == here
        True
        """
        known = list(targets)
        exact = self.among({target.digest for target in known})
        if exact in known or self.platform != "cpu":
            return exact
        flags = os.environ.get("XLA_FLAGS", "")
        cap, features = cap_in(flags), set(cpu_features())
        fitting = [
            target
            for target in known
            if target.cap in ((cap,) if cap else CAPS)
            and set(target.needs.split()) <= features
            and msgspec.structs.replace(target, cap="", needs="")
            == msgspec.structs.replace(self, cpu_features="", xla_flags=without_cap(flags))
        ]
        return max(fitting, key=lambda target: CAPS.index(target.cap), default=exact)

    @property
    def digest(self) -> str:
        """Hash of all fields: 16 hexadecimal digits, equal in every process."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:16]

    def differences(self, other: Fingerprint) -> list[str]:
        """One line per differing field, such as `jaxlib: 0.11.2 here, 0.12.0 there`; `self` is "here"."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__struct_fields__)
        return [f"{name}: {here!r} here, {there!r} there" for name, here, there in pairs if here != there]
