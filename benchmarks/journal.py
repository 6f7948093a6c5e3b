"""Rows that a benchmark has measured so far, kept on disk: a run that was stopped goes on where it was."""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import platform
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import harness

FOLDER = harness.ROOT / "build" / "benchmarks" / "rows"


class Journal:
    """Measured rows by name, one JSON line each, written as soon as a row is there.

    A row is taken up again only where it would be measured on the same machine, from the same code and with the same
    settings; rows of other settings stay in the file beside it.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], *, fresh: bool = False, folder: pathlib.Path = FOLDER):
        """Opens a benchmark's journal.

        Args:
            name: the benchmark's, which names the file.
            settings: what its figures depend on besides machine and code.
            fresh: start anew: rows kept under these settings are dropped.
            folder: where the file is.
        """
        run = harness.machine()
        where = {key: run[key] for key in ("machine", "versions", "commit")} | {"changes": _changes()}
        self._key = {**where, "node": platform.node(), "settings": json.loads(json.dumps(dict(settings)))}
        self._path = folder / f"{name}.jsonl"
        lines = _lines(self._path)
        if fresh and any(line["key"] == self._key for line in lines):
            lines = [line for line in lines if line["key"] != self._key]
            self._path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._rows: dict[str, Any] = {line["row"]: line["found"] for line in lines if line["key"] == self._key}

    def row(self, name: str, measure: Callable[[], Any]) -> Any:
        """A row as it was kept; else as `measure` gives it, which is kept. It must go into JSON."""
        if name in self._rows:
            print(f"  {name}: kept from a run before", flush=True)
        else:
            text = json.dumps(measure())
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:  # on a line of its own, even where a stopped run left half of one
                file.write(f'\n{{"key": {json.dumps(self._key)}, "row": {json.dumps(name)}, "found": {text}}}\n')
            self._rows[name] = json.loads(text)
        return self._rows[name]


class NoJournal(Journal):
    """Measures everything, and keeps nothing: for smoke tests."""

    def __init__(self) -> None:
        self._rows = {}

    def row(self, name: str, measure: Callable[[], Any]) -> Any:
        del name
        return json.loads(json.dumps(measure()))


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--fresh`."""
    parser.add_argument(
        "--fresh", action="store_true", help="measure every row anew, also those kept from a run that was stopped"
    )


def opened(name: str, options: argparse.Namespace, *settings: str) -> Journal:
    """A benchmark's journal under its options.

    Args:
        name: the benchmark's.
        options: of which `fresh` and `quick` are read; `--quick` keeps nothing.
        settings: names of the options that figures depend on.
    """
    if options.quick:
        return NoJournal()
    return Journal(name, {each: getattr(options, each) for each in settings}, fresh=options.fresh)


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """What a journal holds; a line that a stopped run wrote half of is left out."""
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _changes() -> str:
    """A digest of what differs from the commit in the working tree; empty where nothing does."""
    git = ["git", "diff", "HEAD", "--", "lepton_xla", "benchmarks", "examples"]
    diff = subprocess.run(git, cwd=harness.ROOT, capture_output=True, check=False).stdout
    return hashlib.sha256(diff).hexdigest()[:12] if diff else ""
