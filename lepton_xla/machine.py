"""This machine, as far as compiled code and its speed depend on it."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re

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


def _cpuinfo() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


# Dense bfloat16 FLOP/s of one device, as its maker states them; by the beginning of the kind's name.
_PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, as its maker states them; None if the kind is not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
    (989000000000000.0, None)
    """
    return next((peak for kind, peak in _PEAK_FLOPS.items() if device_kind.startswith(kind)), None)
