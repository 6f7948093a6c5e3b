"""Checksums of the files of a checkpoint: which file is missing, cut off or changed."""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Mapping

NAME = "checksums.json"

# Bytes that are read at once.
_PIECE = 1 << 22
# Orbax adds this file after the checksums are written, when it commits.
_COMMITTED = "commit_success.txt"


def write_checksums(folder: pathlib.Path) -> None:
    """Write the size and the CRC-32 of every file below a folder into `checksums.json` there.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "a").write_bytes(b"abc")
    >>> write_checksums(folder)
    >>> find_damage(folder) is None
    True
    """
    sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in _files(folder)}
    (folder / NAME).write_bytes(_text(sums))


def find_damage(folder: pathlib.Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Read all files of a folder and name the first that is missing or not as it was written; None if all are whole.

    `share` is (index, count) of several readers, each of which reads a part of the files.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "a").write_bytes(b"abc")
    >>> write_checksums(folder)
    >>> _ = (folder / "a").write_bytes(b"abd")
    >>> find_damage(folder)
    'a was changed'
    """
    try:
        text = (folder / NAME).read_bytes()
        expected = {name: (int(size), int(crc)) for name, (size, crc) in json.loads(text)["files"].items()}
        whole = text == _text(expected)
    except OSError as error:
        return f"{NAME} cannot be read: {error.strerror}"
    except (ValueError, TypeError, AttributeError, LookupError):
        whole, expected = False, {}
    if not whole:
        return f"{NAME} was changed"
    for name, (size, crc) in sorted(expected.items())[share[0] :: share[1]]:
        try:
            found = _checksum(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found[0] != size:
            return f"{name} has {found[0]} bytes of {size}"
        if found[1] != crc:
            return f"{name} was changed"
    return None


def _text(sums: Mapping[str, tuple[int, int]]) -> bytes:
    """The contents of the file, which has a checksum of its own."""
    own = zlib.crc32(json.dumps(sums, sort_keys=True).encode())
    return json.dumps({"crc32": own, "files": sums}, indent=1, sort_keys=True).encode()


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (NAME, _COMMITTED))


def _checksum(path: pathlib.Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return size, crc
