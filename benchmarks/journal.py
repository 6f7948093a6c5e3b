"""Keeps measured rows on disk, so that an interrupted benchmark can continue."""

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
    """Measured rows by name, one JSON line each, written as soon as a row is measured.

    A row is reused only on the same machine, with the same code and the same settings. Rows of other settings stay in
    the file.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], *, fresh: bool = False, folder: pathlib.Path = FOLDER):
        """Open the journal of a benchmark.

        Args:
            name: name of the benchmark and the file.
            settings: what results depend on besides machine and code.
            fresh: whether to drop rows with these settings.
            folder: folder of the file.
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
        """Return a kept row, or call `measure` and keep its result, which must be JSON."""
        if name in self._rows:
            print(f"  {name}: kept from a run before", flush=True)
        else:
            text = json.dumps(measure())
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:  # the leading newline ends a partial line of an interrupted run
                file.write(f'\n{{"key": {json.dumps(self._key)}, "row": {json.dumps(name)}, "found": {text}}}\n')
            self._rows[name] = json.loads(text)
        return self._rows[name]


class NoJournal(Journal):
    """A journal that keeps nothing, for smoke tests."""

    def __init__(self) -> None:
        self._rows = {}

    def row(self, name: str, measure: Callable[[], Any]) -> Any:
        del name
        return json.loads(json.dumps(measure()))


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--fresh`."""
    parser.add_argument(
        "--fresh", action="store_true", help="measure every row again, including those kept from an interrupted run"
    )


def opened(name: str, options: argparse.Namespace, *settings: str) -> Journal:
    """Open a benchmark's journal for its options.

    Args:
        name: name of the benchmark.
        options: parsed options with `fresh` and `quick`; `--quick` keeps nothing.
        settings: names of the options that results depend on.
    """
    if options.quick:
        return NoJournal()
    return Journal(name, {each: getattr(options, each) for each in settings}, fresh=options.fresh)


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read the rows of a journal, without partial lines."""
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _changes() -> str:
    """A digest of the uncommitted changes in the working tree; empty if there are none."""
    git = ["git", "diff", "HEAD", "--", "lepton_xla", "benchmarks", "examples"]
    diff = subprocess.run(git, cwd=harness.ROOT, capture_output=True, check=False).stdout
    return hashlib.sha256(diff).hexdigest()[:12] if diff else ""
