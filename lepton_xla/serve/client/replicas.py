"""Which of several servers of the same models gets the next request.

The one with the fewest unanswered requests, of those that are in use. A replica rests for a while if it fails or if it
is slow, and returns if one request that it is then given goes well. Nothing here sends or waits: time is given.
"""

from __future__ import annotations

import dataclasses
import math
import random
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from time import monotonic
from typing import Any

from lepton_xla.errors import ServeError
from lepton_xla.serve.client.endpoint import Endpoint

FAILURES = 3  # in a row, for a replica to rest
SLOW_ANSWERS = 5  # in a row
SLOW = 3.0  # times the median pace of the other replicas
FIRST_REST_S = 1.0
LONGEST_REST_S = 60.0
_GAIN = 0.1  # of the moving averages
_MOST_KINDS = 256


class UnreachedError(ConnectionError):
    """The request did not get to the server: it takes no connections."""


class StalledError(ConnectionError):
    """The server has the request and shows no life any more."""


# What nobody can have begun to answer: no name, no listener, no socket file, no connection in time.
_UNREACHED = (UnreachedError, ConnectionRefusedError, FileNotFoundError, socket.gaierror)


def is_unreached(error: BaseException) -> bool:
    """Tell whether a request certainly did not reach a server.

    >>> is_unreached(ConnectionRefusedError()), is_unreached(ConnectionResetError())
    (True, False)
    """
    return isinstance(error, _UNREACHED)


@dataclasses.dataclass(slots=True, eq=False)
class Replica:
    """One server, and what is known of it.

    Attributes:
        endpoint: where it is.
        idle: its connections that wait for a request; the client's own.
        outstanding: requests that it has and has not answered.
        failures: failures since its last answer.
        slow: slow answers since its last one that was not.
        pace: its time for an answer, divided by what requests of that kind take; a moving average. 0 before the first.
        resting: whether it is out of use.
        rested: when it was last put out of use.
        until: the time before which it gets nothing: while it rests, or has asked not to be asked.
        rests: rests in a row; each is twice as long as the one before.
        trying: whether the request that ends its rest is on its way.
        heard: the last time that it gave any sign of life.
    """

    endpoint: Endpoint
    idle: list[Any] = dataclasses.field(default_factory=list)
    outstanding: int = 0
    failures: int = 0
    slow: int = 0
    pace: float = 0.0
    resting: bool = False
    rested: float = 0.0
    until: float = 0.0
    rests: int = 0
    trying: bool = False
    heard: float = 0.0


class Replicas:
    """Several servers as one. Threads may share it.

    Args:
        endpoints: where they are.
        clock: seconds, monotonic.

    Raises:
        ServeError: if there are none, or one is named twice.

    >>> from lepton_xla.serve.client.endpoint import endpoint
    >>> replicas = Replicas([endpoint("http://a:8000"), endpoint("http://b:8000")])
    >>> first = replicas.take()
    >>> second = replicas.take()
    >>> first is second, first.outstanding
    (False, 1)
    """

    def __init__(self, endpoints: Sequence[Endpoint], clock: Callable[[], float] = monotonic) -> None:
        urls = [each.url for each in endpoints]
        if not urls or len({(each.host, each.port, each.prefix) for each in endpoints}) < len(urls):
            raise ServeError(f"a client needs one or more different URLs, not {urls!r}")
        self.all = tuple(Replica(each) for each in endpoints)
        self.several = len(self.all) > 1
        self.label = ", ".join(urls)
        self._clock = clock
        self._lock = threading.Lock()
        self._typical: dict[Any, float] = {}  # seconds, by kind of request

    def take(self, tried: Collection[Replica] = ()) -> Replica:
        """The replica for the next request, which counts as outstanding until `ended`.

        Args:
            tried: those that have just failed to answer this request; they come last.
        """
        if not self.several:
            return self.all[0]
        with self._lock:
            now = self._clock()
            chosen = next((each for each in self.all if self._is_due(each, now) and each not in tried), None)
            if chosen is not None:
                chosen.trying = True
            else:
                chosen = min(self.all, key=lambda each: self._rank(each, now, tried))
            chosen.outstanding += 1
            return chosen

    def hold(self, replica: Replica) -> Replica:
        """The given replica for a request that only it can answer, counted as by `take`."""
        with self._lock:
            replica.outstanding += 1
        return replica

    def has_other(self, tried: Collection[Replica]) -> bool:
        """Whether a replica that has not been tried may answer now: it is in use, or rests only because it is slow."""
        now = self._clock()
        return any(
            each not in tried and (each.failures == 0 if each.resting else each.until <= now) for each in self.all
        )

    def ended(self, replica: Replica) -> None:
        """Count a request as not outstanding any more; call once for each `take`."""
        if self.several:
            with self._lock:
                replica.outstanding -= 1
                replica.trying = False

    def answered(self, replica: Replica, began: float, seconds: float | None, kind: Any = None) -> None:
        """Take note of an answer.

        Args:
            began: when its request was sent. An older one than the replica's rest says nothing about that.
            seconds: how long it took; None for one that says nothing about the replica's speed.
            kind: what of the request its time depends on. Paces compare requests of a kind.
        """
        if not self.several:
            return
        with self._lock:
            replica.heard = self._clock()
            failed, replica.failures = replica.failures > 0, 0
            if replica.resting and began < replica.rested:
                return
            if replica.resting and (failed or seconds is None):
                self._return(replica)
            elif seconds is not None:
                self._time(replica, seconds, kind)

    def failed(self, replica: Replica, began: float, *, certain: bool) -> None:
        """Take note that a replica gave no answer, or one that says that something is wrong with it.

        Args:
            began: when the request was sent.
            certain: whether one such failure is enough for it to rest.
        """
        if not self.several:
            return
        with self._lock:
            replica.failures += 1
            if replica.resting and began < replica.rested:
                return
            if certain or replica.resting or replica.failures >= FAILURES:
                self._rest(replica)

    def busy(self, replica: Replica, seconds: float) -> None:
        """Take note that a replica does not want to be asked for some seconds. That is no failure."""
        if self.several:
            with self._lock:
                replica.heard = self._clock()
                replica.until = max(replica.until, replica.heard + seconds)

    def heard(self, replica: Replica) -> None:
        """Take note of a sign of life."""
        replica.heard = self._clock()

    def silence_s(self, replica: Replica) -> float:
        """Seconds since the last sign of life."""
        return self._clock() - replica.heard

    def _is_due(self, replica: Replica, now: float) -> bool:
        return replica.resting and not replica.trying and replica.until <= now

    def _rank(self, replica: Replica, now: float, tried: Collection[Replica]) -> tuple[Any, ...]:
        """Less is better. If all rest or have been tried, a slow one is asked all the same, or what returns first."""
        away = replica.until if replica.resting or replica.until > now else 0.0
        fails = replica.resting and replica.failures > 0
        return (replica in tried, fails, away > 0, away, replica.outstanding, random.random())  # noqa: S311 (no secret)

    def _time(self, replica: Replica, seconds: float, kind: Any) -> None:
        if len(self._typical) >= _MOST_KINDS and kind not in self._typical:
            self._typical.clear()
        typical = self._typical.setdefault(kind, seconds)
        ratio = seconds / max(typical, 1e-9)
        # What rests, or is not known yet, counts as the slowest: so no more than half of all can be slow.
        others = (each for each in self.all if each is not replica)
        paces = sorted(math.inf if each.resting or each.pace == 0 else each.pace for each in others)
        is_slow = ratio > SLOW * paces[len(paces) // 2]
        if replica.resting:
            if is_slow:
                self._rest(replica)
                return
            self._return(replica)
        replica.slow = replica.slow + 1 if is_slow else 0
        replica.pace = ratio if replica.pace == 0 else replica.pace + _GAIN * (ratio - replica.pace)
        if replica.slow >= SLOW_ANSWERS:
            self._rest(replica)
        else:
            self._typical[kind] = typical + _GAIN * (seconds - typical)

    def _rest(self, replica: Replica) -> None:
        now = self._clock()
        if not replica.resting and now - replica.until > LONGEST_REST_S:
            replica.rests = 0  # it has been well for long
        rest = min(LONGEST_REST_S, FIRST_REST_S * 2**replica.rests)
        replica.resting, replica.rested, replica.slow = True, now, 0
        replica.rests = min(replica.rests + 1, 10)
        # Clients that lost it together do not come back together.
        replica.until = now + rest * random.uniform(0.75, 1.25)  # noqa: S311 (no secret)

    def _return(self, replica: Replica) -> None:
        replica.resting = False
        replica.until = self._clock()
        replica.slow = 0
        replica.pace = 0.0  # what was known of it is old
