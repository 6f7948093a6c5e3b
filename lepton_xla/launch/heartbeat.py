"""Progress of a training process, told to the launcher's watchdog through a small file.

The training loop itself tells it, not a thread: a thread would go on telling while the loop hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib

FILE_VARIABLE = "LEPTON_HEARTBEAT_FILE"
"""Names the file of this process. The launcher sets it."""

DATA, STEP = "data", "step"
"""The phases in which steps pass: it waits for the next batch, or has it. The watchdog's shortest limit holds."""

_log = logging.getLogger("lepton_xla.launch")

# Every record has this many bytes: one short write replaces the previous one as a whole.
_RECORD_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a process last told.

    Attributes:
        step: steps done.
        first_step: `step` of its first beat in the phase `step`: where it went on from; -1 before that.
        phase: what it does: `start`, `compile`, `data`, `step`, `evaluate` or `save`.

    >>> from lepton_xla.launch import Beat
    >>> Beat(step=12, first_step=10, phase="step").phase
    'step'
    """

    step: int
    first_step: int
    phase: str


class Heartbeat:
    """One process's file.

    Args:
        path: the file; it is created with the first beat.

    >>> from lepton_xla.launch import Heartbeat
    >>> heart = Heartbeat("rank-0")
    >>> heart.beat(500, "compile")
    >>> heart.beat(500, "step")
    >>> Heartbeat.read("rank-0")
    Beat(step=500, first_step=500, phase='step')
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = pathlib.Path(path)
        self._file = -1
        self._first_step = -1
        self._broken = False

    def beat(self, step: int, phase: str) -> None:
        """Write the progress. Never raises."""
        if self._broken:
            return
        if phase == STEP and self._first_step < 0:
            self._first_step = step
        record = f"{step} {self._first_step} {phase}".encode()
        try:
            if self._file < 0:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(self._file, record.ljust(_RECORD_BYTES)[:_RECORD_BYTES], 0)
        except OSError as error:
            self._broken = True  # training goes on; the watchdog will say that it hears nothing
            _log.warning("%s cannot be written: %s; the watchdog hears nothing more", self._path, error.strerror)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Beat | None:
        """The last beat in a file; None before the first."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            step, first_step, phase = pathlib.Path(path).read_text(encoding="utf-8").split()
            return Beat(int(step), int(first_step), phase)
        return None

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def beat(step: int, phase: str) -> None:
    """Tell the launcher how far this process is. Does nothing in a process that no launcher watches.

    Call it from the training loop, never from a thread: with each step, and before and after what takes long. It is
    one short write to a local file, a few microseconds.

    Args:
        step: steps done.
        phase: `start`, `compile`, `data` (before it asks for a batch), `step`, `evaluate` or `save`; the watchdog has a
            limit for each.

    >>> lx.launch.beat(500, "compile")
    >>> for step in range(500, 503):
    ...     lx.launch.beat(step, "step")
    """
    heart = _own()
    if heart is not None:
        heart.beat(step, phase)


@functools.cache
def _own() -> Heartbeat | None:
    path = os.environ.get(FILE_VARIABLE)
    return Heartbeat(path) if path else None
