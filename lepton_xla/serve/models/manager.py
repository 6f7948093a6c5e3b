"""Brings the loaded versions of every model to those that a repository asks for.

A change has two parts: everything that takes time is prepared beside what serves, and then all of it is put at once.
What cannot be prepared is left out, and what served before goes on. Where a change is carried out the manager does not
know: in this process, or in all workers of a server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Literal, Protocol

from lepton_xla.errors import RepositoryError
from lepton_xla.serve.models.changes import Change, Source, State, difference, wanted_state
from lepton_xla.serve.models.repository import Found, Repository

_log = logging.getLogger("lepton_xla.serve")

# A version that could not be loaded is tried again: a copy may have been under way, or memory short.
_FIRST_RETRY_S = 1.0
_LONGEST_RETRY_S = 60.0

type Kind = Literal["READY", "UNAVAILABLE", "LOADING", "UNLOADING"]


class Executor(Protocol):
    """Carries changes out."""

    async def prepare(self, number: int, change: Change) -> dict[str, str]:
        """Loads the versions of a change beside those that serve; returns why some could not be: version -> reason."""
        ...

    def commit(self, number: int, change: Change) -> Awaitable[object]:
        """Puts what was prepared, and takes out what is retired, before it returns. Ends when that is freed."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A version as the index shows it; version and state are empty for a model of which nothing was loaded."""

    name: str
    version: str = ""
    state: Kind | Literal[""] = ""
    reason: str = ""


@dataclasses.dataclass(slots=True)
class _Failure:
    source: Source
    reason: str
    wait_s: float
    next_s: float


class _Model:
    """What the manager knows of a model."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()  # one change at a time
        self.state = State()
        self.overrides: dict[str, int | None] = {}
        self.loading: tuple[str, ...] = ()
        self.unloading: list[str] = []
        self.failures: dict[str, _Failure] = {}


class Manager:
    """Keeps what is loaded equal to what a repository asks for. Use it on the event loop.

    Args:
        repository: where the models are.
        executor: carries changes out.
        explicit: whether models are loaded only when `load` asks for them; otherwise all are, and changes are seen.
        watched: whether to look for changes of what is loaded; None for where models are loaded unasked.
        poll_s: how often to look for changes.
        record: told of every change: who asked, the action, the version, its outcome, and more. It returns at once.

    Attributes:
        explicit: as given.
    """

    def __init__(
        self,
        repository: Repository,
        executor: Executor,
        *,
        explicit: bool = False,
        watched: bool | None = None,
        poll_s: float = 1.0,
        record: Callable[..., object] = lambda *_, **__: None,
    ) -> None:
        self._repository = repository
        self._executor = executor
        self.explicit = explicit
        self._poll_s = poll_s
        self._watched = not explicit if watched is None else watched
        self._record = record
        self._models: dict[str, _Model] = {}
        self._asked: set[str] = set()
        self._number = 0
        self._found: dict[str, Found] = {}
        self._trouble = ""
        self._closed = False
        self._ignored: set[str] = set()
        self._tasks: set[asyncio.Task[object]] = set()

    @property
    def states(self) -> dict[str, State]:
        """What is loaded of each model."""
        return {name: model.state for name, model in self._models.items() if model.state.versions}

    async def start(self, names: Sequence[str] = ()) -> None:
        """Loads what is wanted at the start. What cannot be loaded is logged, and hides nothing else.

        Args:
            names: the models to load in explicit mode.

        Raises:
            RepositoryError: if the repository cannot be read, or holds no model of one of the names.
        """
        self._found = await asyncio.to_thread(self._repository.scan)
        self._tell_ignored()
        if self.explicit:
            for name in names:
                if name not in self._found:
                    raise RepositoryError("missing", f"{self._repository.root}: there is no model {name!r}")
            self._asked.update(names)
        await self._settle_all()
        if not self.states and not self.explicit:
            _log.warning("no model of %s is loaded yet", self._repository.root)

    def has(self, name: str) -> bool:
        """Whether the repository had a version of a model to load when it was last looked at."""
        found = self._found.get(name)
        return found is not None and not found.problem and bool(found.wanted)

    def loadable(self) -> list[str]:
        """The names of the models that the repository had a version of to load when it was last looked at."""
        return [name for name in self._found if self.has(name)]

    def paths(self, name: str) -> list[Path]:
        """Where the versions of a model are that would be loaded."""
        found = self._found.get(name)
        return [] if found is None else [found.versions[version] for version in found.wanted]

    async def watch(self) -> None:
        """Looks for changes for ever, if the repository is watched."""
        while self._watched:
            await asyncio.sleep(self._poll_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Looks for changes now."""
        try:
            self._found = await asyncio.to_thread(self._repository.scan)
        except RepositoryError as error:
            if str(error) != self._trouble:
                _log.error("the repository cannot be read; what is loaded stays: %s", error)
            self._trouble = str(error)
            return
        self._trouble = ""
        self._tell_ignored()
        if not self._closed:
            self._settle_all_soon()

    def close(self) -> None:
        """Stops what is under way, and begins nothing more by itself."""
        self._closed = True
        for task in tuple(self._tasks):
            task.cancel()

    async def load(self, name: str, overrides: Mapping[str, int | None] | None = None, who: str = "") -> None:
        """Loads what is wanted of a model, now, or anew if its artifact has changed.

        Args:
            name: the model's.
            overrides: fields of `Source` to be set; they hold until the next call.
            who: asks for it.

        Raises:
            RepositoryError: if there is no such model; kind `invalid` if a version that is wanted cannot be loaded.
        """
        try:
            found = await asyncio.to_thread(self._repository.find, name)
        except RepositoryError as error:
            if error.kind == "failed":  # a store that is away says nothing about what it has
                raise
            raise RepositoryError(error.kind, "the repository has no model of that name") from error
        if found.problem:
            raise RepositoryError("invalid", found.problem)
        if not found.wanted:
            raise RepositoryError("missing", f"there is no version of {name!r} to load")
        self._found[name] = found
        model = self._models.setdefault(name, _Model())
        before, model.overrides = model.overrides, dict(overrides or {})
        serves = bool(model.state.versions)
        model.failures.clear()
        self._asked.add(name)
        await self._settle(name, who)
        if model.failures:
            if not model.state.versions:
                self._asked.discard(name)
            said = "; ".join(f"version {version}: {each.reason}" for version, each in model.failures.items())
            if serves and model.overrides != before:
                model.overrides = before  # or what serves would be loaded anew with them, again and again
                model.failures.clear()
            raise RepositoryError("invalid", said)

    async def unload(self, name: str, who: str = "") -> None:
        """Takes a model out. What is under way is answered still.

        Args:
            name: the model's.
            who: asks for it.

        Raises:
            RepositoryError: if it is not loaded, or the repository is watched, so that it would be loaded again.
        """
        if not self.explicit:
            raise RepositoryError(
                "conflict", "the repository is watched: remove the model from it, or serve it with --explicit"
            )
        model = self._models.get(name)
        if model is None or not (model.state.versions or model.loading or model.failures):
            raise RepositoryError("missing", f"there is no model {name!r} loaded")
        self._asked.discard(name)
        model.failures.clear()
        await self._settle(name, who)

    async def reroute(self, name: str, who: str = "") -> None:
        """Looks at how the requests for a model are to be shared, and has it so.

        Args:
            name: the model's.
            who: asks for it.

        Raises:
            RepositoryError: if there is no such model, or it cannot be read.
        """
        found = await asyncio.to_thread(self._repository.find, name)
        if found.problem:
            raise RepositoryError("invalid", found.problem)
        self._found[name] = found
        if not self._closed:
            await self._settle(name, who)

    async def index(self) -> list[Entry]:
        """Every model of the repository and every version that is loaded, was to be loaded, or is on its way."""
        entries: list[Entry] = []
        for name in self._names():
            entries += self._entries(name)
        return entries

    def _entries(self, name: str) -> list[Entry]:
        model = self._models.get(name) or _Model()
        found = self._found.get(name)
        shown: dict[str, Entry] = {version: Entry(name, version, "UNLOADING") for version in model.unloading}
        for version, failure in model.failures.items():
            shown[version] = Entry(name, version, "UNAVAILABLE", failure.reason)
        for version in model.loading:
            shown[version] = Entry(name, version, "LOADING")
        for version in model.state.versions:
            failure = model.failures.get(version)
            shown[version] = Entry(name, version, "READY", "" if failure is None else failure.reason)
        versions, labels = (found.versions, found.settings.labels) if found else ({}, {})
        for label, version in labels.items():
            if version not in versions:
                text = f"label {label!r} is to stand on it, and it is not in the repository"
                shown.setdefault(version, Entry(name, version, "UNAVAILABLE", text))
        if found is not None and found.problem:
            shown[""] = Entry(name, "", "UNAVAILABLE", found.problem)
        if not shown and found is not None:
            return [Entry(name)]
        return [shown[version] for version in sorted(shown, key=lambda version: int(version or 0))]

    # Changes.

    def _tell_ignored(self) -> None:
        """Tells once of what looks like a version and is none."""
        ignored = {f"{name}/{entry}" for name, found in self._found.items() for entry in found.ignored}
        for each in sorted(ignored - self._ignored):
            _log.info("%s is no version of a model, and is not loaded", each)
        self._ignored = ignored

    def _names(self) -> list[str]:
        return sorted({*self._found, *self._models})

    async def _settle_all(self) -> None:
        await asyncio.gather(*(self._settle(name) for name in self._names()))

    def _settle_all_soon(self) -> None:
        for name in self._names():
            model = self._models.get(name)
            if (model is None or not model.lock.locked()) and self._next(name) is not None:
                self._begin(self._settle(name))

    def _next(self, name: str) -> Change | None:
        """The change that a model needs now; None if there is none."""
        found, model = self._found.get(name), self._models.setdefault(name, _Model())
        if self.explicit and name not in self._asked:
            found = None
        if found is not None and found.problem:
            return None
        wanted = wanted_state(found, model.overrides)
        change = difference(name, model.state, wanted)
        now = monotonic()
        model.failures = {
            version: each for version, each in model.failures.items() if wanted.versions.get(version) == each.source
        }
        waiting = {version for version, each in model.failures.items() if now < each.next_s}
        if change is None:
            return None
        # What fails is left for later, and with it all that would make room for it.
        left = change.without(waiting, model.state)
        more = left.labels != model.state.labels or left.traffic != model.state.traffic
        return left if left.load or left.retire or more else None

    async def _settle(self, name: str, who: str = "repository") -> None:
        model = self._models.setdefault(name, _Model())
        async with model.lock:
            change = self._next(name)
            if change is None:
                return
            self._number += 1
            number = self._number
            model.loading = tuple(change.load)
            try:
                failed = await self._executor.prepare(number, change)
                self._note(model, change, failed, who)
                change = change.without(failed, model.state)
                ended = self._executor.commit(number, change)
            finally:
                model.loading = ()
            leaving = [*change.retire, *(version for version in change.load if version in model.state.versions)]
            model.state = model.state.after(change)
            model.unloading += leaving
            self._tell(change, who)
        self._begin(self._freed(model, leaving, ended))

    async def _freed(self, model: _Model, leaving: Sequence[str], ended: Awaitable[object]) -> None:
        await ended
        for version in leaving:
            model.unloading.remove(version)

    def _begin(self, work: Coroutine[object, object, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a change of the models failed", exc_info=error)

    def _note(self, model: _Model, change: Change, failed: Mapping[str, str], who: str) -> None:
        """Notes what could not be loaded, and when to try again."""
        now = monotonic()
        for version in change.load:
            before = model.failures.pop(version, None)
            if version in failed:
                wait_s = _FIRST_RETRY_S if before is None else min(2 * before.wait_s, _LONGEST_RETRY_S)
                reason = failed[version]
                if before is None or before.reason != reason:
                    _log.error("model %s version %s cannot be loaded: %s", change.name, version, reason)
                    self._record(who, "load", f"{change.name}/{version}", "failed", reason=reason)
                model.failures[version] = _Failure(change.load[version], reason, wait_s, now + wait_s)

    def _tell(self, change: Change, who: str) -> None:
        for version, source in change.load.items():
            _log.info("model %s version %s is loaded", change.name, version)
            self._record(who, "load", f"{change.name}/{version}", "done", artifact=source.path)
        for version in change.retire:
            _log.info("model %s version %s is unloaded", change.name, version)
            self._record(who, "unload", f"{change.name}/{version}", "done")
