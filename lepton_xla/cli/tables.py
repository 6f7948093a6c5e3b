"""Prints tables and lines on stdout, fitted to the terminal."""

from __future__ import annotations

from lepton_xla.tables import Table as Table
from lepton_xla.tables import fold as fold
from lepton_xla.tables import printable as printable


def show(*parts: Table | str, ends: str = "") -> None:
    """Print tables and lines on stdout; on a terminal, tables are fitted to its width.

    Args:
        parts: what to print.
        ends: printed after each table.
    """
    from rich.console import Console
    from rich.text import Text

    class Lines(Console):
        def on_broken_pipe(self) -> None:
            raise

    console = Lines(highlight=False, markup=False)
    rule = "\N{BOX DRAWINGS LIGHT HORIZONTAL}" if console.encoding.startswith("utf") else "-"
    width = console.width if console.is_terminal else None
    for part in parts:
        if isinstance(part, str):
            console.print(printable(part), soft_wrap=True)
            continue
        if part.title:
            console.print(Text(printable(part.title), "bold"), soft_wrap=True)
        for line in (*part.lines(width, rule=rule), ends):
            console.print(Text(line), soft_wrap=True)
