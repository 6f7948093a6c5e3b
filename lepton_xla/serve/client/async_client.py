"""A client whose calls are awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from lepton_xla.errors import ServeError
from lepton_xla.serve.client import documents
from lepton_xla.serve.client.calls import (
    Attempts,
    Caller,
    RequestOf,
    Search,
    arrays_of,
    feedback_of,
    is_good,
    json_of,
    only,
    route,
    text_of,
)
from lepton_xla.serve.client.replicas import Replica, StalledError, UnreachedError
from lepton_xla.serve.client.transport import PATIENCE_S, Answer, Channel, RequestError, connected, left
from lepton_xla.serve.protocol.monitoring import FeedbackTaken

if TYPE_CHECKING:
    from jaxtyping import Shaped


class PooledChannel(Channel):
    """A connection of the pool, whose answer is awaited."""

    __slots__ = ("_answer_future",)

    def exchange(self, request: bytes) -> asyncio.Future[Answer]:
        """Send a request; its answer is to be awaited."""
        self._answer_future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.send(request)
        return self._answer_future

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
        request_id: str | None = None,
        **more: Any,
    ) -> dict[str, Shaped[np.ndarray, "*_"]]:
        """See `Client.infer`."""
        attempts = self._attempts(timeout_s)
        name = await self._name(model, attempts)
        request = self._infer(attempts, name, {**(inputs or {}), **more}, outputs, priority, request_id)
        return arrays_of(await self._call(request, attempts))

    async def feedback(
        self, model: str | None, labels: Mapping[str, int | Sequence[int] | str], *, timeout_s: float | None = None
    ) -> int:
        """See `Client.feedback`."""
        attempts = self._attempts(timeout_s)
        path = f"{route(await self._name(model, attempts))}/feedback"
        if not self._replicas.several:
            answer = await self._call(self._plain(path, "POST", feedback_of(labels)), attempts)
            return json_of(answer, FeedbackTaken)["rows"]
        bodies = [feedback_of({name: label}) for name, label in labels.items()]
        return sum([await self._judge(self._plain(path, "POST", body), timeout_s) for body in bodies])

    async def monitor(self, model: str | None = None) -> dict[str, Any]:
        """See `Client.monitor`."""
        return await self._get(model, "/monitor")

    async def traffic(self, model: str | None = None) -> dict[str, Any]:
        """See `Client.traffic`."""
        return await self._get(model, "/traffic", documents.TrafficTold)

    async def rollout(self, model: str | None = None) -> dict[str, Any]:
        """See `Client.rollout`."""
        return await self._get(model, "/rollout", documents.RolloutTold)

    async def adjustment(self, model: str | None = None) -> dict[str, Any]:
        """See `Client.adjustment`."""
        return await self._get(model, "/adjustment", documents.AdjustmentTold)

    async def metadata(self, model: str | None = None) -> dict[str, Any]:
        """See `Client.metadata`."""
        return await self._get(model, "", documents.MetadataTold)

    async def config(self, model: str | None = None) -> dict[str, Any]:
        """See `Client.config`."""
        return await self._get(model, "/config")

    async def stats(self, model: str | None = None) -> dict[str, Any]:
        """See `Client.stats`."""
        return await self._get(model, "/stats")

    async def server(self) -> dict[str, Any]:
        """See `Client.server`."""
        return json_of(await self._call(self._plain("/v2"), self._attempts()), documents.Named)

    async def metrics(self) -> str:
        """See `Client.metrics`."""
        return text_of(await self._call(self._plain("/metrics"), self._attempts()))

    async def index(self) -> list[dict[str, Any]]:
        """See `Client.index`."""
        return json_of(
            await self._call(self._plain("/v2/repository/index", "POST"), self._attempts()), list[documents.IndexedTold]
        )

    async def ready(self, model: str | None = None) -> bool:
        """See `Client.ready`."""
        return await self._probe("/v2/health/ready" if model is None else f"{route(model)}/ready")

    async def live(self) -> bool:
        """See `Client.live`."""
        return await self._probe("/v2/health/live")

    async def close(self) -> None:
        """See `Client.close`."""
        self._closed = True
        for replica in self._replicas.all:
            for connection in replica.idle:
                connection.abort()
            replica.idle.clear()
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
            found = json_of(
                await self._call(self._plain("/v2/repository/index", "POST"), attempts), list[documents.IndexedTold]
            )
            self._model = only(found)
        return self._model

    async def _judge(self, request: RequestOf, timeout_s: float | None) -> int:
        """See `Client._judge`."""
        search = Search(self._replicas)
        for replica in search.left():
            attempts = self._attempts(timeout_s)
            attempts.only = replica
            try:
                search.heard(await self._call(request, attempts))
            except RequestError as error:
                search.missed(error)
        return json_of(search.answer(), FeedbackTaken)["rows"]

    async def _get(self, model: str | None, action: str, kind: Any = dict[str, Any]) -> dict[str, Any]:
        attempts = self._attempts()
        path = route(await self._name(model, attempts)) + action
        return json_of(await self._call(self._plain(path), attempts), kind)

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
                    replica = attempts.begin()
                    try:
                        outcome = await self._exchange(replica, request(replica.endpoint, attempts.left()))
                    finally:
                        attempts.end()
            except OSError as error:
                outcome = error.with_traceback(None)  # which would lead back to this frame
            delay = attempts.delay(outcome)
            if delay is None:
                assert isinstance(outcome, Answer)
                return outcome
            await asyncio.sleep(delay)

    async def _exchange(self, replica: Replica, request: bytes) -> Answer:
        connection = self._take(replica) or await self._connect(replica)
        try:
            pending = connection.exchange(request)
            while self._replicas.several and not (await asyncio.wait((pending,), timeout=PATIENCE_S))[0]:
                await self._doubt(replica, pending)
            answer = await pending
        except BaseException:
            connection.abort()
            raise
        if connection.open and not self._closed:
            replica.idle.append(connection)
        else:
            connection.abort()
        return answer

    def _take(self, replica: Replica) -> PooledChannel | None:
        if self._closed:
            raise ServeError("the client is closed")
        while replica.idle:
            connection = replica.idle.pop()
            if connection.open:
                return connection
        return None

    async def _connect(self, replica: Replica) -> PooledChannel:
        if not self._replicas.several:
            return await connected(PooledChannel, replica.endpoint)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await connected(PooledChannel, replica.endpoint)
        except TimeoutError:
            raise UnreachedError(f"no connection within {PATIENCE_S:g} s") from None

    async def _doubt(self, replica: Replica, pending: asyncio.Future[Answer]) -> None:
        """See `Client._doubt`."""
        if self._replicas.silence_s(replica) < PATIENCE_S:
            return
        try:
            async with asyncio.timeout(PATIENCE_S):
                probe = await connected(PooledChannel, replica.endpoint)
                try:
                    await probe.exchange(replica.endpoint.request("GET", "/v2/health/live"))
                finally:
                    probe.abort()
        except OSError as error:
            if pending.done():
                return
            raise StalledError("the server stopped answering") from error
        self._replicas.heard(replica)
