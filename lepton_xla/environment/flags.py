"""Detects flags in `XLA_FLAGS` under which XLA is correct but slow."""

from __future__ import annotations

import logging
import os

_YNN = "--xla_cpu_experimental_ynn_fusion_type"
# Entries that the flag's list needs so that XLA:CPU uses its fast kernels (jaxlib 0.12), and what they speed up.
_KERNELS = {"individual_dot": "products", "individual_convolution": "convolutions"}


def slow_flags(text: str) -> str:
    """Describe a flag that disables XLA:CPU's fast kernels, and its effect; empty if there is none.

    Args:
        text: the content of `XLA_FLAGS`.

    >>> slow_flags("--xla_cpu_experimental_ynn_fusion_type=-individual_dot").partition(": ")[2]
    'it disables kernels without which int8 products are many times slower'
    >>> slow_flags("--xla_cpu_max_isa=AVX2")
    ''
    """
    given = [flag.partition("=")[2] for flag in text.split() if flag.partition("=")[0] == _YNN]
    if not given:
        return ""
    kinds = [kind.lower().removeprefix("library_fusion_type_") for kind in given[-1].split(",") if kind]
    # Entries with signs change XLA's default list; a list without signs replaces it.
    changes = bool(kinds) and all(kind[0] in "+-" for kind in kinds)
    removed = {kind[1:] for kind in kinds if kind[0] == "-"}
    kept = ({*_KERNELS} if changes else {kind.lstrip("+") for kind in kinds}) - removed
    slow = " and ".join(what for kind, what in _KERNELS.items() if kind not in kept)
    return f"{_YNN}={given[-1]}: it disables kernels without which int8 {slow} are many times slower" * bool(slow)


def warn_of_slow_flags(log: logging.Logger, platform: str) -> None:
    """Log a warning if `XLA_FLAGS` has a flag that makes int8 slow on this platform."""
    slow = slow_flags(os.environ.get("XLA_FLAGS", "")) if platform == "cpu" else ""
    if slow:
        log.warning("XLA_FLAGS has %s; remove it", slow)
