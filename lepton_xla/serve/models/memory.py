"""Keeps the models of a repository within a budget of memory: loads one when it is asked for, evicts what nobody uses.

A request for a model that is not loaded waits while that is loaded, for a bounded time; however many wait for it, it is
loaded once. Room is made before the load, by the size of the weights or, from the second time on, by what the model
took before. The model that was used least recently goes first, of those that are neither pinned nor busy. Its memory
counts until nothing refers to it any more.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import gc
import logging
import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic

import msgspec

from lepton_xla.copies import listing_of
from lepton_xla.errors import LeptonError, RepositoryError
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.manager import Entry, Manager
from lepton_xla.serve.models.registry import Registry

_log = logging.getLogger("lepton_xla.serve")

_LOOK_S = 0.02
"""How often to look whether memory has become free."""


class Memory:
    """Loads and evicts models of a manager. Use it on the event loop.

    Args:
        manager: of an explicit repository.
        models: what is loaded.
        budget: bytes that models may take together.
        wait_s: how long a request waits for its model.

    Attributes:
        explicit: true: a server without a loaded model is as it should be.
        loads, evictions: how many there were.
    """

    explicit = True

    def __init__(self, manager: Manager, models: Registry, budget: int, wait_s: float = 10.0) -> None:
        self._manager = manager
        self._models = models
        self._budget = budget
        self._wait_s = wait_s
        self._sizes: dict[str, int] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._held: collections.Counter[str] = collections.Counter()
        self._leaving: dict[int, int] = {}
        self._turn = asyncio.Lock()  # models are loaded one at a time, so room is made for one
        self._tidying: asyncio.Task[None] | None = None
        self.loads = self.evictions = 0

    # What a client asks for.

    async def index(self) -> list[Entry]:
        """The models of the repository."""
        return await self._manager.index()

    async def load(self, name: str, overrides: Mapping[str, int | None] | None = None, who: str = "") -> None:
        """Loads a model, now, or anew if its artifact has changed; see `Manager.load`.

        Raises:
            RepositoryError: also if it is larger than the budget, or there is no room.
        """
        async with self._turn:
            if name not in self._models.names():
                await self._make_room(name)
            await self._manager.load(name, overrides, who)
            await self._settle(name)

    async def unload(self, name: str, who: str = "") -> None:
        """Takes a model out; see `Manager.unload`. The next request for it loads it again."""
        self._note_leaving(name, asyncio.get_running_loop())
        try:
            await self._manager.unload(name, who)
        finally:
            self._tidying = asyncio.get_running_loop().create_task(self._tidy())

    async def reroute(self, name: str, who: str = "") -> None:
        """Has the requests for a model shared as the repository says now; see `Manager.reroute`."""
        await self._manager.reroute(name, who)

    async def _tidy(self) -> None:
        """Gives memory back once nothing refers to what was unloaded."""
        until = monotonic() + self._wait_s
        while self._leaving and monotonic() < until:
            await asyncio.sleep(_LOOK_S)
        await asyncio.to_thread(_trim)

    def knows(self, name: str) -> bool:
        """Whether the repository has a model of that name which is not loaded."""
        return name not in self._models.names() and self._manager.has(name)

    async def bring(self, name: str, then: Callable[[], object]) -> None:
        """Has a model loaded, and then calls a function while it is sure to be there.

        Raises:
            HTTPError: 503 if that takes longer than a request may wait, or there is no room or the model cannot be
                loaded; 507 if it is larger than the budget.
        """
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.get_running_loop().create_task(self._bring(name))
            task.add_done_callback(lambda _: self._loading.pop(name, None))
        self._held[name] += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await asyncio.shield(task)
            then()
        except TimeoutError:
            raise HTTPError(503, f"model {name!r} is being loaded", "Retry-After: 1") from None
        except RepositoryError as error:
            if error.kind == "large":
                raise HTTPError(507, str(error)) from None
            raise HTTPError(503, f"model {name!r} cannot be loaded: {error}", "Retry-After: 1") from None
        finally:
            self._held[name] -= 1

    async def _bring(self, name: str) -> None:
        if name not in self._models.names():
            await self.load(name, who="request")

    # Room.

    @property
    def nbytes(self) -> int:
        """Bytes that models take, those included which were evicted and are still referred to."""
        return sum(handle.nbytes for handle in self._models) + sum(self._leaving.values())

    def _handles(self, name: str) -> Sequence[ModelHandle]:
        return [handle for handle in self._models if handle.signature.name == name]

    async def _make_room(self, name: str) -> None:
        """Evicts until a model fits; waits where all are busy, as long as a request waits.

        Raises:
            RepositoryError: kind `large`, if it can never fit, or `failed`, if it does not fit now.
        """
        need = self._sizes.get(name)
        if need is None:
            need = await asyncio.to_thread(_expected_bytes, self._manager.paths(name))
        self._refuse_larger(name, need)
        until, evicted = monotonic() + self._wait_s, False
        while self.nbytes + need > self._budget:
            # What leaves already makes room soon.
            if self.nbytes - sum(self._leaving.values()) + need > self._budget and await self._evict(name):
                evicted = True
                continue
            if monotonic() > until:
                raise RepositoryError("failed", f"there is no room for model {name!r}: all others are pinned or busy")
            await asyncio.sleep(_LOOK_S)
        if evicted:
            await asyncio.to_thread(_trim)

    async def _settle(self, name: str) -> None:
        """Notes what a loaded model takes, and evicts others if that is more than there was room for."""
        need = self._sizes[name] = sum(handle.nbytes for handle in self._handles(name))
        self.loads += 1
        try:
            self._refuse_larger(name, need)
        except RepositoryError:
            await self._manager.unload(name, "memory")
            raise
        while self.nbytes - sum(self._leaving.values()) > self._budget and await self._evict(name):
            pass

    def _refuse_larger(self, name: str, need: int) -> None:
        if need > self._budget:
            raise RepositoryError(
                "large", f"model {name!r} takes {need} bytes, more than the memory for all, {self._budget}"
            )

    async def watch(self) -> None:
        """Evicts for ever what new versions of loaded models leave no room for."""
        while True:
            await asyncio.sleep(1.0)
            async with self._turn:
                while self.nbytes > self._budget and not self._leaving and await self._evict(""):
                    await asyncio.to_thread(_trim)

    def _note_leaving(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        for handle in self._handles(name):
            self._leaving[id(handle)] = handle.nbytes
            weakref.finalize(handle, _gone, loop, self._leaving, id(handle)).atexit = False

    async def _evict(self, kept: str) -> bool:
        """Evicts the model that was used least recently; returns whether one could be."""
        idle: dict[str, float] = {}
        for name in self._models.names():
            handles = self._handles(name)
            if name != kept and not self._held[name] and not any(each.pinned or each.busy for each in handles):
                idle[name] = max(each.used_s for each in handles)
        if not idle:
            return False
        name = min(idle, key=idle.__getitem__)
        self._note_leaving(name, asyncio.get_running_loop())
        self.evictions += 1
        try:
            await self._manager.unload(name, "memory")
        except RepositoryError as error:  # it went by itself
            _log.info("model %s was not evicted: %s", name, error)
        return True


def _gone(loop: asyncio.AbstractEventLoop, leaving: dict[int, int], number: int) -> None:
    with contextlib.suppress(RuntimeError):  # the event loop is closed, and nobody waits
        # A little later, since the weights go after the handle. It may have been noted twice: evicted, and unloaded.
        loop.call_soon_threadsafe(lambda: loop.call_later(_LOOK_S / 2, leaving.pop, number, 0))


class _Leaf(msgspec.Struct):
    shape: list[int]
    dtype: str


class _Weights(msgspec.Struct):
    weights: list[_Leaf] = []


def _expected_bytes(paths: Iterable[Path]) -> int:
    """Bytes of the weights of artifacts; of those that cannot be read, none: loading them says why."""
    total = 0
    for path in paths:
        try:
            leaves = msgspec.json.decode(listing_of(path)[1], type=_Weights).weights
        except (LeptonError, OSError, msgspec.MsgspecError):
            continue
        for leaf in leaves:
            bits = re.search("[0-9]+", leaf.dtype)
            total += math.prod(leaf.shape) * (8 if bits is None else int(bits[0])) // 8
    return total


def _trim() -> None:
    """Gives back to the system what JAX and the allocator keep of memory that was freed."""
    gc.collect(0)  # JAX lets go of arrays of the host at the next collection, however small
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not the GNU library
        return
