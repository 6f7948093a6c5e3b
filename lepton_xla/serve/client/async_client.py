"""A client whose calls are awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from lepton_xla.errors import ServeError
from lepton_xla.serve.client.calls import Attempts, Caller, RequestOf, arrays_of, is_good, json_of, only, route
from lepton_xla.serve.client.transport import Answer, Channel, RequestError, connected, left

if TYPE_CHECKING:
    from jaxtyping import Shaped


class PooledChannel(Channel):
    """A connection of the pool, whose answer is awaited."""

    __slots__ = ("_answer_future",)

    async def exchange(self, request: bytes) -> Answer:
        """Send a request and waits for its answer."""
        self._answer_future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.send(request)
        return await self._answer_future

    def answered(self, answer: Answer) -> None:
        if not self._answer_future.done():
            self._answer_future.set_result(answer)

    def failed(self, error: Exception) -> None:
        if not self._answer_future.done():
            self._answer_future.set_exception(error)


class AsyncClient(Caller):
    """`Client` for an event loop: the same options and methods, these to be awaited. One loop a client.

    >>> from lepton_xla.serve import AsyncClient
    >>> async def ask():
    ...     async with AsyncClient(url) as client:  # of a server with the model y = 2 x
    ...         return await client.infer("double", x=np.float32([[1, 2]]))
    >>> asyncio.run(ask())["y"]
    array([[2., 4.]], dtype=float32)
    """

    def _open(self) -> None:
        self._idle: list[PooledChannel] = []
        self._turns = asyncio.Semaphore(self._max_connections)

    async def infer(
        self,
        model: str | None = None,
        inputs: Mapping[str, Any] | None = None,
        /,
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        priority: int | None = None,
        **more: Any,
    ) -> dict[str, Shaped[np.ndarray, "*_"]]:
        """See `Client.infer`."""
        attempts = self._attempts(timeout_s)
        name = await self._name(model, attempts)
        request = self._infer(name, {**(inputs or {}), **more}, outputs, priority)
        return arrays_of(await self._call(request, attempts))

    async def metadata(self, model: str | None = None) -> dict[str, Any]:
        """See `Client.metadata`."""
        return await self._get(model, "")

    async def config(self, model: str | None = None) -> dict[str, Any]:
        """See `Client.config`."""
        return await self._get(model, "/config")

    async def stats(self, model: str | None = None) -> dict[str, Any]:
        """See `Client.stats`."""
        return await self._get(model, "/stats")

    async def server(self) -> dict[str, Any]:
        """See `Client.server`."""
        return json_of(await self._call(self._plain("/v2"), self._attempts()))

    async def index(self) -> list[dict[str, Any]]:
        """See `Client.index`."""
        return json_of(await self._call(self._plain("/v2/repository/index", "POST"), self._attempts()))

    async def ready(self, model: str | None = None) -> bool:
        """See `Client.ready`."""
        return await self._probe("/v2/health/ready" if model is None else f"{route(model)}/ready")

    async def live(self) -> bool:
        """See `Client.live`."""
        return await self._probe("/v2/health/live")

    async def close(self) -> None:
        """See `Client.close`."""
        self._closed = True
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.abort()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _name(self, model: str | None, attempts: Attempts) -> str:
        if model is not None:
            return model
        if self._model is None:
            self._model = only(json_of(await self._call(self._plain("/v2/repository/index", "POST"), attempts)))
        return self._model

    async def _get(self, model: str | None, action: str) -> dict[str, Any]:
        attempts = self._attempts()
        return json_of(await self._call(self._plain(route(await self._name(model, attempts)) + action), attempts))

    async def _probe(self, path: str) -> bool:
        try:
            return is_good(await self._call(self._plain(path), self._attempts(retries=0)))
        except RequestError as error:
            if error.status is not None:
                raise
            return False

    async def _call(self, request: RequestOf, attempts: Attempts) -> Answer:
        while True:
            outcome: Answer | OSError
            try:
                async with asyncio.timeout(left(attempts.deadline)), self._turns:
                    outcome = await self._exchange(request(attempts.left()))
            except OSError as error:
                outcome = error.with_traceback(None)  # which would lead back to this frame
            delay = attempts.delay(outcome)
            if delay is None:
                assert isinstance(outcome, Answer)
                return outcome
            await asyncio.sleep(delay)

    async def _exchange(self, request: bytes) -> Answer:
        connection = self._take() or await self._connect()
        try:
            answer = await connection.exchange(request)
        except BaseException:
            connection.abort()
            raise
        if connection.open and not self._closed:
            self._idle.append(connection)
        else:
            connection.abort()
        return answer

    def _take(self) -> PooledChannel | None:
        if self._closed:
            raise ServeError("the client is closed")
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return None

    async def _connect(self) -> PooledChannel:
        return await connected(PooledChannel, self._endpoint)
