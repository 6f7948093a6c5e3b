"""Reads and writes arrays. Never unpickles."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

import ml_dtypes  # noqa: F401 # pyright: ignore[reportUnusedImport] (with it NumPy knows bfloat16, fp8, int4 by name)
import numpy as np

from lepton_xla.errors import InputError
from lepton_xla.mapping.sinks import storable

# Files that are one value of an input which the model converts.
_ONE_VALUE = (".jpg", ".jpeg", ".png", ".txt")


class Declared(Protocol):
    """A model's declaration of an input, such as a `TensorSpec`; `str` of it is for people."""

    @property
    def dtype(self) -> str: ...


def read(source: str) -> dict[str, Any]:
    """Read the inputs that one `--input` names: arrays from .npy and .npz, nested lists from JSON, one row from
    an image or a text.

    Raises:
        InputError: if a file is missing or of another kind; names the file.
    """
    if source == "-":
        return _parse(sys.stdin.read().removeprefix("\ufeff"), "stdin")
    name, equals, file = source.partition("=")
    suffix = pathlib.PurePath(source).suffix
    if suffix == ".npz" and not equals:
        return _load(source)
    if suffix == ".json" and not equals:
        return _parse(_text(source), source)
    if not equals or not name or not file:
        raise InputError(f"--input {source!r}: expected NAME=FILE.npy, FILE.npz, FILE.json or - for JSON from stdin")
    if suffix.lower() in _ONE_VALUE:
        value = np.empty(1, object)
        try:
            value[0] = pathlib.Path(file).read_bytes()
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read: {error}") from error
        return {name: value}
    found = _load(file)
    if list(found) != [""]:
        raise InputError(f"--input {source!r}: {file} is an .npz, whose arrays have names already; remove {name}=")
    return {name: found[""]}


def read_all(sources: Sequence[str]) -> dict[str, Any]:
    """Read the inputs that all `--input` of a command name.

    Raises:
        InputError: if a file is missing or of another kind, or an input is given twice.
    """
    found: dict[str, Any] = {}
    for source in sources:
        for name, value in read(source).items():
            if name in found:
                raise InputError(f"input {name!r} is given twice")
            found[name] = value
    return found


def read_golden(file: str) -> dict[str, Any]:
    """Read golden rows: the arrays of an .npz by name.

    Raises:
        InputError: if it is no such file.
    """
    found = _load(file)
    if "" in found:
        raise InputError(f"{file}: is one array; golden rows are an .npz of arrays named after inputs and outputs")
    return found


def read_weights(file: str) -> dict[str, Any]:
    """Read float weights: the arrays of an .npz by path.

    Raises:
        InputError: if it is no such file.
    """
    return _load(file)


def write_weights(file: str, arrays: Mapping[str, Any]) -> None:
    """Write arrays by path to an .npz.

    Raises:
        InputError: if it cannot be written, or NumPy does not know a dtype.
    """
    for path, array in arrays.items():
        if array.dtype.kind == "V":
            raise InputError(f"{file}: weight {path!r} is {array.dtype}, which an .npz cannot hold")
    try:
        with open(file, "wb") as opened:
            np.savez(opened, **arrays)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error


def _load(file: str) -> dict[str, Any]:
    """Read the arrays of a file by name; the array of an .npy has the name ''."""
    try:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"": found}
        with found:
            return dict(found)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or 'not an .npy or .npz file'}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, SyntaxError, MemoryError) as error:
        raise InputError(f"{file}: not an .npy or .npz file of plain numbers, or cut short: {error}") from error


def _text(file: str) -> str:
    try:
        return pathlib.Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not text, or an impossible path
        raise InputError(f"{file}: cannot be read: {error}") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        found = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: expected a JSON object such as {{'image': [[0, 1]]}}, got a {type(found).__name__}")
    return found


def as_declared(inputs: Mapping[str, Any], specs: Mapping[str, Declared]) -> dict[str, Any]:
    """Convert nested lists to arrays of the model's dtype, and raw bytes to the narrow float that they hold."""
    return {name: _as_declared(name, value, specs[name]) if name in specs else value for name, value in inputs.items()}


def _as_declared(name: str, value: Any, spec: Declared) -> Any:
    dtype = np.dtype(spec.dtype)
    if isinstance(value, np.ndarray):
        # .npy cannot name bfloat16 and fp8: NumPy writes and reads them as raw bytes of the same width.
        raw = value.dtype.kind == "V" and value.dtype.names is None and value.dtype.itemsize == dtype.itemsize
        return value.view(dtype) if raw and dtype.kind == "V" else value
    if not _is_float(dtype):
        return value
    try:
        wide = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"input {name!r} is not a nested list of numbers, expected {spec}: {error}") from error
    with np.errstate(all="ignore"):
        narrow = wide.astype(dtype)
    lost = ~np.isfinite(narrow.astype(np.float64))
    if lost.any():
        raise InputError(
            f"input {name!r} holds {wide[lost].flat[0]:g}, which {dtype} cannot represent; the model takes {spec}"
        )
    return narrow


def _is_float(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype is a float; covers ml_dtypes, whose dtypes are not subtypes of NumPy's."""
    return dtype.kind == "f" or (dtype.kind == "V" and dtype.name.startswith(("bfloat", "float")))


def write_npz(file: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays to an .npz file, atomically.

    Raises:
        InputError: if the file cannot be written.
    """
    target = pathlib.Path(file)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        # Not numpy.savez: it takes the names as keyword arguments, and some names are its own parameters.
        with zipfile.ZipFile(temporary, "x") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, storable(array), allow_pickle=False)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()
        if isinstance(error, OSError | ValueError):  # ValueError: an impossible path
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{file}: cannot be written: {reason}") from error
        raise
