"""Log lines of a serving process: one line an event, plain or JSON, control characters escaped, never a payload.

Clients can cause lines, so their number is bounded (`Throttle`), and whoever reads them may be slow, so a thread of
their own writes them, and drops what it cannot get rid of.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Mapping
from typing import IO, Any

from lepton_xla.serve.observe.sink import ClosedError, Sink

ACCESS = "lepton_xla.serve.access"
"""Logger of the access log, whose lines are sampled and so not throttled."""

_WORD = re.compile(r"[\w./:{}+-]+", re.ASCII)
_MOST_KINDS = 256
_QUEUED_LINES = 10_000
_CLOSE_S = 1.0


@dataclasses.dataclass(slots=True)
class _Told:
    """Of one kind: when the period began, how many were told, and how many were not since."""

    began_s: float
    count: int
    left_out: int


class Throttle:
    """Bounds how often things of a kind are told.

    Args:
        burst: how many of a kind are told in a period.
        period_s: its length.
        clock: seconds, monotonic.
    """

    def __init__(self, burst: int = 10, period_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._period_s = period_s
        self._clock = clock
        self._kinds: dict[Hashable, _Told] = {}

    def ask(self, kind: Hashable) -> int | None:
        """How many of the kind were left out since one was told; None if this one is to be left out too."""
        now = self._clock()
        told = self._kinds.get(kind)
        if told is None or now - told.began_s >= self._period_s:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
            told = self._kinds[kind] = _Told(now, 0, told.left_out if told else 0)
        if told.count >= self._burst:
            told.left_out += 1
            return None
        told.count += 1
        left_out, told.left_out = told.left_out, 0
        return left_out


class Repeats(logging.Filter):
    """Leaves out lines of a kind that come too often, and says how many in the next of them.

    Of a kind are lines of one level made from one template.
    """

    def __init__(self, throttle: Throttle | None = None) -> None:
        super().__init__()
        self._throttle = throttle or Throttle()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be written."""
        if record.name == ACCESS or getattr(record, "throttled", False):
            return True
        left_out = self._throttle.ask((record.name, record.levelno, record.msg))
        if left_out is None:
            return False
        if left_out:
            record.fields = {**fields_of(record), "left_out": left_out}
        return True


def fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    """What a record carries beside its message, from `extra={"fields": {...}}`."""
    return getattr(record, "fields", None) or {}


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, fields, and the exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for one record."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        # All ASCII and no control character: JSON itself would let through what moves a terminal's cursor.
        return json.dumps(line).replace("\x7f", "\\u007f")


class PlainLines(logging.Formatter):
    """Time, level, message and fields; a control character in them cannot start a line of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the base class names it)
        """The first line of one record."""
        fields = "".join(f" {name}={_plain(value)}" for name, value in fields_of(record).items())
        return _escaped(super().formatMessage(record) + fields)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """The lines of a traceback, indented: what an exception quotes cannot look like an event either."""
        return "\n".join(f"  {_escaped(line)}" for line in super().formatException(ei).split("\n"))


def _plain(value: Any) -> str:
    text = str(value)
    return text if _WORD.fullmatch(text) else json.dumps(text)


def _escaped(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class Writer(logging.Handler):
    """Writes lines on a thread of its own, so that nobody waits for whoever reads them.

    A stream that takes nothing now (a full pipe that does not block) is waited for, as one that blocks would be. What
    it refuses otherwise (no room on the disk) is lost and counted, and the next line that gets through says so. Only a
    pipe or a stream that is closed ends it.

    Args:
        stream: where to.
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__()
        self._out = Sink(stream)
        self._lines: queue.Queue[str | None] = queue.Queue(_QUEUED_LINES)
        self._lost = 0
        self._why = ""
        self._closed = False
        self._thread = threading.Thread(target=self._write, name="lepton-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queues the line of a record, or drops it where too many wait."""
        if self._closed:
            return
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._lost += 1
        except Exception:
            self.handleError(record)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            lost, self._lost = self._lost, 0
            try:
                self._out.write(f"{line}\n" if not lost else f"{line}\n{self._loss(lost)}\n")
                self._why = ""
            except (ClosedError, ValueError):
                self._closed = True
                return
            except OSError as error:
                self._lost += lost + 1
                self._why = error.strerror or "they could not be written"

    def _loss(self, lost: int) -> str:
        text = f"{lost} lines were lost: {self._why or 'they were not read as fast as they came'}"
        return self.format(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None))

    def close(self) -> None:
        """Writes what is queued, if that takes no longer than a second."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            pass
        else:
            self._thread.join(_CLOSE_S)
        super().close()


def configure(as_json: bool) -> None:
    """Sends the package's log, and warnings of other libraries, to stderr."""
    handler = Writer(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    handler.addFilter(Repeats())
    logger = logging.getLogger("lepton_xla")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(handler)
