"""This machine, as far as compiled code and its speed depend on it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import platform
import re

# The environment variable that turns the cache of measurements off or moves it.
CACHE_VARIABLE = "LEPTON_CACHE"

# Flags that move files about or add fake devices; the code they give is the same.
_HARMLESS_FLAGS = re.compile(r"--xla_(dump_.*|force_host_platform_device_count(=.*)?)")


def relevant_xla_flags(text: str) -> str:
    """`XLA_FLAGS` without the flags that cannot change compiled code, sorted.

    >>> relevant_xla_flags("--xla_dump_to=/tmp/x --xla_cpu_max_isa=AVX2")
    '--xla_cpu_max_isa=AVX2'
    """
    return " ".join(sorted(flag for flag in text.split() if not _HARMLESS_FLAGS.fullmatch(flag)))


def cpu_features(text: str | None = None) -> tuple[str, ...]:
    """The CPU's feature flags, sorted.

    Args:
        text: the content of `/proc/cpuinfo`; read from there by default.

    Returns:
        The flags that every core has. The processor's name alone where the system lists no flags.
    """
    text = _cpuinfo() if text is None else text
    cores = [set(flags.split()) for flags in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)]
    if not cores:
        return (platform.processor(),)
    return tuple(sorted(set.intersection(*cores)))


def cpu_features_digest() -> str:
    """A short hash of `cpu_features()`.

    >>> len(cpu_features_digest())
    16
    """
    return hashlib.sha256(" ".join(cpu_features()).encode()).hexdigest()[:16]


def cpu_model(text: str | None = None) -> str:
    """The processor's name, such as `AMD EPYC 9B14`; empty where the system does not tell.

    Args:
        text: the content of `/proc/cpuinfo`; read from there by default.
    """
    found = re.search(r"^model name\s*:(.*)$", _cpuinfo() if text is None else text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor()


def usable_cores() -> int:
    """How many cores this process may run on.

    >>> usable_cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> pathlib.Path | None:
    """Where measurements are kept: `$LEPTON_CACHE`, else `lepton_xla` in `$XDG_CACHE_HOME` or `~/.cache`.

    A relative `$XDG_CACHE_HOME` is ignored, as the XDG Base Directory Specification demands. None if `LEPTON_CACHE` is
    `off`, or the user has no home folder.
    """
    asked = os.environ.get(CACHE_VARIABLE, "")
    if asked:
        return None if asked == "off" else pathlib.Path(asked)
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
    except RuntimeError:  # the user has no home folder
        return None
    return root / "lepton_xla"


def _cpuinfo() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


@dataclasses.dataclass(frozen=True)
class DeviceFigures:
    """What the maker of a device states, and what XLA may use of its memory.

    Attributes:
        peak_flops: dense bfloat16 FLOP/s.
        memory_bytes: bytes that XLA may use: all that TPU's compiler allows; of a GPU's memory the share that JAX takes
            by default, three quarters. None if not known.
        memory_bandwidth: bytes/s between device and its memory; None if not known.
        link_bandwidth: bytes/s that a device sends in a collective operation along one mesh axis: over NVLink, or in
            both directions of one axis of a TPU's torus. None if not known.
    """

    peak_flops: float
    memory_bytes: int | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None


# By the beginning of the kind's name.
_FIGURES = {
    "NVIDIA A100": DeviceFigures(312e12),
    "NVIDIA B200": DeviceFigures(2250e12, 191_514_411_008 * 3 // 4, 7.67e12, 900e9),
    "NVIDIA H100 80GB": DeviceFigures(989e12, 84_942_979_072 * 3 // 4, 3.35e12, 450e9),
    "NVIDIA H100": DeviceFigures(989e12),
    "NVIDIA H200": DeviceFigures(989e12, 151_397_597_184 * 3 // 4, 4.8e12, 450e9),
    "NVIDIA L4": DeviceFigures(121e12),
    "TPU v4": DeviceFigures(275e12),
    "TPU v5 lite": DeviceFigures(197e12, int(15.75 * 2**30), 819e9, 90e9),
    "TPU v5e": DeviceFigures(197e12, int(15.75 * 2**30), 819e9, 90e9),
    "TPU v5": DeviceFigures(459e12, int(95.73 * 2**30), 2765e9, 180e9),  # v5p
    "TPU v6": DeviceFigures(918e12, int(31.24 * 2**30), 1640e9, 180e9),  # v6e
}


def figures_of(device_kind: str) -> DeviceFigures | None:
    """The figures of a kind of device; None if it is not known.

    >>> figures_of("TPU v5 lite").memory_bytes / 2**30, figures_of("cpu")
    (15.75, None)
    """
    return next((figures for kind, figures in _FIGURES.items() if device_kind.startswith(kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, as its maker states them; None if the kind is not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
    (989000000000000.0, None)
    """
    figures = figures_of(device_kind)
    return None if figures is None else figures.peak_flops
