"""Files of results: each part as a file of its own, and all parts joined in order.

The bytes depend on the results and the size of the parts alone, not on who made them or when.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import IO, Any

import msgspec
import numpy as np

from lepton_xla.errors import InputError, LeptonError
from lepton_xla.mapping.sources import arrow

_COPY_BYTES = 1 << 20


def write_part(path: pathlib.Path, kind: str, outputs: Mapping[str, np.ndarray], where: Callable[[int], str]) -> None:
    """Write the results of a part so that the file is there whole or not at all.

    Raises:
        InputError: if JSON cannot hold a result.
        LeptonError: if the file cannot be written.
    """
    with _appearing(path) as file:
        if kind == "jsonl":
            _write_lines(file, outputs, where)
            return
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in outputs.items():
                with _member(archive, name) as entry:
                    np.lib.format.write_array(entry, np.ascontiguousarray(storable(array)), allow_pickle=False)


def join(parts: Sequence[pathlib.Path], kind: str, output: pathlib.Path, tell: Callable[[int], None]) -> None:
    """Join the files of all parts, in order, into the output, which appears whole.

    Raises:
        InputError: if parts have results of different shapes, which only .jsonl holds.
        LeptonError: if the file cannot be written.
    """
    with _appearing(output) as file:
        if kind == "jsonl":
            for number, part in enumerate(parts):
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, file, _COPY_BYTES)
                tell(number + 1)
        elif kind == "npz":
            _join_npz(parts, file, tell)
        else:
            _join_parquet(parts, file, tell)


def _write_lines(file: IO[bytes], outputs: Mapping[str, np.ndarray], where: Callable[[int], str]) -> None:
    columns: dict[str, list[Any]] = {}
    for name, array in outputs.items():
        stored = storable(array)
        if stored.dtype.kind == "f" and not np.isfinite(stored).all():
            row = int(np.flatnonzero(~np.isfinite(stored.reshape(len(stored), -1)).all(1))[0])
            raise InputError(
                f"{where(row)}: output {name!r} is not finite, and JSON has no NaN; write .npz or .parquet"
            )
        columns[name] = stored.tolist()
    encoder = msgspec.json.Encoder()
    for row in range(len(next(iter(columns.values())))):
        file.write(encoder.encode({name: values[row] for name, values in columns.items()}) + b"\n")


def _join_npz(parts: Sequence[pathlib.Path], file: IO[bytes], tell: Callable[[int], None]) -> None:
    names, shapes, dtypes = _headers(parts)
    with zipfile.ZipFile(file, "w") as archive:
        for at, name in enumerate(names):
            with _member(archive, name) as entry:
                header = {"descr": np.lib.format.dtype_to_descr(dtypes[name]), "fortran_order": False}
                np.lib.format.write_array_header_1_0(entry, {**header, "shape": shapes[name]})
                for number, part in enumerate(parts):
                    with zipfile.ZipFile(part) as source, source.open(f"{name}.npy") as stream:
                        _read_header(stream)
                        shutil.copyfileobj(stream, entry, _COPY_BYTES)
                    if at == len(names) - 1:
                        tell(number + 1)


def _join_parquet(parts: Sequence[pathlib.Path], file: IO[bytes], tell: Callable[[int], None]) -> None:
    library = arrow()
    _headers(parts)
    writer = None
    for number, part in enumerate(parts):
        with np.load(part, allow_pickle=False) as arrays:
            table = library.table({name: _column(library, arrays[name]) for name in arrays.files})
        if writer is None:
            writer = library.parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
        tell(number + 1)
    assert writer is not None
    writer.close()


def _column(library: Any, array: np.ndarray) -> Any:
    """An array as a column: further dimensions are lists of a fixed length."""
    column = library.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        column = library.FixedSizeListArray.from_arrays(column, int(size))
    return column


def _headers(parts: Sequence[pathlib.Path]) -> tuple[list[str], dict[str, tuple[int, ...]], dict[str, np.dtype[Any]]]:
    """Names, joined shapes and dtypes of the results."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, np.dtype[Any]] = {}
    for part in parts:
        with zipfile.ZipFile(part) as source:
            for member in source.namelist():
                with source.open(member) as stream:
                    shape, dtype = _read_header(stream)
                name = member.removesuffix(".npy")
                before = shapes.get(name, (0, *shape[1:]))
                if before[1:] != shape[1:]:
                    raise InputError(
                        f"output {name!r} has rows of shape {list(before[1:])} and of {list(shape[1:])}; write them to "
                        "a .jsonl, or pad the input's rows to one length"
                    )
                shapes[name], dtypes[name] = (before[0] + shape[0], *shape[1:]), dtype
    return list(shapes), shapes, dtypes


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, dtype


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """An entry that does not say when it was made."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def storable(array: np.ndarray) -> np.ndarray:
    """Widens bfloat16, fp8 and int4, which these formats lack, to a dtype that holds them exactly."""
    if array.dtype.isbuiltin == 1:
        return array
    return array.astype(np.int8 if "int" in array.dtype.name else np.float32)


@contextlib.contextmanager
def _appearing(path: pathlib.Path) -> Generator[IO[bytes], None, None]:
    """A file that gets its name when it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise LeptonError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
