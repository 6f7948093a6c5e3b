"""Load of requests that generate: connections that stream one after the other, and when their tokens came."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import re
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lepton_xla.errors import ServeError
from lepton_xla.serve.client.calls import route
from lepton_xla.serve.client.endpoint import Endpoint
from lepton_xla.serve.client.transport import open_socket
from lepton_xla.serve.load.result import percentiles

_END = b"0\r\n\r\n"
# Tokens of the prompts are below this, so that every vocabulary has them.
_VALUES = 100
# So many answers that are all refusals end a load, if there are not more prompts or connections.
_REFUSALS, _MOST_REFUSALS = 3, 100
_LATER = (408, 429)  # refusals that may be no more the next time


@dataclasses.dataclass
class Streams:
    """What came of a load.

    Attributes:
        seconds: of the measurement.
        requests: streams that ended well in it.
        errors: by what was told.
        tokens: that came in it.
        first_s: seconds from a request to its first token, without connecting.
        next_s: seconds from a token to the next one of its stream.
        answered: whether any request was taken, or may be the next time.
        refusals: requests that were refused as wrong.
        refusal: why the last of these was, as the server says.
    """

    seconds: float = 0.0
    requests: int = 0
    errors: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    tokens: int = 0
    first_s: list[float] = dataclasses.field(default_factory=list[float])
    next_s: list[float] = dataclasses.field(default_factory=list[float])
    answered: bool = False
    refusals: int = 0
    refusal: str = ""

    def to_json(self) -> dict[str, Any]:
        """The figures, percentiles in seconds; None where nothing was measured.

        >>> Streams(seconds=1.0).to_json()["next_token_s"]
        {'p50': None, 'p90': None, 'p99': None, 'p99.9': None, 'max': None}
        """
        return {
            "seconds": self.seconds,
            "requests": self.requests,
            "errors": self.errors,
            "tokens_per_s": self.tokens / self.seconds,
            "first_token_s": _percentiles(self.first_s),
            "next_token_s": _percentiles(self.next_s),
        }


def _percentiles(values: list[float]) -> dict[str, float | None]:
    return {name: value if values else None for name, value in percentiles(np.array(values)).items()}


def stream(
    target: Endpoint,
    model: str,
    *,
    connections: int,
    seconds: float,
    warmup_s: float,
    timeout_s: float,
    prompt: int,
    tokens: int,
    texts: Sequence[str] = (),
) -> Streams:
    """Have each connection send its next prompt when the stream before has ended.

    Args:
        target: the server.
        model: name of the model.
        connections: number of streams at once.
        seconds: of the measurement.
        warmup_s: seconds of the same load before it.
        timeout_s: seconds without a token after which a stream is given up.
        prompt: tokens of each prompt, random ones.
        tokens: tokens to generate for each.
        texts: prompts instead of random ones, which all connections take in turn, again and again; the model may end
            an answer to these before `tokens`.

    Raises:
        ServeError: if each prompt was refused as wrong (HTTP 4xx); the load ends then.
    """
    found, lock, started = Streams(seconds=seconds), threading.Lock(), time.perf_counter()
    begins, ends = started + warmup_s, started + warmup_s + seconds
    turns, hopeless = itertools.cycle(texts), threading.Event()
    enough = max(_REFUSALS, connections, min(len(texts), _MOST_REFUSALS))

    def body(drawn: random.Random) -> bytes:
        if texts:
            with lock:
                return json.dumps({"text_input": next(turns), "parameters": {"max_tokens": tokens}}).encode()
        ids = [drawn.randrange(1, _VALUES) for _ in range(prompt)]
        return json.dumps({"input_ids": ids, "parameters": {"max_tokens": tokens, "ignore_end": True}}).encode()

    def run(number: int) -> None:
        drawn = random.Random(number)  # noqa: S311 (prompts are no secrets)
        while time.perf_counter() < ends and not hopeless.is_set():
            request = target.request("POST", f"{route(model)}/generate_stream", (body(drawn),))
            try:
                sent, times, failure = _times(target, request, timeout_s)
            except (OSError, ValueError, ServeError) as error:
                sent, times, failure = 0.0, [], _Failure(f"{type(error).__name__}: {error}")
                time.sleep(0.05)
            with lock:
                _count(found, sent, times, failure, begins, ends)
                if found.refusals >= enough and not found.answered:
                    hopeless.set()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if hopeless.is_set():
        raise ServeError(f"the first {found.refusals} requests were all refused: {found.refusal}")
    return found


class _Failure(NamedTuple):
    """What went wrong with a request: its kind, as it is counted; the HTTP status, if that says so; and the reason."""

    kind: str
    status: int = 0
    reason: str = ""


def _count(
    found: Streams, sent: float, times: list[float], failure: _Failure | None, begins: float, ends: float
) -> None:
    inside = [at for at in times if begins <= at < ends]
    found.tokens += len(inside)
    if times and begins <= sent < ends:
        found.first_s.append(times[0] - sent)
    found.next_s += [b - a for a, b in itertools.pairwise(times) if begins <= a and b < ends]
    if failure is None:
        found.requests += begins <= (times or [0.0])[-1] < ends
    else:
        found.errors[failure.kind] = found.errors.get(failure.kind, 0) + 1
    if failure is not None and 400 <= failure.status < 500 and failure.status not in _LATER:
        found.refusals += 1
        found.refusal = f"{failure.reason or 'no reason given'} ({failure.kind})"
    else:
        found.answered = True


def _times(target: Endpoint, request: bytes, timeout_s: float) -> tuple[float, list[float], _Failure | None]:
    """When a request was sent, when each token of its stream came, and what went wrong, if anything did."""
    times: list[float] = []
    with contextlib.closing(open_socket(target, timeout_s)) as sock:
        sent = time.perf_counter()
        sock.sendall(request)
        data = b""
        while b"\r\n\r\n" not in data:
            data += _more(sock)
        head, _, data = data.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if status != 200:
            return sent, times, _Failure(f"HTTP {status}", status, _reason(head, data, sock))
        while True:
            *events, data = data.split(b"\n\n")
            now = time.perf_counter()
            for event in events:
                if b'"error"' in event:
                    return sent, times, _Failure("generation failed")
                if b'"details"' not in event:
                    times.append(now)
            if data.endswith(_END):
                return sent, times, None
            data += _more(sock)


def _reason(head: bytes, data: bytes, sock: socket.socket) -> str:
    """What a JSON answer says of an error; as the protocol says it, or OpenAI's."""
    length = re.search(rb"(?i)\r\ncontent-length: *(\d{1,6})\r?\n?", head)
    while length and len(data) < int(length[1]):
        data += _more(sock)
    try:
        said = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        return ""
    return " ".join(str(said).split())[:500]


def _more(sock: socket.socket) -> bytes:
    part = sock.recv(65_536)
    if not part:
        raise ServeError("the server closed the connection")
    return part
