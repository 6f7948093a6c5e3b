"""What is set for a whole process that does nothing but serve."""

from __future__ import annotations

import gc
import logging
import os
import sys
from typing import NoReturn

from lepton_xla.serve.priorities import come_first

# How long a thread holds the interpreter while another asks for it. At Python's own 5 ms, an event loop that is never
# idle keeps the engine's thread waiting so long before and after each batch: the model stands still under overload.
_SWITCH_S = 2e-4


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
