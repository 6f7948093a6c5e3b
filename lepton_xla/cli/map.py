"""`leptonx map`: runs a file of rows through an artifact."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Generator

import click

from lepton_xla.cli import _common
from lepton_xla.errors import InputError


@click.command()
@click.argument("artifact")
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT")
@click.option(
    "--processes",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Worker processes; they share the cores.",
)
@click.option(
    "--ray", "on_ray", is_flag=True, help="Run them as actors of a Ray cluster (RAY_ADDRESS, or a local one)."
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="INPUT=COLUMN",
    help="Read an input from a column of another name. Repeatable.",
)
@click.option(
    "--part-rows",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rows that a worker holds at a time. By default about 16 MiB of inputs and outputs, in whole buckets.",
)
@click.option("--restart", is_flag=True, help="Throw away what an interrupted run left, instead of going on there.")
@_common.json_option
def map(
    artifact: str,
    *,
    source: str,
    output: str,
    processes: int,
    on_ray: bool,
    columns: tuple[str, ...],
    part_rows: int | None,
    restart: bool,
    as_json: bool,
) -> None:
    """Run each row of the file IN through the artifact, and write the results, in the same order, to the file OUT.

    Files are .npz (arrays by name, rows first), .jsonl (an object a line) or .parquet (needs `lepton-xla[parquet]`).
    Columns have the names of the model's inputs; others are ignored. They are converted to the model's dtype if it
    holds their values. Neither file is ever in memory as a whole.

    If a worker dies, its rows are run again. If the command is interrupted, run it again: finished parts are kept in a
    hidden folder beside OUT. OUT appears when it is complete, with the same bytes whatever the number of processes.

    \b
      leptonx map digits.lepton images.parquet answers.parquet --processes 4
      leptonx map encoder.lepton texts.jsonl embeddings.npz --column ids=tokens
      RAY_ADDRESS=auto leptonx map digits.lepton /shared/in.npz /shared/out.npz --ray --processes 64
    """
    renamed = _renamed(columns)
    began = time.monotonic()
    with _progress() as tell:
        tell("load JAX", 0, 0)
        from lepton_xla.compiler.artifact import read_manifest
        from lepton_xla.compiler.storage import Store
        from lepton_xla.mapping.cluster import run_on_ray
        from lepton_xla.mapping.pool import run_here
        from lepton_xla.mapping.sinks import join
        from lepton_xla.mapping.work import begun, make_plan
        from lepton_xla.rows import row_symbol

        manifest = read_manifest(Store(artifact))
        inputs, outputs = manifest.signature()
        largest = max(manifest.buckets.get(row_symbol(inputs) or "", (1,)))
        tell(f"look at {source}", 0, 0)
        plan = make_plan(
            artifact, manifest.sha256, inputs, outputs, largest, source, output, renamed, part_rows,
            taken=manifest.conversion and manifest.conversion.taken(inputs),
        )  # fmt: skip
        with begun(output, plan, restart=restart) as work:
            missing = work.missing()
            rows = [plan.rows - sum(plan.parts[part].count for part in missing)]

            def did(part: int) -> None:
                rows[0] += plan.parts[part].count
                tell("rows", rows[0], plan.rows)

            tell("rows", rows[0], plan.rows)
            run = run_on_ray if on_ray else run_here
            again = run(work, missing, processes, did) if missing else 0
            files = [work.file(part) for part in range(len(plan.parts))]
            join(files, plan.kind, pathlib.Path(output).absolute(), lambda done: tell("join", done, len(files)))
            work.remove()
    seconds = time.monotonic() - began
    ran = sum(plan.parts[part].count for part in missing)
    if as_json:
        _common.print_json(
            {
                "output": output,
                "rows": plan.rows,
                "rows_kept": plan.rows - ran,
                "parts": len(plan.parts),
                "part_rows": plan.part_rows,
                "processes": processes,
                "tried_again": again,
                "seconds": seconds,
            }
        )
    else:
        kept = f", {plan.rows - ran} of them by an earlier run" if ran < plan.rows else ""
        tried = f"; {again} parts were tried again" if again else ""
        click.echo(f"{output}: {plan.rows} rows{kept}, in {_common.seconds(seconds)}{tried}")


def _renamed(texts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, column = text.partition("=")
        if not equals or not name or not column or name in found:
            raise InputError(f"--column {text!r}: expected INPUT=COLUMN, each input once")
        found[name] = column
    return found


@contextlib.contextmanager
def _progress() -> Generator[Callable[[str, int, int], None], None, None]:
    """A bar on a terminal; elsewhere a line for each tenth of the rows."""
    if not sys.stderr.isatty():
        tenth = [-1]

        def say(what: str, done: int, total: int) -> None:
            if total and 10 * done // total > tenth[0]:
                tenth[0] = 10 * done // total if done < total else -1
                click.echo(f"... {what}: {done} of {total}", err=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task("start", total=None)
        yield lambda what, done, total: drawn.update(
            task, description=_common.printable(what), completed=done, total=total or None
        )
