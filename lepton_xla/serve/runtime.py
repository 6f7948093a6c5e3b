"""What is set for a whole process that does nothing but serve."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
from typing import NoReturn

from lepton_xla.serve.priorities import come_first

# How long a thread holds the interpreter while another asks for it. At Python's own 5 ms, an event loop that is never
# idle keeps the engine's thread waiting so long before and after each batch: the model stands still under overload.
_SWITCH_S = 2e-4
# Parameters of glibc's `mallopt`.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
    """Has the allocator keep what is freed, for what is allocated next, until `trimming.trim`; tells whether it does.

    glibc maps memory of more than 32 MB anew each time, as XLA asks for it for each batch of images, and each of its
    pages then costs a fault. Nothing changes where there is another allocator, or the environment has settings for it.
    """
    asked = any(name.startswith("MALLOC_") for name in os.environ)
    if asked or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # One arena: others have heaps that are too small for such memory, and are unmapped once they are empty.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all(library.mallopt(parameter, value) == 1 for parameter, value in settings)


def run_on_calling_thread() -> None:
    """Has XLA run CPU code on the thread that calls it, if nothing has used JAX in this process yet.

    By default another thread does, for a caller that goes on meanwhile. The engine waits: between two threads that wait
    for each other, a run of 16 us takes 40, and 100 or more where the processor has other things to do.
    """
    from lepton_xla import _jaxlib

    _jaxlib.run_on_calling_thread()


def count_on_cores(count: int) -> None:
    """Has XLA's CPU client start so many threads, if nothing has used JAX in this process yet.

    By default it starts one for each core: with several processes that serve, each core would have as many.
    """
    # What the client asks for the size of its pool, before the number of cores.
    os.environ.setdefault("NPROC", str(count))


def leave(code: int) -> NoReturn:
    """Ends a process that does nothing but serve, at once: Python would wait for a thread that still loads a model."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def settle() -> None:
    """Called by the thread that serves once all is loaded: that stays, and what comes are requests.

    A full collection over all of JAX would stop answers for tens of milliseconds.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_S)
    come_first()
