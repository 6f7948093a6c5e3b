"""Keeps the models of a repository within a budget of memory: loads one when it is asked for, evicts what nobody uses.

A request for a model that is not loaded waits while that is loaded, for a bounded time; however many wait for it, it is
loaded once. Room is made before the load, by the size of the weights or, from the second time on, by what the model
took before. `placement.py` decides on which device, what moves to another one, and what goes. Memory counts until
nothing refers to a model any more.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import re
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Protocol

import msgspec

from lepton_xla.errors import LeptonError, RepositoryError
from lepton_xla.files.copies import listing_of
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.models.manager import Entry, Manager
from lepton_xla.serve.models.placement import Evict, Held, Move, Put, Wait, next_step
from lepton_xla.serve.models.popularity import Popularity
from lepton_xla.serve.models.trimming import Trimmer

_log = logging.getLogger("lepton_xla.serve")

_LOOK_S = 0.02
"""How often to look whether a model has become idle."""
_AFTER_S = 0.004
"""The weights of a model go so long after its handle, or earlier."""


class Version(Protocol):
    """A loaded version, as far as memory goes: see `ModelHandle`. It is gone when nothing refers to it."""

    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def devices(self) -> tuple[int, ...]: ...
    @property
    def used_s(self) -> float: ...
    @property
    def requests(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    @property
    def pinned(self) -> bool: ...


class Loaded(Protocol):
    """What is loaded: the `Registry` of this process, or what all workers have."""

    def __iter__(self) -> Iterator[Version]: ...
    def names(self) -> list[str]:
        """The names of the models."""
        ...


class Memory:
    """Loads and evicts models of a manager. Use it on the event loop.

    Args:
        manager: of an explicit repository.
        models: what is loaded.
        budget: bytes that models may take together, of each device.
        wait_s: how long a request waits for its model.
        devices: how many there are.
        each: what the budget is of, in errors.

    Attributes:
        explicit: true: a server without a loaded model is as it should be.
        loads, evictions, moves: how many there were.
    """

    explicit = True

    def __init__(
        self,
        manager: Manager,
        models: Loaded,
        budget: int,
        wait_s: float = 10.0,
        devices: int = 1,
        each: str = "device",
    ) -> None:
        self._each = each
        self._devices = devices
        self._manager = manager
        self._models = models
        self._budget = budget
        self._wait_s = wait_s
        self._sizes: dict[str, tuple[int, int]] = {}  # of each of its devices, and the number of these
        self._overrides: dict[str, Mapping[str, int | None]] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._waiting: collections.Counter[str] = collections.Counter()
        self._leaving: dict[int, tuple[int, tuple[int, ...]]] = {}  # bytes, and the devices that have them
        self._left = asyncio.Event()  # something is gone
        self._turn = asyncio.Lock()  # models are loaded one at a time, so room is made for one
        self._popularity = Popularity()
        self._counted: weakref.WeakKeyDictionary[Version, int] = weakref.WeakKeyDictionary()
        self._trimmer = Trimmer()
        self._tidying: asyncio.Task[None] | None = None
        self.loads = self.evictions = self.moves = 0

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
            before = self._handles(name)
            device = before[0].devices[0] if before else (await self._make_room(name))[0]
            try:
                await self._load(name, device, overrides or {}, who)
            except RepositoryError:
                if not before and self._handles(name):  # some of its versions are there
                    await self._settle(name)
                raise
            self._overrides[name] = overrides or {}
            await self._settle(name)

    async def _load(self, name: str, device: int, overrides: Mapping[str, int | None], who: str) -> None:
        await self._manager.load(name, {**overrides, "device": device} if self._devices > 1 else overrides, who)

    async def unload(self, name: str, who: str = "") -> None:
        """Takes a model out; see `Manager.unload`. The next request for it loads it again."""
        self._note_leaving(name)
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
        await self._trimmer.trim()

    def knows(self, name: str) -> bool:
        """Whether the repository has a model of that name which is not loaded."""
        return name not in self._models.names() and self._manager.has(name)

    async def bring(self, name: str, then: Callable[[], object]) -> None:
        """Has a model loaded, and then calls a function while it is sure to be there.

        Raises:
            HTTPError: 503 if that takes longer than a request may wait, or there is no room or the model cannot be
                loaded; 507 if it is larger than the budget.
        """
        try:
            async with asyncio.timeout(self._wait_s):
                await self.ensure(name)
        except (TimeoutError, RepositoryError) as error:
            raise refusal(name, error) from None
        then()

    async def ensure(self, name: str) -> None:
        """Has a model loaded, once however many ask.

        Raises:
            RepositoryError: as `load`.
        """
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.get_running_loop().create_task(self._bring(name))
            task.add_done_callback(lambda _: self._loading.pop(name, None))
        self._waiting[name] += 1
        try:
            await asyncio.shield(task)
        finally:
            self._waiting[name] -= 1

    async def _bring(self, name: str) -> None:
        if name not in self._models.names():
            try:
                await self.load(name, who="request")
            except RepositoryError as error:
                # As everywhere, a version that cannot be loaded is left out, and the others answer.
                if error.kind != "invalid" or name not in self._models.names():
                    raise

    # Room.

    @property
    def nbytes(self) -> int:
        """Bytes that models take of all devices, those included which are on their way out and still referred to."""
        return sum(each.nbytes * len(each.devices) for each in self._held()) + sum(self._on_their_way())

    def _handles(self, name: str) -> Sequence[Version]:
        return [handle for handle in self._models if handle.name == name]

    def _held(self, kept: Container[str] = (), stuck: Container[str] = ()) -> list[Held]:
        """What is loaded. What is kept can neither go nor move, what is stuck cannot move."""
        self._count_requests()
        found: list[Held] = []
        by_name: dict[str, list[Version]] = {}
        for each in self._models:
            by_name.setdefault(each.name, []).append(each)
        for name, handles in by_name.items():
            devices = tuple(sorted({number for each in handles for number in each.devices}))
            stays = name in kept or self._waiting[name] > 0
            found.append(Held(
                name, sum(each.nbytes for each in handles), devices, max(each.used_s for each in handles),
                idle=not stays and not any(each.pinned or each.busy for each in handles),
                moves=name not in kept and name not in stuck, popularity=self._popularity.of(name),
            ))  # fmt: skip
        return found

    def _count_requests(self) -> None:
        """Counts what was answered since it was last counted; of a version that is new, nothing yet."""
        more: collections.Counter[str] = collections.Counter()
        for each in self._models:
            done = each.requests
            before = self._counted.get(each, done)
            if done != before - 1:  # else `_count_load` has counted a request that is not answered yet
                self._counted[each] = done
            more[each.name] += max(done - before, 0)  # it has answered fewer where a worker has begun again
        self._popularity.note(more, len(self._counted))

    def _count_load(self, name: str, handles: Sequence[Version]) -> None:
        """A load counts as a request: as that which it was for, so that one does not."""
        self._popularity.note({name: 1}, len(self._counted))
        for each in handles:
            self._counted[each] = each.requests + 1

    def _on_their_way(self) -> list[int]:
        """By device, bytes on their way out."""
        found = [0] * self._devices
        for nbytes, devices in self._leaving.values():
            for number in devices:
                found[number] += nbytes
        return found

    async def _make_room(self, name: str) -> tuple[int, ...]:
        """Moves and evicts until a model fits; waits where all are busy, as long as a request waits.

        Returns:
            The numbers of the devices that it fits on.

        Raises:
            RepositoryError: kind `large`, if it can never fit, or `failed`, if it does not fit now.
        """
        size = self._sizes.get(name)
        if size is None:
            size = await asyncio.to_thread(_expected, self._manager.paths(name), self._devices)
        need, span = size
        self._refuse_larger(name, need)
        until, freed, stuck = monotonic() + self._wait_s, False, set[str]()
        while True:
            step = next_step(need, span, self._held(stuck=stuck), self._on_their_way(), self._budget)
            if isinstance(step, Put):
                break
            if monotonic() > until:
                raise RepositoryError("failed", f"there is no room for model {name!r}: all others are pinned or busy")
            if isinstance(step, Wait):
                self._left.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._left.wait()
            else:
                freed = True
                if not await self._take(step):
                    stuck.add(step.name)
        if freed:
            await self._trimmer.trim()
        return step.devices

    async def _settle(self, name: str) -> None:
        """Notes what a loaded model takes, and makes others go if that is more than there was room for."""
        handles = self._handles(name)
        need = sum(handle.nbytes for handle in handles)
        self._count_load(name, handles)
        if handles:  # or somebody has unloaded it meanwhile
            self._sizes[name] = need, len(handles[0].devices)
        self.loads += 1
        try:
            self._refuse_larger(name, need)
        except RepositoryError:
            await self._manager.unload(name, "memory")
            raise
        await self._fit(kept={name})

    async def _fit(self, kept: Container[str] = ()) -> bool:
        """Moves and evicts until what is loaded fits, if it can; returns whether anything went."""
        went, stuck, nothing = False, set[str](), [0] * self._devices
        for device in range(self._devices):
            while True:
                step = next_step(0, 1, self._held(kept, stuck), nothing, self._budget, device)
                if not isinstance(step, Move | Evict):
                    break
                went = True
                if not await self._take(step):
                    if isinstance(step, Evict):
                        break
                    stuck.add(step.name)
        return went

    def _refuse_larger(self, name: str, need: int) -> None:
        if need > self._budget:
            each = "" if self._devices == 1 and self._each == "device" else f" of each {self._each}"
            raise RepositoryError(
                "large", f"model {name!r} takes {need} bytes, more than the memory for all{each}, {self._budget}"
            )

    async def watch(self) -> None:
        """Makes room for ever where new versions of loaded models take more than there is."""
        while True:
            await asyncio.sleep(1.0)
            async with self._turn:
                if not self._leaving and await self._fit():
                    await self._trimmer.trim()

    def _note_leaving(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        for handle in self._handles(name):
            self._leaving[id(handle)] = handle.nbytes, handle.devices
            weakref.finalize(handle, _gone, loop, self._leaving, self._left, id(handle)).atexit = False

    async def _take(self, step: Move | Evict) -> bool:
        """Moves or evicts a model; returns whether that was possible."""
        self._note_leaving(step.name)
        try:
            if isinstance(step, Move):
                await self._load(step.name, step.device, self._overrides.get(step.name, {}), "memory")
                self.moves += 1
            else:
                self.evictions += 1
                await self._manager.unload(step.name, "memory")
        except RepositoryError as error:  # it went by itself, or cannot be loaded again
            did = "moved" if isinstance(step, Move) else "evicted"
            _log.warning("model %s was not %s: %s", step.name, did, str(error))  # which refers to no handle
            for handle in self._handles(step.name):
                self._leaving.pop(id(handle), None)
            await asyncio.sleep(_LOOK_S)
            return False
        return True


def refusal(name: str, error: TimeoutError | RepositoryError) -> HTTPError:
    """What a request is told whose model could not be loaded, or not in time."""
    if isinstance(error, TimeoutError):
        return HTTPError(503, f"model {name!r} is being loaded", "Retry-After: 1")
    if error.kind == "large":
        return HTTPError(507, str(error))
    return HTTPError(503, f"model {name!r} cannot be loaded: {error}", "Retry-After: 1")


def _gone(
    loop: asyncio.AbstractEventLoop, leaving: dict[int, tuple[int, tuple[int, ...]]], left: asyncio.Event, number: int
) -> None:
    def told() -> None:
        leaving.pop(number, None)  # it may have been noted twice: evicted, and unloaded
        left.set()

    with contextlib.suppress(RuntimeError):  # the event loop is closed, and nobody waits
        loop.call_soon_threadsafe(lambda: loop.call_later(_AFTER_S, told))


class _Leaf(msgspec.Struct):
    shape: list[int]
    dtype: str
    spec: list[list[str]] = []


class _Mesh(msgspec.Struct):
    axes: dict[str, int]


class _Weights(msgspec.Struct):
    weights: list[_Leaf] = []
    mesh: _Mesh | None = None


def _expected(paths: Iterable[Path], devices: int) -> tuple[int, int]:
    """Bytes of the weights of artifacts on each of their devices, and the number of these.

    Those that cannot be read have none: loading them says why.
    """
    total, span = 0, 1
    for path in paths:
        try:
            read = msgspec.json.decode(listing_of(path)[1], type=_Weights)
        except (LeptonError, OSError, msgspec.MsgspecError):
            continue
        axes = {} if read.mesh is None else read.mesh.axes
        if math.prod(axes.values()) > devices:
            axes = {}  # it runs on one
        span = max(span, math.prod(axes.values()))
        for leaf in read.weights:
            bits = re.search("[0-9]+", leaf.dtype)
            pieces = math.prod(axes.get(name, 1) for names in leaf.spec for name in names)
            total += math.prod(leaf.shape) * (8 if bits is None else int(bits[0])) // 8 // pieces
    return total, span
