"""Messages between the supervisor and its workers: JSON, one message a line, over one socket for each worker.

When the socket closes, the other side has ended. `Connections` carries file descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from lepton_xla.serve.app.options import Options
from lepton_xla.serve.models.changes import Change
from lepton_xla.serve.models.manager import Entry
from lepton_xla.serve.processes.packets import Packets
from lepton_xla.serve.protocol.monitoring import RightAnswers

REPORT_S = 0.5
"""How often a worker reports its counts, in case it is killed."""


class Settings(msgspec.Struct, tag="settings"):
    """To a worker, its first message: the settings of `leptonx serve`.

    Attributes:
        artifact: path of the artifact to serve; empty where the models of a repository are served, as `Prepare` and
            `Commit` say.
        repository: folder of those, or empty.
        sends_alerts: whether this worker sends alerts to webhooks. All look at the same counters; one of them sends.
    """

    artifact: str
    options: Options
    workers: int
    json_logs: bool
    repository: str = ""
    sends_alerts: bool = False


class Ready(msgspec.Struct, tag="ready"):
    """From a worker whose model is warm, or that has none yet, and waits for those of a repository.

    Attributes:
        model: its name on the wire; empty without one.
        digest: of the artifact's manifest; empty without one.
    """

    model: str
    digest: str


class Failed(msgspec.Struct, tag="failed"):
    """From a worker that cannot go on: the reason."""

    reason: str


class Connections(msgspec.Struct, tag="connections"):
    """To a worker: connections of clients. From it: how many it has open."""

    open: int = 0


class Stop(msgspec.Struct, tag="stop"):
    """To a worker: answer what was accepted, then end."""

    hurried: bool = False


class Reload(msgspec.Struct, tag="reload"):
    """To a worker: reload the token file and the certificates."""


class Leaving(msgspec.Struct, tag="leaving"):
    """From a worker: it wants no more connections."""


class Closed(msgspec.Struct, tag="closed"):
    """To a worker: there will be no more connections."""


class Counts(msgspec.Struct, tag="counts"):
    """From a worker: its counts so far. To one that asked for the total: the sum of all others, ended ones too.

    Those of many models come in several messages, of which the last says so.
    """

    counts: dict[str, Any]
    number: int = 0
    last: bool = True


class Count(msgspec.Struct, tag="count"):
    """To a worker: send `Counts` with this number."""

    number: int


class Total(msgspec.Struct, tag="total"):
    """From a worker that has just sent its own: a request for the `Counts` of the others, with this number."""

    number: int


class Prepare(msgspec.Struct, tag="prepare"):
    """To a worker: load the versions of a change beside what serves, and send `Prepared`."""

    number: int
    change: Change


class Prepared(msgspec.Struct, tag="prepared"):
    """From a worker: a change can be committed, except for versions that cannot be loaded.

    Attributes:
        number: the change's.
        failed: version -> reason.
        sizes: version -> bytes that it takes in this worker.
    """

    number: int
    failed: dict[str, str]
    sizes: dict[str, int] = {}


class Commit(msgspec.Struct, tag="commit"):
    """To a worker: put what was prepared, as far as the change still names it, and send `Freed`."""

    number: int
    change: Change


class Known(msgspec.Struct, tag="known"):
    """To a worker, where models are loaded on demand: the names of those of the repository, in one message or several.

    Attributes:
        names: some of them, or all.
        last: whether there are no more.
    """

    names: list[str]
    last: bool = True


class Freed(msgspec.Struct, tag="freed"):
    """From a worker: what a change replaced is gone."""

    number: int


class Ask(msgspec.Struct, tag="ask"):
    """From a worker: a client's request that concerns all workers; answered by `Told`.

    Attributes:
        number: names the request.
        action: `index`, `load`, `unload`, `reroute`, or `bring`: load it for a request, if it is not loaded.
        name: the model's.
        overrides: fields of `Source` to be set.
        who: asks for it.
    """

    number: int
    action: str
    name: str = ""
    overrides: dict[str, int | None] = {}
    who: str = ""


class Told(msgspec.Struct, tag="told"):
    """To a worker: the answer to an `Ask`, in one message or several, of which the last says so.

    Attributes:
        number: names the request.
        kind: of the `RepositoryError`; empty if all went well.
        error: its message.
        entries: of the index.
        last: whether there is no more.
    """

    number: int
    kind: Literal["", "invalid", "missing", "conflict", "failed", "large"] = ""
    error: str = ""
    entries: list[Entry] = []
    last: bool = True


class Judge(msgspec.Struct, tag="judge"):
    """Labels to be judged: from a worker that did not answer these requests, and to those that may have.

    Attributes:
        number: names the question.
        model: the model's name.
        piece: of the labels in JSON, request id -> the right class of each row.
        count: whether to count them; otherwise only to say which answers are known, and whether the labels fit.
        last: whether this is the last piece.
    """

    number: int
    model: str
    piece: bytes
    count: bool = False
    last: bool = True


class Judged(msgspec.Struct, tag="judged"):
    """The answer to a `Judge`, from a worker or to the one that asked.

    Attributes:
        number: names the question.
        known: places among the labels of those whose answers are known.
        rows: how many were judged.
        status, error: the HTTP status and message of a refusal; 0 if all went well.
    """

    number: int
    known: list[int] = []
    rows: int = 0
    status: int = 0
    error: str = ""


type Message = (
    Settings | Ready | Failed | Connections | Stop | Reload | Leaving | Closed | Counts | Count | Total
    | Prepare | Prepared | Commit | Freed | Known | Ask | Told | Judge | Judged
)  # fmt: skip

# Of the 64 KiB that a packet may have.
_PIECE_BYTES = 24 << 10
# Names in a message; one has up to 128 characters, and in JSON each of these up to twelve bytes.
_NAMES = 16


def in_pieces(counts: Mapping[str, Any], number: int = 0) -> list[Counts]:
    """Counts in as many messages as they need."""
    pieces: list[dict[str, Any]] = [{}]
    size = 0
    for key, value in counts.items():
        nbytes = len(_ENCODER.encode(value))
        if size and size + nbytes > _PIECE_BYTES:
            pieces.append({})
            size = 0
        pieces[-1][key] = value
        size += nbytes
    return [*(Counts(each, number, last=False) for each in pieces[:-1]), Counts(pieces[-1], number)]


def labels_in_pieces(number: int, model: str, labels: RightAnswers, *, count: bool = False) -> list[Judge]:
    """Labels in as many messages as they need."""
    text = msgspec.json.encode(labels)
    pieces = [text[start : start + _PIECE_BYTES] for start in range(0, len(text), _PIECE_BYTES)]
    return [Judge(number, model, piece, count, index == len(pieces) - 1) for index, piece in enumerate(pieces)]


class Labels:
    """Puts the pieces of labels together, of one sender."""

    def __init__(self) -> None:
        self._begun: dict[int, bytearray] = {}

    def add(self, message: Judge) -> dict[str, list[int | str]] | None:
        """The labels, once all pieces have come."""
        text = self._begun.setdefault(message.number, bytearray())
        text += message.piece
        if not message.last:
            return None
        return msgspec.json.decode(self._begun.pop(message.number), type=dict[str, list[int | str]])


def names_in_pieces(names: Sequence[str]) -> list[Known]:
    """Names in as many messages as they need."""
    pieces = [list(some) for some in itertools.batched(names, _NAMES)] or [[]]
    return [*(Known(some, last=False) for some in pieces[:-1]), Known(pieces[-1])]


def _plain(value: Any) -> str:
    if isinstance(value, Path):
        return os.fspath(value)
    raise NotImplementedError


def _typed(kind: type, value: Any) -> Any:
    return kind(value)


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)
_DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message, dec_hook=_typed)


class Control:
    """One end of the socket between the supervisor and a worker.

    Args:
        sock: from `pair`.
        received: called with each message and the descriptors that came with its packet, which it has to close.
        lost: called once when the other side is gone.
        loop: the event loop.
        with_fds: whether packets may carry descriptors.
    """

    def __init__(
        self,
        sock: socket.socket,
        received: Callable[[Message, list[int]], object],
        lost: Callable[[], object],
        loop: asyncio.AbstractEventLoop,
        *,
        with_fds: bool = True,
    ) -> None:
        self._received = received
        self._packets = Packets(sock, self._read, lost, loop, with_fds=with_fds)

    def send(self, message: Message) -> None:
        """Sends a message."""
        self._packets.write(_ENCODER.encode(message) + b"\n")

    def hand(self, message: Message, fds: Sequence[int]) -> bool:
        """Sends a message with copies of descriptors; the caller keeps its own. False if the socket is full."""
        return self._packets.offer(_ENCODER.encode(message) + b"\n", fds)

    def close(self) -> None:
        """Sends what is still queued, and closes the socket."""
        self._packets.flush()
        self._packets.close()

    def _read(self, packet: bytes, fds: list[int]) -> None:
        for line in packet.splitlines():
            self._received(_DECODER.decode(line), fds)


def say(sock: socket.socket, message: Message) -> None:
    """Sends a message from a process whose event loop has ended."""
    with contextlib.suppress(OSError):
        sock.send(_ENCODER.encode(message))


def settings_of(sock: socket.socket) -> Settings:
    """Waits for the first message to a new process.

    Raises:
        SystemExit: if the supervisor is already gone.
    """
    line = sock.recv(1 << 16)
    if not line:
        raise SystemExit(1)
    return msgspec.json.decode(line, type=Settings, dec_hook=_typed)
