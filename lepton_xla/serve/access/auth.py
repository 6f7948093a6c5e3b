"""Who may ask for what: bearer tokens (RFC 6750), decided once for each distinct request head.

Nothing is open but the health routes and the files of the page, compared byte for byte: another spelling of them needs
a token like everything else. A token is looked for before the path is looked at, so that without one nobody learns
which paths exist.
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Callable
from pathlib import Path
from time import time

from lepton_xla.serve.access.tokens import Token, digest_of, read_tokens
from lepton_xla.serve.access.watched import Watched
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange, Head
from lepton_xla.serve.rates import Rate

type Route = Callable[[Exchange], None]

_CREDENTIALS = re.compile(rb"bearer +([A-Za-z0-9._~+/-]{1,512}=*)", re.IGNORECASE)
_TOKENLESS = ("health", "page")
_CHALLENGE = 'WWW-Authenticate: Bearer realm="lepton_xla"'


class Grant:
    """A token of the file as it was last read.

    Attributes:
        live: whether the file is still that one; once it is not, heads that were let in are looked at again.
        expires_s: the time (Unix) at which it ends; infinite where it does not.
    """

    __slots__ = ("_rate", "digest", "expires_s", "live", "name", "scopes")

    def __init__(self, token: Token, previous: Grant | None) -> None:
        self.live = True
        self.name = token.name
        self.digest = bytes.fromhex(token.sha256)
        self.scopes = frozenset[str](token.scopes)
        self.expires_s = math.inf if token.expires is None else token.expires.timestamp()
        self._rate = Rate(token.requests_per_s, token.burst)
        if previous is not None:
            self._rate.follow(previous._rate)

    def admit(self, now: float) -> None:
        """Takes one request out of the bucket.

        Args:
            now: the time on any one monotonic clock, in seconds.

        Raises:
            HTTPError: 401 if the token has expired, 429 if the bucket is empty.
        """
        if self.expires_s <= time():
            raise _invalid()
        early = self._rate.take(now)
        if early:
            raise HTTPError(429, "too many requests with this token", f"Retry-After: {max(1, math.ceil(early))}")


class _Guarded:
    """A route that checks a grant for every request. It is cached with the head that the grant admitted."""

    __slots__ = ("_again", "_grant", "_route")

    def __init__(self, grant: Grant, route: Route, again: Route) -> None:
        self._grant = grant
        self._route = route
        self._again = again

    def __call__(self, exchange: Exchange) -> None:
        grant = self._grant
        if not grant.live:
            exchange.head.generation = -1
            self._again(exchange)
            return
        grant.admit(exchange.started_s)
        self._route(exchange)


class Guard:
    """Lets in who has a token.

    Args:
        path: the token file.
        open_paths: paths that need none.

    Raises:
        ServeError: if the file cannot be used.
    """

    def __init__(self, path: Path, open_paths: frozenset[bytes]) -> None:
        self._open = open_paths
        self._tokens = Watched((path,), lambda: read_tokens(path))
        self._grants: dict[bytes, Grant] = {}
        self._install()

    def refresh(self, *, force: bool = False) -> None:
        """Reads the file again if it changed; heads that were let in are decided anew."""
        if self._tokens.refresh(force=force):
            self._install()

    def _install(self) -> None:
        old = self._grants
        new: dict[bytes, Grant] = {}
        for token in self._tokens.value:
            digest = bytes.fromhex(token.sha256)
            new[digest] = Grant(token, old.get(digest))
        self._grants = new
        for grant in old.values():
            grant.live = False

    def authenticate(self, head: Head) -> Grant | None:
        """The grant of the token that a request brings; None on a path that is open to all.

        Raises:
            HTTPError: 401 without a token, or with one that is unknown, revoked or expired.
        """
        if head.target.partition(b"?")[0] in self._open:
            return None
        given = head.headers.get(b"authorization")
        if given is None:
            raise HTTPError(401, "a token is needed: Authorization: Bearer ...", _CHALLENGE)
        match = _CREDENTIALS.fullmatch(given)
        if match is None:
            raise _invalid()
        digest = digest_of(match[1])
        # How far two digests agree does not show in the time of a look-up: Python hashes bytes with a random key.
        grant = self._grants.get(digest)
        if grant is None or not hmac.compare_digest(grant.digest, digest) or grant.expires_s <= time():
            raise _invalid()
        return grant

    def protect(self, grant: Grant | None, scope: str, route: Route, again: Route) -> Route:
        """A route as a grant may use it.

        Args:
            grant: what `authenticate` gave.
            scope: what the route needs; "health" and "page" need nothing.
            route: answers the request.
            again: takes the request if the token file changed since.

        Raises:
            HTTPError: 403 if the token is not good for it.
        """
        if grant is None:
            if scope not in _TOKENLESS:
                raise HTTPError(401, "a token is needed: Authorization: Bearer ...", _CHALLENGE)
            return route
        if scope not in _TOKENLESS and scope not in grant.scopes:
            challenge = f'{_CHALLENGE}, error="insufficient_scope", scope="{scope}"'
            raise HTTPError(403, f"this token is not good for {scope!r}", challenge)
        return _Guarded(grant, route, again)


def _invalid() -> HTTPError:
    return HTTPError(401, "the token is not valid", f'{_CHALLENGE}, error="invalid_token"')
