"""Shared by the commands: options, tables, JSON, progress. Cheap to import; rich is imported when it draws."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lepton_xla.cli.tables import Table, printable
from lepton_xla.cli.tables import show as show
from lepton_xla.environment.extras import Needs
from lepton_xla.errors import ArtifactError, CompileError, LeptonError, first_line
from lepton_xla.tables import short as short
from lepton_xla.tables import size as size

if TYPE_CHECKING:
    from rich.progress import TaskID

    from lepton_xla.compiler import Manifest

NO_RECIPE = "none"
_NOTICEABLE_S = 1.0
# Numbers that somebody types; floats, integers of 64 bits and clocks end somewhere.
_DECIMAL = r"[0-9]{1,18}(?:\.[0-9]{1,18})?"
_MOST = (1 << 63) - 1
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_LONGEST_S = 366 * 86400.0

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
recipe_option = click.option(
    "--recipe",
    default=NO_RECIPE,
    metavar="NAME|FILE.toml",
    help="Name of a preset (see `leptonx recipes`) or a TOML file. By default the float model is left unchanged.",
)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, such as rescale=awq, shrink.flops=0.7 or quantize.0.weights=int4 (in the first "
    "[[quantize]] block). VALUE is TOML or a bare word; an empty VALUE restores the default. Repeatable.",
)
exclude_option = click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave sites unchanged whose whole name matches this regular expression, such as '.*/head'. Repeatable.",
)
buckets_option = click.option(
    "--buckets",
    "buckets",
    multiple=True,
    metavar="DIM=N,N,...",
    help="Compile for these sizes of a symbolic dimension, such as batch=1,8,32. Overrides the ModelSpec for that "
    "dimension. Repeatable.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there.")
_output_option = click.option("-o", "--output", metavar="PATH", help="The artifact to write; by default none is.")


def artifact_options[**P, R](command: Callable[P, R]) -> Callable[P, R]:
    """The options of a command that trains, and can write what it trained: --buckets, -o, --overwrite."""

    @functools.wraps(command)
    def checked(*values: P.args, **options: P.kwargs) -> R:
        check_goes_with("output", "overwrite", "buckets")
        return command(*values, **options)

    return buckets_option(_output_option(overwrite_option(checked)))


golden_option = click.option(
    "--golden",
    metavar="FILE.npz",
    help="Rows whose answers are known: arrays by the names of inputs and outputs, and perhaps `label`, the right "
    "class of each row. The artifact carries them, and a server asks for them before it uses it. Without outputs, the "
    "answers of this model are kept.",
)
mesh_option = click.option(
    "--mesh",
    metavar="AXIS=N,...",
    help="Axes of a grid of devices, such as data=-1,model=2. One size may be -1: all devices that the others leave.",
)
rules_option = click.option(
    "--rules",
    metavar="FILE.toml",
    help="Partition rules: which axes of the mesh cut which weights. By default those that the model's own axis names "
    "give; every other weight is whole on each device.",
)


def check_goes_with(owner: str, *names: str) -> None:
    """Refuse options of the running command that say nothing without another one.

    Args:
        owner: the parameter of the option that they are about.
        names: their parameters.

    Raises:
        UsageError: if one of them was given and `owner` was not.
    """
    context = click.get_current_context()
    options = {option.name: option for option in context.command.params}

    def flag(name: str) -> str:
        option = options[name]
        return (option.secondary_opts if context.params[name] is False else option.opts)[-1]

    if context.get_parameter_source(owner) is not ParameterSource.DEFAULT:
        return
    if alone := [flag(name) for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]:
        raise click.UsageError(
            f"{' and '.join(alone)} without {options[owner].opts[-1]} changes nothing; give that too"
        )


def parse_buckets(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Parse `--buckets` into ascending sizes by dimension.

    Raises:
        CompileError: if a text has another form or a dimension occurs twice.

    >>> parse_buckets(["batch=32,1,8", "seq=128"])
    {'batch': (1, 8, 32), 'seq': (128,)}
    """
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, sizes = text.partition("=")
        parts = [part.strip() for part in sizes.split(",")]
        if not equals or not name or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            raise CompileError(f"--buckets {text!r}: expected a dimension and its sizes, such as batch=1,8,32")
        if name in found:
            raise CompileError(f"--buckets names {name!r} twice; give all its sizes at once: {name}=1,8,32")
        found[name] = tuple(sorted({int(part) for part in parts}))
    return found


def parse_bytes(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Read an option's number of bytes: kB, MB, GB and TB are powers of 1000, KiB, MiB, GiB and TiB of 1024.

    Raises:
        BadParameter: if it is none, or less than one byte.

    >>> [parse_bytes(None, None, text) for text in ("800000", "2MB", "1.5 MiB", "4G", None)]
    [800000, 2000000, 1572864, 4000000000, None]
    """
    if value is None:
        return None
    found = re.fullmatch(rf"({_DECIMAL})\s*(?:([KMGT])(i?)B?|B)?", value.strip(), re.IGNORECASE)
    unit = "KMGT".index(found[2].upper()) + 1 if found is not None and found[2] else 0
    count = int(float(found[1]) * (1024 if found[3] else 1000) ** unit) if found is not None else 0
    if not 1 <= count <= _MOST:
        raise click.BadParameter(f"{value!r}: expected bytes, such as 800000, 2MB or 4GiB", context, option)
    return count


def parse_operations(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Read an option's number of operations: k, M, G and T are powers of 1000.

    Raises:
        BadParameter: if it is none, or less than one.

    >>> [parse_operations(None, None, text) for text in ("800000", "2.5M", None)]
    [800000, 2500000, None]
    """
    if value is None:
        return None
    found = re.fullmatch(rf"({_DECIMAL})\s*([kMGT]?)", value.strip(), re.IGNORECASE)
    count = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found is not None else 0
    if not 1 <= count <= _MOST:
        raise click.BadParameter(f"{value!r}: expected multiply-adds, such as 800000 or 2.5M", context, option)
    return count


def plain(value: Any) -> Any:
    """Convert a value for JSON: NumPy scalars to numbers, tuples to lists, NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item())
    return value


def print_json(document: Any, *, line: bool = False) -> None:
    """Print one JSON document on stdout; in one line where several follow one another."""
    click.echo(json.dumps(plain(document), indent=None if line else 2, allow_nan=False))


def seconds(value_s: float) -> str:
    """Format a time for people.

    >>> [seconds(value) for value in (0.0000031, 0.0451, 12.3)]
    ['3.1 us', '45.1 ms', '12.3 s']
    """
    if value_s < 1e-3:
        return f"{value_s * 1e6:.1f} us"
    return f"{value_s * 1e3:.1f} ms" if value_s < 1 else f"{value_s:.1f} s"


def ratio(after: float, before: float) -> str:
    """Format `after / before`; empty if the ratio is meaningless."""
    return f"{after / before:.2f}" if before else ""


def metric_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """One row per metric: name, before, after, difference."""

    def row(name: str, first: float | None, second: float | None) -> tuple[str, str, str, str]:
        figures = ["" if value is None else f"{value:.6g}" for value in (first, second)]
        return name, figures[0], figures[1], "" if first is None or second is None else f"{second - first:+.4g}"

    return [row(name, before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])]


def weights_on_disk(manifest: Manifest) -> int:
    """Bytes of the files of an artifact that hold its weights."""
    return sum(entry.size for name, entry in manifest.files.items() if name.startswith("weights/"))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, total: Sequence[Any] = ()) -> Table:
    """A table; columns whose heading starts with `>` are right-aligned numbers."""
    return Table(title, columns, rows, total)


def check_folder(path: str | None) -> None:
    """Check that an output file can be where it is asked for, before minutes of measurement.

    Raises:
        LeptonError: if its folder does not exist, or it is a folder itself.
    """
    if path is not None and not pathlib.Path(path).absolute().parent.is_dir():
        raise LeptonError(f"{path}: the folder {pathlib.Path(path).absolute().parent} does not exist")
    if path is not None and pathlib.Path(path).is_dir():
        raise LeptonError(f"{path} is a folder; give a file")


def duration(text: str, option: str) -> float:
    """A duration that an option was given, in seconds: at most a year.

    >>> duration("10s", "--every"), duration("2m", "--every"), duration("0.5", "--every")
    (10.0, 120.0, 0.5)
    """
    found = re.fullmatch(rf"({_DECIMAL})\s*(ms|[smhd]?)", text.strip())
    seconds = float(found[1]) * _UNITS_S[found[2]] if found is not None else math.inf
    if seconds > _LONGEST_S:
        raise click.UsageError(f"{option} {text!r}: expected a duration such as 10s, 2m or 1h")
    return seconds


def check_free(output: str, *, overwrite: bool) -> None:
    """Refuse to write over an artifact that is there, unless told to.

    Raises:
        ArtifactError: if it exists.
    """
    if not overwrite and "://" not in output and os.path.lexists(output):
        raise ArtifactError(f"{output} exists; give another --output, or --overwrite")


def write(path: str, writer: Callable[[], Any]) -> None:
    """Write a file.

    Raises:
        LeptonError: if the file cannot be written; gives the reason.
    """
    try:
        writer()
    except (OSError, ValueError) as error:  # ValueError: a file type that matplotlib does not support
        raise LeptonError(f"{path} cannot be written: {first_line(error)}") from error


def figure() -> Any:
    """Create an empty matplotlib figure. Called before anything is measured, so that a missing matplotlib fails early.

    Raises:
        MissingPackageError: if matplotlib is not installed.
    """
    with Needs("plot", "--plot"):
        return importlib.import_module("matplotlib.figure").Figure()


type Step = Callable[..., None]
"""Reports the step that begins now: `step("compile batch=8", done, total)`; the counts are optional."""


@contextlib.contextmanager
def progress() -> Generator[Step, None, None]:
    """Show progress on stderr: a live line on a terminal, elsewhere a line for each step that takes a second."""
    with _live() if sys.stderr.isatty() else _plain() as step:
        yield step


@contextlib.contextmanager
def _live() -> Generator[Step, None, None]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task: TaskID = drawn.add_task("start", total=None)

        def step(stage: str, done: int = 0, total: int = 0) -> None:
            drawn.update(task, description=_line(stage, done, total))

        yield step


@contextlib.contextmanager
def _plain() -> Generator[Step, None, None]:
    current = ["start"]
    finished = threading.Event()

    def tell() -> None:
        told = ""
        while not finished.wait(_NOTICEABLE_S):
            line = current[0]
            if line != told:
                click.echo(f"... {line}", err=True)
                told = line

    def step(stage: str, done: int = 0, total: int = 0) -> None:
        current[0] = _line(stage, done, total)

    thread = threading.Thread(target=tell, name="lepton-progress", daemon=True)
    thread.start()
    try:
        yield step
    finally:
        finished.set()
        thread.join()


def _line(stage: str, done: int, total: int) -> str:
    count = f" ({min(done + 1, total)} of {total})" if total else ""
    return printable(stage) + count
