"""A client for servers of the Open Inference Protocol v2: this package's, Triton, KServe. It does not need JAX.

    with Client("http://127.0.0.1:8000") as client:
        scores = client.infer("digits", image=images)["output"]

`AsyncClient` has the same methods, to be awaited.
"""

from __future__ import annotations

import asyncio
import email.utils
import http.client
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import quote

import msgspec
import numpy as np

from lepton_xla.errors import InputError, ServeError
from lepton_xla.serve.arrays import decode_infer, encode_infer
from lepton_xla.serve.transport import (
    Answer,
    Channel,
    Connection,
    DeadlineError,
    RequestError,
    endpoint,
    left,
)

__all__ = ["AsyncClient", "Client", "DeadlineError", "RequestError"]

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 2.0
# What a server sends that would rather be asked again: too many requests of this client, or of all.
_ASK_AGAIN = (429, 503)
_LONGEST_MESSAGE = 500
# A request that is tried again says how much time is left in this many steps: equal requests are parsed once.
_STEPS = 64

type _Request = Callable[[float], bytes]
"""The bytes of a request with so many seconds left."""


class _Attempts:
    """When to try again: exponential backoff with full jitter, bounded by a count and by the deadline.

    Source: "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), the variant "full jitter".
    """

    def __init__(self, url: str, retries: int, timeout_s: float) -> None:
        self.deadline = monotonic() + timeout_s
        self._url = url
        self._timeout_s = timeout_s
        self._retries = retries
        self._made = 0

    def left(self) -> float:
        """Seconds left, exactly at first, and rounded down later."""
        if not self._made:
            return self._timeout_s
        step = self._timeout_s / _STEPS
        return max(1, int((self.deadline - monotonic()) / step)) * step

    def delay(self, outcome: Answer | Exception) -> float | None:
        """Seconds to wait before the next attempt; None if this answer is the last word.

        Raises:
            RequestError: if there was no answer and is no next attempt.
        """
        if isinstance(outcome, Answer) and outcome.status not in _ASK_AGAIN:
            return None
        if isinstance(outcome, TimeoutError):
            self._time_out(outcome)
        if isinstance(outcome, ssl.SSLError) and not isinstance(outcome, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            raise RequestError(None, f"{self._url}: TLS failed: {outcome.reason or outcome}") from outcome
        most = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2**self._made)
        delay = random.uniform(0, most)  # noqa: S311 (no secret)
        if isinstance(outcome, Answer):
            delay += _retry_after(outcome)
        self._made += 1
        if self._made <= self._retries and monotonic() + delay < self.deadline:
            return delay
        if isinstance(outcome, Exception):
            reason = getattr(outcome, "strerror", None) or str(outcome) or type(outcome).__name__
            raise RequestError(None, f"{self._url}: no answer after {self._tries()}: {reason}") from outcome
        return None

    def _time_out(self, cause: Exception) -> NoReturn:
        raise DeadlineError(None, f"{self._url}: no answer within {self._timeout_s:g} s") from cause

    def _tries(self) -> str:
        return "one attempt" if self._made == 1 else f"{self._made} attempts"


def _retry_after(answer: Answer) -> float:
    """Seconds that the answer asks for, written as a number or as a date; 0 without."""
    text = answer.headers.get(b"retry-after", b"").decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _check(answer: Answer) -> Answer:
    """The answer, if it is a good one.

    Raises:
        RequestError: else, with the server's own words.
    """
    if answer.status == 200:
        return answer
    try:
        said = msgspec.json.decode(answer.body, type=dict[str, Any]).get("error")
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = answer.body[:_LONGEST_MESSAGE].decode("utf-8", "replace").strip()
    message = str(said or http.client.responses.get(answer.status) or "no reason given")
    kind = DeadlineError if answer.status == 504 else RequestError
    raise kind(answer.status, "".join(char if char.isprintable() else " " for char in message[:_LONGEST_MESSAGE]))


def _json(answer: Answer) -> Any:
    try:
        return msgspec.json.decode(_check(answer).body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(answer.status, f"the server's answer is not JSON: {error}") from error


def _arrays(answer: Answer) -> dict[str, np.ndarray]:
    length = _check(answer).headers.get(b"inference-header-content-length")
    try:
        return decode_infer(answer.body, None if length is None else int(length))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise RequestError(answer.status, f"the server's answer is no infer answer: {error}") from error


def _is_good(answer: Answer) -> bool:
    """Whether a probe says yes; what says that the caller may not ask is an error."""
    if answer.status in (401, 403):
        _check(answer)
    return answer.status == 200


def _only(index: Any) -> str:
    """The model, where a server has just one."""
    names = sorted({str(entry["name"]) for entry in index})
    if len(names) != 1:
        raise InputError(f"the server has {len(names)} models ({', '.join(names)[:200]}); say which")
    return names[0]


class _Base:
    """What both clients share: where the server is, and what each request is made of. Its options are `Client`'s."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        certificate_file: str | os.PathLike[str] | None = None,
        key_file: str | os.PathLike[str] | None = None,
        timeout_s: float = 30.0,
        retries: int = 3,
        max_connections: int = 100,
        binary: bool = True,
    ) -> None:
        if retries < 0 or max_connections < 1:
            raise ServeError(f"retries must be at least 0 and max_connections 1, not {retries!r}, {max_connections!r}")
        self._endpoint = endpoint(
            url,
            token=token,
            token_file=token_file,
            ca_file=ca_file,
            certificate_file=certificate_file,
            key_file=key_file,
        )
        self._model = model
        self._timeout_s = timeout_s
        self._retries = retries
        self._max_connections = max_connections
        self._binary = binary
        self._closed = False
        self._attempts()  # checks timeout_s
        self._open()

    def _open(self) -> None:
        """Prepares the pool of connections."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._endpoint.url!r})"

    def _attempts(self, timeout_s: float | None = None, retries: int | None = None) -> _Attempts:
        seconds = self._timeout_s if timeout_s is None else timeout_s
        if not seconds > 0:
            raise ServeError(f"timeout_s must be positive, not {seconds!r}")
        return _Attempts(self._endpoint.url, self._retries if retries is None else retries, seconds)

    def _plain(self, path: str, method: str = "GET") -> _Request:
        request = self._endpoint.request(method, path, (b"{}",) if method == "POST" else ())
        return lambda left_s: request

    def _infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None,
        priority: int | None,
    ) -> _Request:
        parameters: dict[str, int] = {} if priority is None else {"priority": priority}
        path = f"{_route(model)}/infer"

        def request(left_s: float) -> bytes:
            timeout = {"timeout": max(1, int(left_s * 1e6))}
            head, tail = encode_infer(inputs, outputs, parameters | timeout, binary=self._binary)
            return self._endpoint.request("POST", path, (head, *tail), len(head) if self._binary else None)

        return request


def _route(model: str) -> str:
    return f"/v2/models/{quote(model, safe='')}"


class Client(_Base):
    """A client that waits for its answers. Threads may share one; it keeps a connection for each that asks at once.

    A request that gets no answer, or 503 or 429, is sent again: after exponentially growing random delays, and not
    before the server's `Retry-After`. Inference changes nothing on the server, so asking twice does no harm.

    Args:
        url: such as `http://127.0.0.1:8000`, `https://models.example/prefix`, `localhost:8000`.
        model: which model methods ask for that are not told; by default the server's only one.
        token: bearer token; by default that of the variable `LEPTON_TOKEN`, if it is set.
        token_file: file that holds the token.
        ca_file: certificates (PEM) to trust instead of the system's.
        certificate_file: the client's own certificate (PEM), for a server that asks for one.
        key_file: its private key, if not in the same file.
        timeout_s: seconds for a call, all attempts and delays included; the server is told too.
        retries: attempts after the first.
        max_connections: requests on their way at once; more wait for their turn.
        binary: whether tensors travel as bytes; unset for servers without the binary tensor extension.

    Raises:
        ServeError: for a URL, token or certificate that cannot be used.
    """

    def _open(self) -> None:
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(self._max_connections)

    def infer(
        self,
        model: str | None = None,
        inputs: Mapping[str, Any] | None = None,
        /,
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        priority: int | None = None,
        **more: Any,
    ) -> dict[str, np.ndarray]:
        """Runs a model.

        Args:
            model: its name.
            inputs: arrays by name, for names that are no Python names; the others may be given as keywords.
            outputs: which outputs to return; by default all.
            timeout_s: seconds for this call, instead of the client's.
            priority: 1 is served first, then 2 and so on; by default the server's own choice.
            **more: inputs by name; anything `numpy.asarray` takes. bfloat16 is ml_dtypes'.

        Returns:
            The outputs by name, as arrays of their own. BYTES come as `bytes` objects.

        Raises:
            RequestError: with the server's message and HTTP status, or status None if it could not be reached;
                DeadlineError if the time ran out.
            InputError: for an array that the protocol cannot carry.
        """
        attempts = self._attempts(timeout_s)
        name = self._name(model, attempts)
        request = self._infer(name, {**(inputs or {}), **more}, outputs, priority)
        return _arrays(self._call(request, attempts))

    def metadata(self, model: str | None = None) -> dict[str, Any]:
        """Names, datatypes and shapes of a model's inputs and outputs; -1 is a dimension that varies."""
        return self._get(model, "")

    def config(self, model: str | None = None) -> dict[str, Any]:
        """A model's configuration, as Triton writes it."""
        return self._get(model, "/config")

    def stats(self, model: str | None = None) -> dict[str, Any]:
        """A model's statistics, as Triton writes them: counts and nanoseconds that only grow."""
        return self._get(model, "/stats")

    def server(self) -> dict[str, Any]:
        """The server's name, version and extensions."""
        return _json(self._call(self._plain("/v2"), self._attempts()))

    def index(self) -> list[dict[str, Any]]:
        """The models that the server has, and their state."""
        return _json(self._call(self._plain("/v2/repository/index", "POST"), self._attempts()))

    def ready(self, model: str | None = None) -> bool:
        """Whether the server, or one model, takes requests now. One attempt; no answer is no.

        Raises:
            RequestError: if the token does not allow to ask.
        """
        return self._probe("/v2/health/ready" if model is None else f"{_route(model)}/ready")

    def live(self) -> bool:
        """Whether the server answers at all. One attempt; no answer is no."""
        return self._probe("/v2/health/live")

    def close(self) -> None:
        """Closes every idle connection; those in use are closed after their answer."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _name(self, model: str | None, attempts: _Attempts) -> str:
        if model is not None:
            return model
        if self._model is None:
            self._model = _only(_json(self._call(self._plain("/v2/repository/index", "POST"), attempts)))
        return self._model

    def _get(self, model: str | None, action: str) -> dict[str, Any]:
        attempts = self._attempts()
        return _json(self._call(self._plain(_route(self._name(model, attempts)) + action), attempts))

    def _probe(self, path: str) -> bool:
        try:
            return _is_good(self._call(self._plain(path), self._attempts(retries=0)))
        except RequestError as error:
            if error.status is not None:
                raise
            return False

    def _call(self, request: _Request, attempts: _Attempts) -> Answer:
        while True:
            outcome: Answer | Exception
            try:
                if not self._turns.acquire(timeout=left(attempts.deadline)):
                    raise TimeoutError
                try:
                    outcome = self._exchange(request(attempts.left()), attempts.deadline)
                finally:
                    self._turns.release()
            except OSError as error:
                outcome = error
            delay = attempts.delay(outcome)
            if delay is None:
                assert isinstance(outcome, Answer)
                return outcome
            time.sleep(delay)

    def _exchange(self, request: bytes, deadline: float) -> Answer:
        connection = self._take() or Connection(self._endpoint, deadline)
        try:
            answer = connection.exchange(request, deadline)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            keep = connection.open and not self._closed
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()
        return answer

    def _take(self) -> Connection | None:
        """The connection used last, so that those not needed any more grow old and are closed by the server."""
        while True:
            with self._lock:
                if self._closed:
                    raise ServeError("the client is closed")
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.idle():
                return connection
            connection.close()


class _Lane(Channel):
    """A connection whose answer is awaited."""

    __slots__ = ("_answer_future",)

    async def exchange(self, request: bytes) -> Answer:
        """Sends a request and waits for its answer."""
        self._answer_future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.send(request)
        return await self._answer_future

    def answered(self, answer: Answer) -> None:
        if not self._answer_future.done():
            self._answer_future.set_result(answer)

    def failed(self, error: Exception) -> None:
        if not self._answer_future.done():
            self._answer_future.set_exception(error)


class AsyncClient(_Base):
    """`Client` for an event loop: the same options and methods, these to be awaited. One loop a client."""

    def _open(self) -> None:
        self._idle: list[_Lane] = []
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
    ) -> dict[str, np.ndarray]:
        """See `Client.infer`."""
        attempts = self._attempts(timeout_s)
        name = await self._name(model, attempts)
        request = self._infer(name, {**(inputs or {}), **more}, outputs, priority)
        return _arrays(await self._call(request, attempts))

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
        return _json(await self._call(self._plain("/v2"), self._attempts()))

    async def index(self) -> list[dict[str, Any]]:
        """See `Client.index`."""
        return _json(await self._call(self._plain("/v2/repository/index", "POST"), self._attempts()))

    async def ready(self, model: str | None = None) -> bool:
        """See `Client.ready`."""
        return await self._probe("/v2/health/ready" if model is None else f"{_route(model)}/ready")

    async def live(self) -> bool:
        """See `Client.live`."""
        return await self._probe("/v2/health/live")

    async def close(self) -> None:
        """Closes every idle connection; those in use are closed after their answer."""
        self._closed = True
        idle, self._idle = self._idle, []
        for lane in idle:
            lane.abort()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _name(self, model: str | None, attempts: _Attempts) -> str:
        if model is not None:
            return model
        if self._model is None:
            self._model = _only(_json(await self._call(self._plain("/v2/repository/index", "POST"), attempts)))
        return self._model

    async def _get(self, model: str | None, action: str) -> dict[str, Any]:
        attempts = self._attempts()
        return _json(await self._call(self._plain(_route(await self._name(model, attempts)) + action), attempts))

    async def _probe(self, path: str) -> bool:
        try:
            return _is_good(await self._call(self._plain(path), self._attempts(retries=0)))
        except RequestError as error:
            if error.status is not None:
                raise
            return False

    async def _call(self, request: _Request, attempts: _Attempts) -> Answer:
        while True:
            outcome: Answer | Exception
            try:
                async with asyncio.timeout(left(attempts.deadline)), self._turns:
                    outcome = await self._exchange(request(attempts.left()))
            except OSError as error:
                outcome = error
            delay = attempts.delay(outcome)
            if delay is None:
                assert isinstance(outcome, Answer)
                return outcome
            await asyncio.sleep(delay)

    async def _exchange(self, request: bytes) -> Answer:
        lane = self._take() or await self._connect()
        try:
            answer = await lane.exchange(request)
        except BaseException:
            lane.abort()
            raise
        if lane.open and not self._closed:
            self._idle.append(lane)
        else:
            lane.abort()
        return answer

    def _take(self) -> _Lane | None:
        if self._closed:
            raise ServeError("the client is closed")
        while self._idle:
            lane = self._idle.pop()
            if lane.open:
                return lane
        return None

    async def _connect(self) -> _Lane:
        target = self._endpoint
        name = target.host if target.tls is not None else None
        loop = asyncio.get_running_loop()
        _, lane = await loop.create_connection(_Lane, target.host, target.port, ssl=target.tls, server_hostname=name)
        return lane
