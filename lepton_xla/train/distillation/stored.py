"""The format of stored answers: a folder of shards, each with the digests of its files.

    manifest.json           what the answers are of, and each shard with the digests of its files; written last
    progress.json           the same without shards, while answers are being written
    00000/ids.npy           int64 [rows]: ids of samples
    00000/indices.npy       unsigned [rows, ..., k]: classes of the k largest logits, largest first
    00000/logits.npy        float [rows, ..., k]: those logits
    00000/rest.npy          float32 [rows, ..., temperatures]: logsumexp of all other logits, each divided by T
    00000/shard.json        the digests of these files

A shard is renamed into place when it is complete, so a process that is killed leaves whole shards only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from lepton_xla.errors import TrainingError, first_line

MANIFEST, PROGRESS, SHARD = "manifest.json", "progress.json", "shard.json"
ARRAYS = ("ids", "indices", "logits", "rest")
_FORMAT = 1
TEMPORARY = ".tmp"


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What answers are of.

    Attributes:
        digest: digest of the teacher's weights.
        output: the teacher's output.
        classes: number of classes (the vocabulary).
        positions: the axes between rows and classes, such as `[128]` for tokens; empty for a classifier.
        top_k: number of logits kept.
        dtype: of the logits.
        temperatures: those at which the rest is known.
        format: version of this format.
    """

    digest: str
    output: str
    classes: int
    positions: tuple[int, ...]
    top_k: int
    dtype: str
    temperatures: tuple[float, ...]
    format: int = _FORMAT


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size and digest of a file."""

    size: int
    sha256: str


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A folder of arrays, and its files by name."""

    name: str
    rows: int
    files: dict[str, File]


class Contents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of `manifest.json`."""

    header: Header
    shards: tuple[Shard, ...]


def write_shard(folder: pathlib.Path, number: int, arrays: Mapping[str, np.ndarray]) -> Shard:
    """Write a shard and rename it into place."""
    name = f"{number:05}"
    temporary = folder / f"{name}{TEMPORARY}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    files: dict[str, File] = {}
    for part in ARRAYS:
        path = temporary / f"{part}.npy"
        with path.open("wb") as file:
            np.lib.format.write_array(file, arrays[part], allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        files[path.name] = _file(path)
    shard = Shard(name=name, rows=len(arrays["ids"]), files=files)
    write_json(temporary / SHARD, shard)
    temporary.rename(folder / name)
    return shard


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a struct, atomically."""
    temporary = path.with_name(f"{path.name}{TEMPORARY}")
    with temporary.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(value), indent=1))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json[T](path: pathlib.Path, kind: type[T]) -> T:
    """Read a struct.

    Raises:
        TrainingError: if the file is missing, damaged, or of a later version.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror or error}") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise TrainingError(f"{path} is damaged, or of another version: {first_line(error)}") from error


def check_format(header: Header, path: pathlib.Path) -> None:
    """Check that this version can read it.

    Raises:
        TrainingError: if not.
    """
    if header.format != _FORMAT:
        raise TrainingError(f"{path} has format {header.format}; this version reads {_FORMAT}")


def finished_shards(folder: pathlib.Path) -> list[Shard]:
    """The whole shards of a folder, in order; what else a killed process left is removed."""
    found: list[Shard] = []
    for path in sorted(folder.iterdir()):
        if path.name.endswith(TEMPORARY):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif path.is_dir() and path.name.isdigit():
            try:
                shard = read_json(path / SHARD, Shard)
                check_files(folder, shard)
            except TrainingError:
                shutil.rmtree(path)
            else:
                found.append(shard)
    return found


def check_files(folder: pathlib.Path, shard: Shard) -> None:
    """Check a shard's files against their digests.

    Raises:
        TrainingError: if a file is missing or changed; names it.
    """
    if set(shard.files) != {f"{part}.npy" for part in ARRAYS}:
        raise TrainingError(f"{folder / shard.name} has other files than {', '.join(ARRAYS)}")
    for name, expected in shard.files.items():
        path = folder / shard.name / name
        try:
            found = _file(path)
        except OSError as error:
            raise TrainingError(f"{path}: {error.strerror or error}") from error
        if found != expected:
            raise TrainingError(f"{path} is damaged: its digest is not that of its shard; run `teach` again")


def read_arrays(folder: pathlib.Path, shard: Shard) -> dict[str, np.ndarray]:
    """The arrays of a shard, mapped from their files.

    Raises:
        TrainingError: if one cannot be read.
    """
    try:
        return {
            part: np.load(
                folder / shard.name / f"{part}.npy", mmap_mode="r" if shard.rows else None, allow_pickle=False
            )
            for part in ARRAYS
        }
    except (OSError, ValueError, EOFError) as error:
        raise TrainingError(f"{folder / shard.name} cannot be read: {first_line(error)}") from error


def _file(path: pathlib.Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return File(size=file.tell(), sha256=digest.hexdigest())
