"""A journal: what a run of `tune` has found, so that a killed run goes on, and other budgets start from it."""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from lepton_xla.errors import TuningError
from lepton_xla.tuning.pacing import Pace

# What a difference in a key of the identity is called, where the key does not say it.
_NAMES = {"format": "version of lepton_xla", "machine": "machine or kernels"}


class Journal:
    """Results by name, one JSON line each, written as soon as they are there; in memory only without a path.

    >>> journal = Journal("found.jsonl", {"model": "a"})
    >>> journal.once("trial 1", lambda: {"bytes": 3}), Journal("found.jsonl", {"model": "a"}).get("trial 1")
    ({'bytes': 3}, {'bytes': 3})
    >>> Journal("found.jsonl", {"model": "b"})
    Traceback (most recent call last):
    lepton_xla.errors.TuningError: found.jsonl: is the journal of another run, which differs in model; ...
    >>> Journal("found.jsonl", {"model": "b"}, begin_anew=True).get("trial 1")  # the other is found.jsonl.old now
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, identity: Mapping[str, Any], *, begin_anew: bool = False
    ) -> None:
        """Open a journal, or begin one.

        Args:
            path: the file; None keeps everything in memory.
            identity: what its results hold for, JSON; a journal of anything else is refused.
            begin_anew: whether a journal of anything else is put aside instead, as `PATH.old` or, if there is one,
                `PATH.old2` and so on, and a new one begun.

        Raises:
            TuningError: if it belongs to another model, other data or another seed, or cannot be read or written.
        """
        self.path = self._path = pathlib.Path(path) if path is not None else None
        self._found: dict[str, Any] = {}
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        head = self.identity
        if self._path is None:
            return
        try:
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise TuningError(f"{self._path}: the journal cannot be read: {error}") from error
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) == 1 and not text.endswith("\n") and _is_torn(lines[0]):  # killed while it began the journal
            self._truncate()
            lines = []
        if not lines:
            self._append({"identity": head})
            return
        known = _parsed(lines[0])
        if not isinstance(known, dict) or not isinstance(known.get("identity"), dict):
            raise TuningError(f"{self._path}: is no journal of leptonx tune; give another --journal")
        old: dict[str, Any] = known["identity"]
        if old != head and begin_anew:
            self._put_aside()
            self._append({"identity": head})
            return
        if old != head:
            keys = [key for key in {**old, **head} if old.get(key) != head.get(key)]
            named = ", ".join(_NAMES.get(key, key) for key in keys)
            raise TuningError(
                f"{self._path}: is the journal of another run, which differs in {named}; give another journal, or "
                "--new-journal to put this one aside"
            )
        for line in lines[1:]:
            entry = _parsed(line)
            # The last line of a killed run may be torn, and any that a disk has damaged is measured again.
            if isinstance(entry, dict) and entry.keys() >= {"name", "found"} and _is_whole(entry):
                self._found[entry["name"]] = entry["found"]
        if not text.endswith("\n"):
            self._append(None)

    def get(self, name: str) -> Any:
        """Give a result; None if there is none."""
        return self._found.get(name)

    def within(self, name: str, pace: Pace, measure: Callable[[], Any]) -> Any:
        """Give a result as `once` does; if time was short for it, and there is more now, it is measured again.

        What there was no time for is noted in `pace.skipped`, by the runs that take the result from here too.
        """
        known = self.get(name)

        def measured() -> dict[str, Any]:
            before = len(pace.skipped)
            found = measure()
            left_out = pace.skipped[before:]
            del pace.skipped[before:]
            return {"found": found, "left out": left_out, "minutes": pace.minutes}

        again = known is not None and known["left out"] and known["minutes"] < pace.minutes
        entry = self.once(name, measured, again=again)
        pace.skipped += entry["left out"]
        return entry["found"]

    def once(self, name: str, measure: Callable[[], Any], *, again: bool = False) -> Any:
        """Give a result that is there, or call `measure` and keep what it returns, which must be JSON.

        Args:
            name: of the result.
            measure: makes it.
            again: whether to measure and replace one that is there.
        """
        if again or name not in self._found:
            found = json.loads(json.dumps(measure()))
            self._append({"name": name, "found": found, "crc32": _crc32(name, found)})
            self._found[name] = found
        return self._found[name]

    def _put_aside(self) -> None:
        assert self._path is not None
        try:
            number, aside = 1, pathlib.Path(f"{self._path}.old")
            while aside.exists():  # what was put aside before stays too
                number += 1
                aside = pathlib.Path(f"{self._path}.old{number}")
            self._path.replace(aside)
        except OSError as error:
            raise TuningError(f"{self._path}: the journal cannot be put aside: {error.strerror}") from error

    def _truncate(self) -> None:
        assert self._path is not None
        try:
            os.truncate(self._path, 0)
        except OSError as error:
            raise TuningError(f"{self._path}: the journal cannot be written: {error.strerror}") from error

    def _append(self, entry: Any) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write((json.dumps(entry) if entry is not None else "") + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TuningError(f"{self._path}: the journal cannot be written: {error.strerror}") from error


def _crc32(name: str, found: Any) -> int:
    return zlib.crc32(json.dumps([name, found]).encode())


def _is_whole(entry: Mapping[str, Any]) -> bool:
    """Whether a result is what was written; one without a checksum is taken as it is."""
    return "crc32" not in entry or entry["crc32"] == _crc32(entry["name"], entry["found"])


def _is_torn(line: str) -> bool:
    """Whether a line is the beginning of a journal's first one."""
    head = json.dumps({"identity": {}})[: len(line)].rstrip("}")
    return line.startswith(head) and _parsed(line) is None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
