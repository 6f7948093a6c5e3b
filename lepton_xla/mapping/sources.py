"""Files of rows to read: .npz, .jsonl and .parquet, cut into parts without reading them whole."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pathlib
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from lepton_xla.environment.extras import Needs
from lepton_xla.errors import InputError

_LONGEST_LINE = 256 << 20


class Part(msgspec.Struct, frozen=True, array_like=True):
    """Some rows of a file.

    Attributes:
        start: its first row, counted from 0.
        count: how many.
        place: where it is: the byte of a line, or a row group; unused where rows have a fixed size.
    """

    start: int
    count: int
    place: int = 0


class Source(Protocol):
    """A file of rows. Reading parts in their order reads the file once."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of what each row has."""
        ...

    def parts(self, rows: int) -> list[Part]:
        """Cut the file into parts of so many rows."""
        ...

    def read(self, part: Part, columns: Sequence[str]) -> dict[str, Any]:
        """The values of some columns: arrays, or lists of what JSON holds, one entry a row."""
        ...

    def where(self, row: int) -> str:
        """What people call a row of this file."""
        ...


def kind_of(path: str | os.PathLike[str]) -> str:
    """The format of a file, by its name.

    Raises:
        InputError: for any other than .npz, .jsonl and .parquet.

    >>> kind_of("rows.jsonl")
    'jsonl'
    """
    kind = pathlib.PurePath(path).suffix.removeprefix(".")
    if kind not in ("npz", "jsonl", "parquet"):
        raise InputError(f"{os.fspath(path)}: expected a file of rows named .npz, .jsonl or .parquet")
    return kind


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a file of rows.

    Raises:
        InputError: if it is missing or no such file.
        LeptonError: if a package is missing that reads it.
    """
    kinds = {"npz": NpzSource, "jsonl": JsonlSource, "parquet": ParquetSource}
    name = os.fspath(path)
    try:
        return kinds[kind_of(path)](name)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def even_parts(rows: int, size: int, start: int = 0, place: int = 0) -> list[Part]:
    """Cut rows into parts of one size, the last one shorter.

    >>> even_parts(5, 2)
    [Part(start=0, count=2, place=0), Part(start=2, count=2, place=0), Part(start=4, count=1, place=0)]
    """
    return [Part(start + first, min(size, rows - first), place) for first in range(0, rows, size)]


class JsonlSource:
    """One JSON object a line."""

    def __init__(self, path: str) -> None:
        self._path = path
        with open(path, "rb") as file:
            first = file.readline(_LONGEST_LINE)
        self.columns = list(self._object(first, 0)) if first else []

    def where(self, row: int) -> str:
        return f"line {row + 1}"

    def parts(self, rows: int) -> list[Part]:
        found: list[Part] = []
        row = first = place = at = 0
        with open(self._path, "rb") as file:
            while line := file.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise InputError(f"{self._path}: {self.where(row)} is longer than {_LONGEST_LINE >> 20} MiB")
                row, at = row + 1, at + len(line)
                if row - first == rows:
                    found.append(Part(first, rows, place))
                    first, place = row, at
        return [*found, Part(first, row - first, place)] if row > first else found

    def read(self, part: Part, columns: Sequence[str]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {name: [] for name in columns}
        with open(self._path, "rb") as file:
            file.seek(part.place)
            for row in range(part.start, part.start + part.count):
                entry = self._object(file.readline(), row)
                for name, values in found.items():
                    if name not in entry:
                        has = ", ".join(map(repr, entry))[:200] or "nothing"
                        raise InputError(f"{self._path}, {self.where(row)}: no column {name!r}; it has {has}")
                    values.append(entry[name])
        return found

    def _object(self, line: bytes, row: int) -> dict[str, Any]:
        try:
            return msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{self._path}, {self.where(row)}: not a JSON object: {error}") from error


@dataclasses.dataclass
class _Member:
    """An array in an .npz, read from its beginning to its end."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    data: int  # bytes before its numbers: in the file where it is not compressed, else in the stream
    compressed: bool
    stream: Any = None


class NpzSource:
    """Arrays whose first dimension is the rows. Compressed or not, an array is never read whole."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open(path, "rb")  # noqa: SIM115 (as long as this source)
        weakref.finalize(self, self._file.close)
        self._zip = zipfile.ZipFile(self._file)
        names = [name for name in self._zip.namelist() if name.endswith(".npy")]
        self._members = {name.removesuffix(".npy"): self._member(name) for name in names}
        self.columns = list(self._members)

    def where(self, row: int) -> str:
        return f"row {row} (counted from 0)"

    def parts(self, rows: int) -> list[Part]:
        lengths = {name: member.shape[0] for name, member in self._members.items() if member.shape}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{self._path}: its arrays have these numbers of rows: {lengths}; expected equal numbers")
        return even_parts(next(iter(lengths.values()), 0), rows)

    def read(self, part: Part, columns: Sequence[str]) -> dict[str, Any]:
        return {name: self._rows(name, part) for name in columns}

    def _member(self, name: str) -> _Member:
        with self._zip.open(name) as stream:
            try:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, in_columns, dtype = read(stream)
            except (ValueError, EOFError, zlib.error) as error:
                raise InputError(f"{self._path}: {name} is not an array: {error}") from error
            if dtype.hasobject or (in_columns and len(shape) > 1):
                what = "holds Python objects" if dtype.hasobject else "is stored column by column"
                raise InputError(f"{self._path}: array {name!r} {what}; store np.ascontiguousarray of plain numbers")
            info = self._zip.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED:
                return _Member(shape, dtype, stream.tell(), compressed=True)
            local = os.pread(self._file.fileno(), 30, info.header_offset)  # its last fields: lengths of what follows
            start = info.header_offset + 30 + sum(int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
            return _Member(shape, dtype, start + stream.tell(), compressed=False)

    def _rows(self, name: str, part: Part) -> np.ndarray:
        member = self._members[name]
        if not member.shape:
            raise InputError(f"{self._path}: array {name!r} has no rows: it is a single number")
        row_bytes = member.dtype.itemsize * int(np.prod(member.shape[1:], dtype=np.int64))
        place, size = member.data + part.start * row_bytes, part.count * row_bytes
        try:
            data = self._inflated(name, member, place, size) if member.compressed else self._stored(place, size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise InputError(f"{self._path}: array {name!r} is damaged: {error}") from error
        if len(data) < part.count * row_bytes:
            raise InputError(f"{self._path}: array {name!r} is cut short")
        return np.frombuffer(data, member.dtype).reshape(part.count, *member.shape[1:])

    def _stored(self, place: int, size: int) -> bytes:
        pieces: list[bytes] = []
        while size > 0 and (piece := os.pread(self._file.fileno(), min(size, 1 << 30), place)):
            pieces.append(piece)
            place, size = place + len(piece), size - len(piece)
        return b"".join(pieces)

    def _inflated(self, name: str, member: _Member, place: int, size: int) -> bytes:
        """Reads on, or from the beginning to go back. Not `seek`: in Python 3.12.1 it may end up elsewhere."""
        if member.stream is None or member.stream.tell() > place:
            member.stream = self._zip.open(f"{name}.npy")
        while (ahead := place - member.stream.tell()) > 0:
            if not member.stream.read(min(ahead, 1 << 20)):
                raise EOFError("it ends too early")
        return member.stream.read(size)


class ParquetSource:
    """Columns of numbers, or of lists of numbers. A part is inside one row group."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._arrow = arrow()
        try:
            self._file = self._arrow.parquet.ParquetFile(path)
        except self._arrow.ArrowException as error:
            raise InputError(f"{path}: not a Parquet file: {error}") from error
        self.columns = list(self._file.schema_arrow.names)
        self._batches: Iterator[Any] = iter(())
        self._rest: list[Any] = []  # what was read and not given yet
        self._at: tuple[int, int, tuple[str, ...]] = (-1, 0, ())  # row group, next row in it, columns

    def where(self, row: int) -> str:
        return f"row {row} (counted from 0)"

    def parts(self, rows: int) -> list[Part]:
        found: list[Part] = []
        start = 0
        for group in range(self._file.num_row_groups):
            count = self._file.metadata.row_group(group).num_rows
            found += even_parts(count, rows, start, group)
            start += count
        return found

    def read(self, part: Part, columns: Sequence[str]) -> dict[str, Any]:
        first = part.start - sum(self._file.metadata.row_group(each).num_rows for each in range(part.place))
        wanted = (part.place, first, tuple(columns))
        try:
            table = self._table(wanted, part.count)
        except self._arrow.ArrowException as error:
            raise InputError(f"{self._path}: row group {part.place} cannot be read: {error}") from error
        self._at = (part.place, first + part.count, tuple(columns))
        return {name: self._values(name, table.column(name).combine_chunks(), part.start) for name in columns}

    def _table(self, wanted: tuple[int, int, tuple[str, ...]], count: int) -> Any:
        """The next rows; the row group is read on from where it was, or anew."""
        group, first, columns = wanted
        skip = 0
        if self._at != wanted:
            self._batches = self._file.iter_batches(1024, row_groups=[group], columns=list(columns))
            self._rest, skip = [], first
        while sum(len(batch) for batch in self._rest) < skip + count:
            self._rest.append(next(self._batches))
            while skip >= len(self._rest[0]):
                skip -= len(self._rest.pop(0))
                if not self._rest:
                    break
        table = self._arrow.Table.from_batches(self._rest)
        self._rest = table.slice(skip + count).to_batches()
        return table.slice(skip, count)

    def _values(self, name: str, column: Any, start: int) -> np.ndarray:
        """A column as an array, lists as further dimensions."""
        types, shape = self._arrow.types, [len(column)]
        per_row = 1
        while True:
            if column.null_count:
                row = start + int(np.flatnonzero(column.is_null())[0]) // per_row
                raise InputError(f"{self._path}, {self.where(row)}, column {name!r}: it is null")
            kind = column.type
            if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
                break
            lengths = np.asarray(column.value_lengths())
            other = np.flatnonzero(lengths != lengths[:1])
            if len(other):
                row, got = start + int(other[0]) // per_row, lengths[other[0]]
                raise InputError(
                    f"{self._path}, {self.where(row)}, column {name!r}: a list of {got} values, where the rows before "
                    f"have {lengths[0]}; all must be of one length: pad them"
                )
            length = int(lengths[0]) if len(lengths) else 0
            shape.append(length)
            per_row *= max(1, length)
            column = column.flatten()
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
            raise InputError(f"{self._path}: column {name!r} holds {kind}, not numbers or lists of numbers")
        return column.to_numpy(zero_copy_only=False).reshape(shape)


def arrow() -> Any:
    """PyArrow with its Parquet part.

    Raises:
        MissingPackageError: if it is not installed.
    """
    with Needs("parquet", ".parquet"):
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
