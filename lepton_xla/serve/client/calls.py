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
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, NoReturn
from urllib.parse import quote

import msgspec
import numpy as np

from lepton_xla.errors import InputError, ServeError
from lepton_xla.serve.client.arrays import read_infer, write_infer
from lepton_xla.serve.client.endpoint import Endpoint, endpoint
from lepton_xla.serve.client.replicas import Replica, Replicas, StalledError, is_unreached
from lepton_xla.serve.client.transport import Answer, DeadlineError, RequestError

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 2.0
# What a server sends that would rather be asked again: too many requests of this client, or of all.
_ASK_AGAIN = (429, 503)
_LONGEST_MESSAGE = 500
_NO_TIMEOUT_S = 1e9
# A request that is tried again says how much time is left in this many steps: equal requests are parsed once.
_STEPS = 64

# What may be wrong with one replica and not with the request.
_ASK_ANOTHER = (500, 502)

type RequestOf = Callable[[Endpoint, float], bytes]
"""The bytes of a request to a server with so many seconds left."""


class Attempts:
    """Where a request goes, and when it is tried again.

    What one replica does not answer, another is asked at once. What none answers is tried again after exponential
    backoff with full jitter, bounded by a count and by the deadline. Refusals do not count, for nothing has run then; a
    request that may have run somewhere is sent `retries` times more at most, wherever to.

    Source: "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), the variant "full jitter".
    """

    def __init__(self, replicas: Replicas, retries: int, timeout_s: float) -> None:
        self.deadline = monotonic() + timeout_s
        self.kind: tuple[str, int] | None = None
        self.only: Replica | None = None  # the one that is asked, where no other has the answer
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._retries = retries
        self._made = 0
        self._tried: tuple[Replica, ...] = ()
        self._replica = replicas.all[0]
        self._began = self._took = 0.0
        self._asked_another = False

    def begin(self) -> Replica:
        """Choose the replica for the next attempt."""
        self._replica = self._replicas.take(self._tried) if self.only is None else self._replicas.hold(self.only)
        self._began = monotonic()
        return self._replica

    def end(self) -> None:
        """Say that the attempt is over, whatever came of it."""
        if self._replicas.several:
            self._took = monotonic() - self._began
            self._replicas.ended(self._replica)

    def left(self) -> float:
        """Seconds left, exactly at first, and rounded down later."""
        if not self._made and not self._tried:
            return self._timeout_s
        step = self._timeout_s / _STEPS
        return max(1, int((self.deadline - monotonic()) / step)) * step

    def delay(self, outcome: Answer | OSError) -> float | None:
        """Seconds to wait before the next attempt; None if this answer is the last word.

        Raises:
            RequestError: if there was no answer and is no next attempt.
        """
        if self._replicas.several:
            self._note(outcome)
            if self._goes_elsewhere(outcome):
                return 0.0
        if isinstance(outcome, Answer) and outcome.status not in _ASK_AGAIN:
            return None
        if isinstance(outcome, TimeoutError):
            self._time_out(outcome)
        if isinstance(outcome, ssl.SSLError) and not _is_cut(outcome):
            raise RequestError(None, f"{self._label}: TLS failed: {outcome.reason or outcome}") from outcome
        self._tried = ()
        most = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2**self._made)
        delay = random.uniform(0, most)  # noqa: S311 (no secret)
        if isinstance(outcome, Answer):
            delay += _retry_after(outcome)
        self._made += 1
        if self._made <= self._retries and monotonic() + delay < self.deadline:
            return delay
        if isinstance(outcome, OSError):
            raise RequestError(None, f"{self._label}: no answer after {self._tries()}: {_reason(outcome)}") from outcome
        return None

    def _time_out(self, cause: Exception) -> NoReturn:
        raise DeadlineError(None, f"{self._label}: no answer within {self._timeout_s:g} s") from cause

    @property
    def _label(self) -> str:
        return self._replicas.label

    def _note(self, outcome: Answer | OSError) -> None:
        """What the outcome says of the replica."""
        replicas, replica = self._replicas, self._replica
        if isinstance(outcome, OSError):
            is_certain = isinstance(outcome, StalledError) or is_unreached(outcome)
            replicas.failed(replica, self._began, certain=is_certain)
        elif outcome.status in _ASK_AGAIN and (wait := _retry_after(outcome)):
            replicas.busy(replica, wait)
        elif outcome.status == 503 or outcome.status in _ASK_ANOTHER:
            replicas.failed(replica, self._began, certain=False)
        else:
            is_timed = self.kind is not None and outcome.status == 200
            replicas.answered(replica, self._began, self._took if is_timed else None, self.kind)

    def _goes_elsewhere(self, outcome: Answer | OSError) -> bool:
        """Whether the request goes to another replica now."""
        self._tried += (self._replica,)
        if self.only or isinstance(outcome, TimeoutError) or not self._replicas.has_other(self._tried):
            return False
        if isinstance(outcome, Answer):
            if outcome.status in _ASK_AGAIN:
                return True
            if outcome.status not in _ASK_ANOTHER or self._asked_another:
                return False
            self._asked_another = True  # one other is asked: what fails there too is the request's fault
        elif is_unreached(outcome) or (isinstance(outcome, ssl.SSLError) and not _is_cut(outcome)):
            return True
        if self._made >= self._retries:
            return False
        self._made += 1
        return True

    def _tries(self) -> str:
        return "one attempt" if self._made == 1 else f"{self._made} attempts"


class Search:
    """Looks for the one of several servers that knows a thing: asks each, until one does not say 404."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._found: Answer | None = None
        self._none: Answer | None = None
        self._error: RequestError | None = None

    def left(self) -> Iterator[Replica]:
        """The servers to ask; ends when one has been found."""
        for replica in self._replicas.all:
            if self._found is None:
                yield replica

    def heard(self, answer: Answer) -> None:
        """Take what a server answers."""
        if answer.status == 404:
            self._none = answer
        else:
            self._found = answer

    def missed(self, error: RequestError) -> None:
        """Take that a server did not answer."""
        self._error = error

    def answer(self) -> Answer:
        """What the server that knows it says, or else that none does.

        Raises:
            RequestError: if one could not be asked, and none of the others knows it.
        """
        if self._found is None and self._error is not None:
            raise self._error
        answer = self._found or self._none
        assert answer is not None
        return answer


def _is_cut(error: ssl.SSLError) -> bool:
    """Whether the connection only ended, as one without TLS may."""
    return isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)


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


def json_of(answer: Answer, kind: Any = Any) -> Any:
    """What a good answer says.

    Args:
        answer: the answer.
        kind: what there must be of it; more may be. Whoever answers at a URL need not be such a server.

    Raises:
        RequestError: for another answer.
    """
    try:
        found = msgspec.json.decode(checked(answer).body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(answer.status, f"the server's answer is not JSON: {error}") from error
    try:
        msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        raise RequestError(answer.status, f"the server's answer is not what this route says: {error}") from error
    return found


def text_of(answer: Answer) -> str:
    """The text that a good answer is.

    Raises:
        RequestError: for another answer.
    """
    return checked(answer).body.decode(errors="replace")


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
        url: str | Sequence[str],
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
        access: dict[str, Any] = {
            "token": token,
            "token_file": token_file,
            "tls_ca": tls_ca,
            "tls_cert": tls_cert,
            "tls_key": tls_key,
        }
        urls = (url,) if isinstance(url, str) else tuple(url)
        self._replicas = Replicas([endpoint(each, **access) for each in urls])
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
        """Where the server is; of several, all of them."""
        return self._replicas.label

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _attempts(self, timeout_s: float | None = None, retries: int | None = None) -> Attempts:
        seconds = self._timeout_s if timeout_s is None else timeout_s
        if not 0 < seconds < _NO_TIMEOUT_S:
            raise ServeError(f"timeout_s must be positive and less than {_NO_TIMEOUT_S:g}, not {seconds!r}")
        return Attempts(self._replicas, self._retries if retries is None else retries, seconds)

    def _plain(self, path: str, method: str = "GET", body: bytes = b"{}") -> RequestOf:
        return lambda there, left_s: there.request(method, path, (body,) if method == "POST" else ())

    def _infer(
        self,
        attempts: Attempts,
        model: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None,
        priority: int | None,
        request_id: str | None,
    ) -> RequestOf:
        parameters: dict[str, int] = {} if priority is None else {"priority": priority}
        path = f"{route(model)}/infer"

        def request(there: Endpoint, left_s: float) -> bytes:
            timeout = {"timeout": max(1, int(left_s * 1e6))}
            head, tail = write_infer(
                inputs, outputs, parameters | timeout, request_id=request_id, binary=self._binary
            )  # fmt: skip
            sent = there.request("POST", path, (head, *tail), len(head) if self._binary else None)
            attempts.kind = (model, len(sent).bit_length())  # what the time of the answer depends on
            return sent

        return request


def feedback_of(labels: Mapping[str, int | Sequence[int] | str]) -> bytes:
    """The body of a feedback request.

    Raises:
        InputError: if a label is no integer, nor a list of them, nor a text.

    >>> feedback_of({"a": 3, "b": np.array([1, 2])})
    b'{"feedback":[{"id":"a","label":3},{"id":"b","label":[1,2]}]}'
    """
    entries: list[dict[str, Any]] = []
    for request_id, label in labels.items():
        if isinstance(label, str):
            entries.append({"id": request_id, "label": label})
            continue
        array = np.asarray(label)
        if array.ndim > 1 or not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"the label of request {request_id!r} must be a class, or one for each of its rows")
        entries.append({"id": request_id, "label": array.tolist()})
    return msgspec.json.encode({"feedback": entries})


def route(model: str) -> str:
    """The path of a model.

    >>> route("digits")
    '/v2/models/digits'
    """
    return f"/v2/models/{quote(model, safe='')}"
