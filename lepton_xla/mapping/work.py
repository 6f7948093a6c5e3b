"""The work that is to be done for one output, and what of it is done: a folder beside the output.

    .NAME.parts/plan.json     what is mapped onto what, and the parts
    .NAME.parts/00000000.npz  the results of a part; the file is there whole or not at all

A run that is interrupted leaves the folder, and the next one goes on there.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from lepton_xla.errors import InputError, LeptonError
from lepton_xla.files.copies import write_whole
from lepton_xla.files.folders import held
from lepton_xla.mapping.columns import check_rows, columns_of
from lepton_xla.mapping.sources import Part, arrow, kind_of, open_source
from lepton_xla.program import TensorSpec

_PART_BYTES = 16 << 20
_MOST_ROWS = 1 << 16


class Plan(msgspec.Struct, frozen=True):
    """What is mapped onto what.

    Attributes:
        artifact: absolute path of the artifact.
        digest: of its manifest.
        source: absolute path of the file of rows.
        bytes, modified_ns: its size and time, so that it is noticed if it changes.
        columns: column by input.
        kind: format of the output.
        part_rows: rows of a part.
        parts: in the order of the rows.
    """

    artifact: str
    digest: str
    source: str
    bytes: int
    modified_ns: int
    columns: dict[str, str]
    kind: str
    part_rows: int
    parts: list[Part]

    @property
    def rows(self) -> int:
        """Of the whole file."""
        return sum(part.count for part in self.parts)


def make_plan(
    artifact: str,
    digest: str,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    largest: int,
    source: str,
    output: str,
    renamed: Mapping[str, str],
    part_rows: int | None,
    taken: Sequence[str] | None = None,
) -> Plan:
    """Look at all files, and cut the rows into parts.

    Args:
        artifact: its folder.
        digest: of its manifest.
        inputs, outputs: its signature.
        largest: rows of its largest bucket.
        source: the file of rows.
        output: the file to be made.
        renamed: column by input, where they have different names.
        part_rows: rows of a part; by default as many as take about 16 MiB, in whole buckets.
        taken: what the model takes, if it makes some of its inputs of something else; by default its inputs.

    Raises:
        InputError: if the file's rows are not what the model takes, as far as its head tells.
        LeptonError: if the output cannot be written there, or a package is missing.
    """
    kind = kind_of(output)
    if kind == "parquet":
        arrow()
    there = pathlib.Path(output).absolute()
    if not there.parent.is_dir():
        raise LeptonError(f"{output}: the folder {there.parent} does not exist")
    if there.is_dir():
        raise LeptonError(f"{output}: is a folder")
    if there.exists() and os.path.exists(source) and os.path.samefile(source, output):
        raise LeptonError(f"{output}: is the file of rows itself")
    check_rows(inputs, outputs)
    rows = open_source(source)
    columns = columns_of(list(inputs) if taken is None else taken, rows.columns, renamed, source)
    size = part_rows or _rows_of_a_part(
        {**inputs, **{f"output {name}": spec for name, spec in outputs.items()}}, largest
    )
    parts = rows.parts(size)
    if not parts:
        raise InputError(f"{source} has no rows")
    state = os.stat(source)
    return Plan(
        os.path.abspath(artifact),
        digest,
        os.path.abspath(source),
        state.st_size,
        state.st_mtime_ns,
        columns,
        kind,
        size,
        parts,
    )


def _rows_of_a_part(specs: Mapping[str, TensorSpec], largest: int) -> int:
    # Other symbolic dimensions are counted as a hundred: this is about memory, not a promise.
    sizes = [[size if isinstance(size, int) else 100 for size in spec.shape[1:]] for spec in specs.values()]
    items = [np.dtype(spec.dtype).itemsize for spec in specs.values()]
    row_bytes = sum(int(np.prod(size, dtype=np.int64)) * item for size, item in zip(sizes, items, strict=True))
    rows = min(_MOST_ROWS, _PART_BYTES // max(1, row_bytes))
    return max(largest, rows // largest * largest)


class Work:
    """The folder of one output's work.

    Attributes:
        plan: what is to be done.
        folder: where the results of parts are.
    """

    def __init__(self, folder: pathlib.Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Work:
        """The work of a folder, as a worker sees it."""
        where = pathlib.Path(folder)
        return Work(where, msgspec.json.decode((where / "plan.json").read_bytes(), type=Plan))

    def file(self, number: int) -> pathlib.Path:
        """Where the results of a part are."""
        return self.folder / f"{number:08}.{'jsonl' if self.plan.kind == 'jsonl' else 'npz'}"

    def missing(self) -> list[int]:
        """The parts without results."""
        there = {entry.name for entry in os.scandir(self.folder)}
        return [number for number in range(len(self.plan.parts)) if self.file(number).name not in there]

    def remove(self) -> None:
        """Remove the folder, when its results have been joined."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def begun(output: str, plan: Plan, *, restart: bool = False) -> Generator[Work, None, None]:
    """The work for an output, begun or gone on with, and locked.

    Args:
        output: the file to be made.
        plan: what is to be done.
        restart: whether to throw away what an earlier run left.

    Raises:
        LeptonError: if another run works on it, or an earlier one did something else.
    """
    there = pathlib.Path(output).absolute()
    folder = there.with_name(f".{there.name}.parts")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise LeptonError(f"{folder}: cannot be made: {error.strerror}") from error
    with held(folder) as is_free:
        if not is_free:
            raise LeptonError(f"{output}: another run works on it")
        try:
            _settle(folder, plan, output, restart)
        except OSError as error:
            raise LeptonError(f"{folder}: cannot be read or written: {error.strerror or error}") from error
        yield Work(folder, plan)


def _settle(folder: pathlib.Path, plan: Plan, output: str, restart: bool) -> None:
    """Make the folder hold the plan and results of this plan only."""
    file = folder / "plan.json"
    try:
        before: Any = msgspec.json.decode(file.read_bytes(), type=Plan)
    except FileNotFoundError:
        before = plan if not any(folder.iterdir()) else None
    except msgspec.DecodeError:
        before = None
    if before != plan and not restart:
        raise LeptonError(
            f"{output}: {folder} holds results of another run (another artifact, file, or --part-rows); --restart "
            "removes them"
        )
    for entry in folder.iterdir():
        if restart or entry.name.endswith((".tmp", ".part")):
            entry.unlink()
    write_whole(file, msgspec.json.encode(plan))
