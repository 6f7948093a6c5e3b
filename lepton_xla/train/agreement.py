"""What the processes of a run agree on: whether all of them can go on, have saved, and what one of them has found."""

from __future__ import annotations

import itertools
import time

import jax

from lepton_xla import _compat
from lepton_xla.errors import CheckpointError, first_line

# For a save to slow storage, say; Orbax waits as long.
_TIMEOUT_S = 1200.0
_PAUSES_S = 0.002, 0.2
_LONGEST = 500
_START, _END = 120, 160
# What a process says that failed only because another one did.
_OTHER = "another process failed"

_numbers = itertools.count()


class OtherProcessError(Exception):
    """Another process of the run could not do its part of a save."""


def problem_of(error: BaseException) -> str:
    """What is wrong, as `Agreement.problem` takes it: the first error of those that were raised in turn."""
    while isinstance(error, OtherProcessError):
        if error.__context__ is None:
            return _OTHER
        error = error.__context__
    text = next(iter(str(error).splitlines()), "")
    # TensorStore says first which file it was, and last what was wrong with it.
    return f"{text[:_START]} ... {text[-_END:]}" if len(text) > _START + _END else first_line(error)


class Agreement:
    """Lets the processes of a run agree. All of them must make it, and ask the same, in the same order.

    They exchange texts through JAX's coordinator and not through devices. So a process that waits for another one
    learns that it failed, where a barrier would wait until its time is over.

    >>> agreement = Agreement()
    >>> agreement.problem(None), agreement.problem("the disk is full"), agreement.first("5")
    (None, 'the disk is full', '5')
    """

    def __init__(self, timeout_s: float = _TIMEOUT_S) -> None:
        """Begin to agree; `timeout_s` is how long a process may be late."""
        self._timeout_s = timeout_s
        self._name = f"lepton/agreement/{next(_numbers)}"
        self._asked = 0
        self._left: str | None = None
        self._saves = self._barriers = 0
        self._failed = False

    def problem(self, mine: str | None) -> str | None:
        """Exchange problems: None if no process has one, else the first one's, the same text in all processes."""
        texts = self._exchange((mine or "")[:_LONGEST])
        if len(texts) == 1:
            return mine
        found = [(index, text) for index, text in enumerate(texts) if text]
        index, text = next((each for each in found if each[1] != _OTHER), found[0] if found else (0, ""))
        return f"process {index}: {text}" if text else None

    def first(self, text: str) -> str:
        """The text of the first process, in all of them."""
        return self._exchange(text)[0]

    def begin_save(self) -> None:
        """Begin to count the barriers of a save."""
        self._saves += 1
        self._barriers = 0
        self._failed = False

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Wait for all processes at a barrier of a save: Orbax's `barrier_sync_fn`.

        In a save all processes come to the same barriers. One that has failed skips some of them, so all see different
        keys at the next one.

        Raises:
            OtherProcessError: if a process has failed in this save.
        """
        if not self._failed:
            self._barriers += 1
            keys = self._meet(f"save-{self._saves}-{self._barriers}", key, timeout_ms / 1000)
            self._failed = len(set(keys)) > 1
        if self._failed:
            raise OtherProcessError(_OTHER)

    def _exchange(self, text: str) -> list[str]:
        self._asked += 1
        return self._meet(f"ask-{self._asked}", text, self._timeout_s)

    def _meet(self, place: str, text: str, timeout_s: float) -> list[str]:
        """Leave a text at a place, and wait for those of all processes, in their order."""
        count = jax.process_count()
        if count == 1:
            return [text]
        board = _compat.coordinator()
        deadline_s, pause_s = time.monotonic() + timeout_s, _PAUSES_S[0]
        mine = f"{self._name}/{place}/{jax.process_index()}"
        board.key_value_set(mine, text)
        while len(found := board.key_value_dir_get(f"{self._name}/{place}/")) < count:
            if time.monotonic() > deadline_s:
                raise CheckpointError(
                    f"{count - len(found)} of {count} processes did not come to {place} within {timeout_s:.0f} s"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSES_S[1])
        if self._left is not None:  # whoever is here has read what was left at the place before
            board.key_value_delete(self._left)
        self._left = mine
        return [text for _, text in sorted((int(name.rsplit("/", 1)[1]), text) for name, text in found)]
