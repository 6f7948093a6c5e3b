"""What a call takes besides a connection: what its request is made of, when to try again, what the answer means.

Nothing here sends or waits, so that the blocking and the asynchronous client share all of it.
"""

from __future__ import annotations

import email.utils
import http.client
import os
import random
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, NoReturn
from urllib.parse import quote

import msgspec
import numpy as np

from lepton_xla.errors import InputError, ServeError
from lepton_xla.serve.client.arrays import read_infer, write_infer
from lepton_xla.serve.client.endpoint import endpoint
from lepton_xla.serve.client.transport import Answer, DeadlineError, RequestError

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 2.0
# What a server sends that would rather be asked again: too many requests of this client, or of all.
_ASK_AGAIN = (429, 503)
_LONGEST_MESSAGE = 500
_NO_TIMEOUT_S = 1e9
# A request that is tried again says how much time is left in this many steps: equal requests are parsed once.
_STEPS = 64

type RequestOf = Callable[[float], bytes]
"""The bytes of a request with so many seconds left."""


class Attempts:
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

    def delay(self, outcome: Answer | OSError) -> float | None:
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
        if isinstance(outcome, OSError):
            raise RequestError(None, f"{self._url}: no answer after {self._tries()}: {_reason(outcome)}") from outcome
        return None

    def _time_out(self, cause: Exception) -> NoReturn:
        raise DeadlineError(None, f"{self._url}: no answer within {self._timeout_s:g} s") from cause

    def _tries(self) -> str:
        return "one attempt" if self._made == 1 else f"{self._made} attempts"


def _reason(error: OSError) -> str:
    """Why there is no connection: the system's words, for asyncio has others for each address."""
    number = error.errno
    if number is None or number <= 0 or isinstance(error, ssl.SSLError):
        return str(error) or type(error).__name__
    return os.strerror(number)


def _retry_after(answer: Answer) -> float:
    """Seconds that the answer asks for, written as a number or as a date; 0 without."""
    text = answer.headers.get(b"retry-after", b"").decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def checked(answer: Answer) -> Answer:
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


def json_of(answer: Answer) -> Any:
    """What a good answer says.

    Raises:
        RequestError: for another answer.
    """
    try:
        return msgspec.json.decode(checked(answer).body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(answer.status, f"the server's answer is not JSON: {error}") from error


def arrays_of(answer: Answer) -> dict[str, np.ndarray]:
    """The outputs that a good infer answer holds.

    Raises:
        RequestError: for another answer.
    """
    length = checked(answer).headers.get(b"inference-header-content-length")
    try:
        return read_infer(answer.body, None if length is None else int(length))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise RequestError(answer.status, f"the server's answer is no infer answer: {error}") from error


def is_good(answer: Answer) -> bool:
    """Tell whether a probe says yes; what says that the caller may not ask is an error."""
    if answer.status in (401, 403):
        checked(answer)
    return answer.status == 200


def only(index: Any) -> str:
    """The model, where a server has just one.

    Raises:
        InputError: where it has none or several.

    >>> only([{"name": "digits"}])
    'digits'
    """
    names = sorted({str(entry["name"]) for entry in index})
    if len(names) != 1:
        raise InputError(f"the server has {len(names)} models ({', '.join(names)[:200]}); say which")
    return names[0]


class Caller:
    """What both clients share: where the server is, and what each request is made of. Its options are `Client`'s."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
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
            tls_ca=tls_ca,
            tls_cert=tls_cert,
            tls_key=tls_key,
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

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._endpoint.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._endpoint.url!r})"

    def _attempts(self, timeout_s: float | None = None, retries: int | None = None) -> Attempts:
        seconds = self._timeout_s if timeout_s is None else timeout_s
        if not 0 < seconds < _NO_TIMEOUT_S:
            raise ServeError(f"timeout_s must be positive and less than {_NO_TIMEOUT_S:g}, not {seconds!r}")
        return Attempts(self._endpoint.url, self._retries if retries is None else retries, seconds)

    def _plain(self, path: str, method: str = "GET") -> RequestOf:
        request = self._endpoint.request(method, path, (b"{}",) if method == "POST" else ())
        return lambda left_s: request

    def _infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None,
        priority: int | None,
    ) -> RequestOf:
        parameters: dict[str, int] = {} if priority is None else {"priority": priority}
        path = f"{route(model)}/infer"

        def request(left_s: float) -> bytes:
            timeout = {"timeout": max(1, int(left_s * 1e6))}
            head, tail = write_infer(inputs, outputs, parameters | timeout, binary=self._binary)
            return self._endpoint.request("POST", path, (head, *tail), len(head) if self._binary else None)

        return request


def route(model: str) -> str:
    """The path of a model.

    >>> route("digits")
    '/v2/models/digits'
    """
    return f"/v2/models/{quote(model, safe='')}"
