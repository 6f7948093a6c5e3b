"""Benchmarks in sections, each of which is measured, shown and put on the page by itself."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import harness
import models
from rich.console import Console

type Results = dict[str, Any]
"""By section: `found`, its figures, and `run`, what they were measured on."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a benchmark.

    Attributes:
        measure: gives all its figures so far, once or again and again.
        tables: Markdown of them, to which more figures only add.
        introduction: what stands before them on the page.
    """

    measure: Callable[[argparse.Namespace], Iterator[Any]]
    tables: Callable[[Any], list[str]]
    introduction: str


def add_options(parser: argparse.ArgumentParser, sections: Mapping[str, Section]) -> None:
    """`--sections` and `--json`."""
    harness.add_names(parser, "--sections", sections)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file, whenever there are more")


def run(
    sections: Mapping[str, Section],
    options: argparse.Namespace,
    machine: Callable[[str], dict[str, str]],
    write: Callable[[Results], object],
    console: Console,
) -> None:
    """Measures and shows the sections that were asked for. One whose data is missing is skipped.

    Args:
        sections: by name.
        options: of the command line.
        machine: what a section runs on.
        write: told of all figures so far, whenever there are more.
        console: where tables are shown.
    """
    results: Results = {}
    for name in options.sections:
        console.print(f"{name} ...")
        load, shown = f"{os.getloadavg()[0]:.1f}", list[str]()
        try:
            for found in sections[name].measure(options):
                results[name] = {"found": found, "run": machine(name) | {"load": load, "command": harness.command()}}
                tables = sections[name].tables(found)
                # One that has more rows now is shown again.
                console.print("\n\n".join(table for table in tables if table not in shown), soft_wrap=True)
                shown = tables
                harness.write_json(options.json, results)
                write(results)
        except models.MissingError as error:
            console.print(f"{name}: skipped: {error}")
    console.print(f"repeat with: {harness.command()}")


def page(
    head: Sequence[str],
    sections: Mapping[str, Section],
    results: Mapping[str, Any],
    more: Callable[[str, Any], list[str]] = lambda name, result: [],
) -> str:
    """A page of all figures there are.

    Args:
        head: what it begins with.
        sections: by name.
        results: of any of them.
        more: what follows the tables of a section.
    """
    parts = list(head)
    for name, section in sections.items():
        if name in results:
            result = results[name]
            parts += [section.introduction, *section.tables(result["found"]), *more(name, result)]
            parts.append(harness.provenance(result["run"]))
    return "\n\n".join(parts) + "\n"
