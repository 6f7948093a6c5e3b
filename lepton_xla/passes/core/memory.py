"""Memory that was freed, handed back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Make the C library return what was freed, where it keeps that: glibc holds on to hundreds of MB of small blocks.

    Does nothing elsewhere.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
