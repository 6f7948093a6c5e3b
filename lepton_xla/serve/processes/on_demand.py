"""Has the supervisor load the models that requests of a worker ask for: in all workers, or in none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from lepton_xla.errors import RepositoryError
from lepton_xla.serve.models.memory import refusal
from lepton_xla.serve.models.registry import Registry


class OnDemand:
    """An `OnDemand` of the app, in a worker.

    Args:
        models: what this worker has.
        ask: asks the supervisor to load a model; raises `RepositoryError`.
        wait_s: how long a request waits for its model.
    """

    def __init__(self, models: Registry, ask: Callable[[str], Awaitable[object]], wait_s: float) -> None:
        self._models = models
        self._ask = ask
        self._wait_s = wait_s
        self._known: frozenset[str] = frozenset()
        self._coming: list[str] = []
        self._asked: dict[str, asyncio.Future[object]] = {}

    def told(self, names: Sequence[str], last: bool) -> None:
        """The names of the models of the repository, or some of them, of which more come unless these are the last."""
        self._coming += names
        if last:
            self._known, self._coming = frozenset(self._coming), []

    def knows(self, name: str) -> bool:
        """Whether the repository has a model of that name which is not loaded."""
        return name in self._known and name not in self._models.names()

    async def bring(self, name: str, then: Callable[[], object]) -> None:
        """Has a model loaded, and then calls a function while it is sure to be there.

        Raises:
            HTTPError: as `Memory.bring`.
        """
        try:
            async with asyncio.timeout(self._wait_s):
                # Between the supervisor's answer and this it may have gone again, for another one.
                while name not in self._models.names():
                    await asyncio.shield(self._ask_once(name))
        except (TimeoutError, RepositoryError) as error:
            raise refusal(name, error) from None
        then()

    def _ask_once(self, name: str) -> asyncio.Future[object]:
        asked = self._asked.get(name)
        if asked is None:
            asked = self._asked[name] = asyncio.ensure_future(self._ask(name))
            asked.add_done_callback(lambda done: self._answered(name, done))
        return asked

    def _answered(self, name: str, done: asyncio.Future[object]) -> None:
        del self._asked[name]
        if not done.cancelled():
            done.exception()  # whoever waits is told, and nobody may
