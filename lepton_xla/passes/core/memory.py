"""Returns freed memory to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Make the C library return freed memory; glibc keeps hundreds of MB of small blocks.

    A no-op with other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
