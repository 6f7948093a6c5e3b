"""The one exception of the serving path: a request that is refused, with the HTTP status that says why."""

from __future__ import annotations

from typing import Any

from lepton_xla.errors import ServeError

_LONGEST = 500
_LONGEST_QUOTE = 100
_MOST_QUOTED = 8


def shortened(value: object) -> str:
    """`repr` of what a client sent, of no more of it than a message has room for.

    >>> shortened([1, 2, "x"]), len(shortened("x" * 10_000)) < 200
    ("[1, 2, 'x']", True)
    """
    if isinstance(value, list | tuple):
        shown = ", ".join(map(_within, value[:_MOST_QUOTED]))
        return f"[{shown}, ...]" if len(value) > _MOST_QUOTED else f"[{shown}]"
    return _within(value)


def _within(value: object) -> str:
    """An element. What is in it is not shown: of lists in lists there may be millions."""
    if isinstance(value, list | tuple | dict) and value:
        return "{...}" if isinstance(value, dict) else "[...]"
    if isinstance(value, str) and len(value) > _LONGEST_QUOTE:
        return f"{value[:_LONGEST_QUOTE]!r}..."
    return repr(value)


class HTTPError(ServeError):
    """A request that gets an error for an answer.

    Attributes:
        status: the HTTP status: 400 malformed, 401 no valid token, 403 a token that is not good for this, 404 unknown,
            405 method, 408 too slow, 413 body too large, 414 target too long, 415 encoding, 429 too often, 431 header
            fields too large, 500 inference failed, 501 not supported, 503 overloaded or stopping, 505 another version
            of HTTP.
        message: what goes to the client, as the `error` of the JSON body. Never a path, a traceback or a payload; cut
            where a client's own words would make it long.
        headers: header lines that go with it, such as `Allow: GET`.
        response: place for the answer made of it: an overloaded server gives one error to many requests.
    """

    def __init__(self, status: int, message: str, *headers: str) -> None:
        if len(message) > _LONGEST:
            message = message[:_LONGEST] + "..."
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers
        self.response: Any = None

    def bare(self) -> HTTPError:
        """What it says without where it was raised: kept, that would keep alive all that was in hand there.

        A frame that holds an error which was raised in it is a cycle, and its body stays until a collection finds it.
        """
        return HTTPError(self.status, self.message, *self.headers)
