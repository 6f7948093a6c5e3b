"""Carries changes of models out in this process: loads on a thread, puts on the event loop, frees what nobody uses."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import weakref
from collections.abc import Awaitable, Sequence
from typing import Protocol

from lepton_xla.errors import LeptonError
from lepton_xla.serve.batching.scheduler import Scheduler
from lepton_xla.serve.models.changes import Change, Source
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.models.trimming import Trimmer
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.priorities import step_back

_log = logging.getLogger("lepton_xla.serve")

# An error keeps the frames that it passed, and so a handle, until they are found to be unreachable.
_COLLECT_S = 1.0


class Loader[T](Protocol):
    """Makes handles."""

    def load(self, name: str, version: str, source: Source, others: Sequence[ModelHandle]) -> T:
        """Reads, checks and warms up a version, on a thread of its own; raises what is wrong with it.

        Args:
            name, version: what it is called.
            source: where it is.
            others: the loaded versions of the model.
        """
        ...

    def open(self, loaded: T) -> ModelHandle:
        """Makes the handle of a loaded version, ready to answer; raises what is wrong with it. On the event loop."""
        ...

    def close(self, name: str, version: str, scheduler: Scheduler) -> None:
        """Told on the event loop that a handle is gone: nothing uses its scheduler any more, which is freed then."""
        ...


class Host[T]:
    """Carries changes out; an `Executor` of `Manager`.

    Args:
        models: what answers requests.
        loader: makes handles.
        metrics: counts what was loaded and what could not be.
        trims: whether what was freed is given back to the system, where the allocator may keep it.

    Attributes:
        loading: number of versions that are being loaded.
    """

    def __init__(self, models: Registry, loader: Loader[T], metrics: ServerMetrics, *, trims: bool = False) -> None:
        self._trimmer = Trimmer() if trims else None
        self._metrics = metrics
        self.loading = 0
        self._models = models
        self._loader = loader
        # One thread, so that several changes at once do not take all cores from what serves. The first model is loaded
        # at full priority, since threads that XLA starts then keep what they were started with.
        self._first = concurrent.futures.ThreadPoolExecutor(1, "lepton-load")
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "lepton-load", step_back)
        # At full priority: what is loaded in their place waits for it.
        self._freeing = concurrent.futures.ThreadPoolExecutor(1, "lepton-free")
        self._prepared: dict[int, dict[str, ModelHandle]] = {}

    async def prepare(self, number: int, change: Change) -> dict[str, str]:
        """Loads the versions of a change; returns why some could not be: version -> reason."""
        made = self._prepared[number] = {}
        failed: dict[str, str] = {}
        loop = asyncio.get_running_loop()
        for version, source in change.load.items():
            thread = self._thread if self._models.names() else self._first
            others = [self._models.find(change.name, each) for each in self._models.versions(change.name)]
            try:
                self.loading += 1
                work = loop.run_in_executor(thread, self._loader.load, change.name, version, source, others)
                work.add_done_callback(self._loaded)
                # Opened now: what is wrong with a model's settings has to show before anything is changed.
                made[version] = self._loader.open(await asyncio.shield(work))
            except Exception as error:  # whatever an artifact makes the loader raise fails this version only
                if not isinstance(error, LeptonError):
                    _log.exception("model %s version %s cannot be loaded", change.name, version)
                self._metrics.of(change.name, version).load_failures += 1
                failed[version] = _reason(error, source, f"{change.name}/{version}")
        return failed

    def sizes(self, number: int) -> dict[str, int]:
        """Bytes that each version takes which was prepared for a change."""
        return {version: handle.nbytes for version, handle in self._prepared.get(number, {}).items()}

    def commit(self, number: int, change: Change) -> Awaitable[object]:
        """Puts what was prepared, and takes out what is retired, before it returns. Ends when that is freed."""
        made, leaving = self._prepared.pop(number, {}), list[ModelHandle]()
        for version in change.load:
            handle = made.pop(version)
            handle.metrics.loads += 1
            before = self._models.get(change.name, version)
            if before is not None:
                leaving.append(before)
            self._models.put(handle)
        self._models.label(change.name, change.labels)
        self._models.share(change.name, change.traffic)
        for version in change.retire:
            handle = self._models.get(change.name, version)
            if handle is not None:
                self._models.remove(handle)
                leaving.append(handle)
        leaving += made.values()  # what others could not load
        return asyncio.gather(*(self._freed(*_watched(handle)) for handle in leaving))

    def _loaded(self, work: asyncio.Future[T]) -> None:
        self.loading -= 1
        if not work.cancelled():
            work.exception()  # whoever waits for it is told, and nobody may

    def close(self) -> None:
        """Loads nothing more. What is being loaded goes on, and a process that ends waits for it: see `leave`."""
        for thread in (self._first, self._thread):
            thread.shutdown(wait=False, cancel_futures=True)
        self._freeing.shutdown(wait=False)

    async def _freed(self, gone: asyncio.Future[None], name: str, version: str, scheduler: Scheduler) -> None:
        """Waits until the last answer of a handle has left, and frees it."""
        try:
            await asyncio.wait_for(asyncio.shield(gone), _COLLECT_S)
        except TimeoutError:
            await asyncio.get_running_loop().run_in_executor(self._thread, gc.collect)
            await gone
        self._loader.close(name, version, scheduler)
        try:
            # Unmapping weights takes a millisecond for every twenty megabytes.
            await asyncio.get_running_loop().run_in_executor(self._freeing, scheduler.free)
        except RuntimeError:  # the server is closed
            scheduler.free()
            return
        if self._trimmer is not None:
            await self._trimmer.trim()


def _watched(handle: ModelHandle) -> tuple[asyncio.Future[None], str, str, Scheduler]:
    """A future that is done when nobody refers to a handle any more, and what is left to close then."""
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[None] = loop.create_future()

    def told() -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed, and nobody waits
            loop.call_soon_threadsafe(lambda: None if gone.done() else gone.set_result(None))

    weakref.finalize(handle, told).atexit = False
    return gone, handle.signature.name, handle.signature.version, handle.scheduler


def _reason(error: Exception, source: Source, called: str) -> str:
    """One line that says why a version could not be loaded, without the path that it has on this machine."""
    lines = str(error).replace(source.path, called).strip().splitlines()
    if isinstance(error, LeptonError) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
