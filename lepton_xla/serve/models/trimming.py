"""Gives memory that models have left back to the system."""

from __future__ import annotations

import asyncio
import ctypes
import gc

# The allocator stands still meanwhile, for milliseconds, and requests with it. A model that is evicted leaves little to
# it, since weights of a megabyte have mappings of their own, and the one that comes in its place takes that.
_EVERY_S = 1.0


def trim() -> None:
    """Gives back to the system what JAX and the allocator keep of memory that was freed."""
    gc.collect(0)  # JAX lets go of arrays of the host at the next collection, however small
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:  # the GNU library
        give_back(0)


class Trimmer:
    """Has what is freed given back: at once, but what the allocator keeps at most once a second. On the event loop."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self._later: asyncio.Task[None] | None = None

    async def trim(self) -> None:
        """Called when models have gone; returns when their arrays have."""
        loop = asyncio.get_running_loop()
        if self._later is not None and not self._later.done():
            await asyncio.to_thread(gc.collect, 0)
        elif loop.time() < self._next_s:
            await asyncio.to_thread(gc.collect, 0)
            self._later = loop.create_task(self._trim_later())
        else:
            self._next_s = loop.time() + _EVERY_S
            await asyncio.to_thread(trim)

    async def _trim_later(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._next_s - loop.time())
        self._next_s = loop.time() + _EVERY_S
        await asyncio.to_thread(trim)
