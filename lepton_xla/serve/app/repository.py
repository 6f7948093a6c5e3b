"""The routes of the repository: its index, and loading and unloading models. Triton's extension `model_repository`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import pathlib
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from lepton_xla.serve.app.later import Later
from lepton_xla.serve.app.uploads import RepositoryChanges
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.models.manager import Entry
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.priorities import step_back
from lepton_xla.serve.protocol import metadata

_log = logging.getLogger("lepton_xla.serve")

# Changes that run at once, and that run or wait; each that waits may hold a piece of a file.
_THREADS, _MOST_LONG = 2, 32


class Control(Protocol):
    """Changes which models are loaded: the `Manager`, or what asks for it in another process.

    Attributes:
        explicit: whether a server without a model is as it should be, because clients have models loaded.
    """

    explicit: bool

    async def index(self) -> list[Entry]:
        """The models of the repository."""
        ...

    async def load(self, name: str, overrides: Mapping[str, int | None], who: str) -> None:
        """Loads a model; raises `RepositoryError`."""
        ...

    async def unload(self, name: str, who: str) -> None:
        """Unloads a model; raises `RepositoryError`."""
        ...

    async def reroute(self, name: str, who: str) -> None:
        """Has the requests for a model shared as the repository says now; raises `RepositoryError`."""
        ...


class RepositoryPages:
    """Answers requests to the repository.

    Args:
        control: carries them out.
        metrics: the server's counters.
        refuse: answers with an error.
        is_ready: whether a loaded version takes requests.
        folder: of the repository, which versions may be uploaded to; empty if there is none.
        record: told of every change of that, as `Audit.record` is.
    """

    def __init__(
        self,
        control: Control,
        metrics: ServerMetrics,
        refuse: Callable[[Exchange, HTTPError], object],
        is_ready: Callable[[str, str], bool],
        folder: str = "",
        record: Callable[..., object] = lambda *_, **__: None,
    ) -> None:
        self._control = control
        self._is_ready = is_ready
        self._changes = RepositoryChanges(pathlib.Path(folder), record) if folder else None
        self._later = Later(metrics, refuse)
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, "lepton-change", step_back)
        self._long = 0

    def index(self, exchange: Exchange) -> None:
        """Answers with the models there are."""
        asked = metadata.index_request(exchange.body)
        self.answer_later(exchange, self._index(ready=asked.ready), "the repository cannot be listed")

    def load(self, name: str, who: str, exchange: Exchange) -> None:
        """Loads a model."""
        failed = f"failed to load {name[:128]!r}"
        try:
            overrides = metadata.load_overrides(exchange.body)
        except HTTPError as error:
            raise HTTPError(error.status, f"{failed}, {error.message}") from error
        self.answer_later(exchange, self._control.load(name, overrides, asker_of(who, exchange)), failed)

    def unload(self, name: str, who: str, exchange: Exchange) -> None:
        """Unloads a model."""
        metadata.check_unload(exchange.body)
        failed = f"failed to unload {name[:128]!r}"
        self.answer_later(exchange, self._control.unload(name, asker_of(who, exchange)), failed)

    def change(self, route: str, parameters: dict[str, str], who: str, exchange: Exchange) -> None:
        """Changes what is in the folder, or tells of it. What is loaded follows when the folder is looked at again."""
        if self._changes is None:
            raise HTTPError(501, "this server's repository is no folder that it may write to")
        work = self._changes.routes[route](parameters, exchange)
        run = functools.partial(self._changes.run, work, parameters, asker_of(who, exchange))
        # A roll-back does not wait behind a push.
        changing = self.run_long(run) if work.long else asyncio.to_thread(run)
        self.answer_later(exchange, changing, "the request to the repository failed")

    async def run_long[T](self, work: Callable[[], T]) -> T:
        """Runs what reads or writes many bytes, on threads of its own: all others go on meanwhile.

        Raises:
            HTTPError: 503 if too much waits.
        """
        if self._long >= _MOST_LONG:
            raise HTTPError(503, "too many changes of the repository wait")
        self._long += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._long -= 1

    def close(self) -> None:
        """Begins no more changes. What runs ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _index(self, *, ready: bool) -> list[metadata.IndexEntry]:
        entries: list[metadata.IndexEntry] = []
        for entry in await self._control.index():
            state, reason = entry.state, entry.reason
            if state == "READY" and not self._is_ready(entry.name, entry.version):
                state, reason = "UNAVAILABLE", reason or "it takes no requests now"
            if state == "READY" or not ready:
                entries.append(metadata.IndexEntry(entry.name, entry.version, state, reason))
        return entries

    def answer_later(self, exchange: Exchange, work: Coroutine[Any, Any, Any], failed: str) -> None:
        """Answers with the result of some work when it is done."""
        self._later.answer(exchange, work, failed)


def asker_of(who: str, exchange: Exchange) -> str:
    """The name of a token and where it was sent from, such as `ci@10.0.0.7`; names hold no `@`."""
    address = exchange.connection.address
    return f"{who}@{address}" if address else who
