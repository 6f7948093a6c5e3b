"""Flags in `XLA_FLAGS` under which XLA computes right but slowly, so that nobody has to find out by measuring."""

from __future__ import annotations

import logging
import os

_YNN = "--xla_cpu_experimental_ynn_fusion_type"
# What must be in that flag's list for XLA:CPU to hand a product or a convolution to its fast kernels (jaxlib 0.12).
_KERNELS = {"individual_dot": "products", "individual_convolution": "convolutions"}


def slow_flags(text: str) -> str:
    """Which flag takes XLA:CPU's fast kernels away, and what is slow without them; empty where none does.

    Args:
        text: the content of `XLA_FLAGS`.

    >>> slow_flags("--xla_cpu_experimental_ynn_fusion_type=-individual_dot").partition(": ")[2]
    'without the kernels that it takes away, int8 products are many times slower'
    >>> slow_flags("--xla_cpu_max_isa=AVX2")
    ''
    """
    given = [flag.partition("=")[2] for flag in text.split() if flag.partition("=")[0] == _YNN]
    if not given:
        return ""
    kinds = [kind.lower().removeprefix("library_fusion_type_") for kind in given[-1].split(",") if kind]
    # Signs change XLA's own list, a list without them takes its place.
    changes = bool(kinds) and all(kind[0] in "+-" for kind in kinds)
    removed = {kind[1:] for kind in kinds if kind[0] == "-"}
    kept = ({*_KERNELS} if changes else {kind.lstrip("+") for kind in kinds}) - removed
    slow = " and ".join(what for kind, what in _KERNELS.items() if kind not in kept)
    return f"{_YNN}={given[-1]}: without the kernels that it takes away, int8 {slow} are many times slower" * bool(slow)


def warn_of_slow_flags(log: logging.Logger, platform: str) -> None:
    """Warns of a flag in this process's `XLA_FLAGS` that makes int8 slow on this platform."""
    slow = slow_flags(os.environ.get("XLA_FLAGS", "")) if platform == "cpu" else ""
    if slow:
        log.warning("XLA_FLAGS holds %s; leave it out", slow)
