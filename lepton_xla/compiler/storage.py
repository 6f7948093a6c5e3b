"""Files of an artifact, in a local folder or, through TensorStore's key-value layer, in an object store."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pathlib
import re
import secrets
import shutil
import stat
import weakref
from collections.abc import Callable, Generator, Mapping
from urllib.parse import unquote

import numpy as np
import tensorstore as ts

from lepton_xla.compiler.exchange import exchange
from lepton_xla.errors import ArtifactError
from lepton_xla.files.copies import replace_file
from lepton_xla.files.folders import flush, flush_tree, held, remove_abandoned
from lepton_xla.files.listing import MANIFEST, FileEntry
from lepton_xla.pieces import piece_bytes, rest, sha256

_LOG = logging.getLogger(__name__)
# One context for all stores, so that connections are shared and memory:// stores outlive a call.
_CONTEXT = ts.Context()
# Retries of a read whose artifact was replaced meanwhile.
_READ_AGAIN = 20
# Opens what only has to be known by its number, and waits for nothing.
_NOT_READ = getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK)


class Store:
    """Files under one folder or bucket prefix.

    Args:
        location: a local path, a `file://`, `gs://`, `s3://` or `memory://` address.

    Raises:
        ArtifactError: if the address cannot be opened, or the path is impossible.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fsdecode(location)
        path = local_path(self.location)
        try:
            self._root = None if path is None else os.path.realpath(path)
            self._identity = None if self._root is None else self._hold(self._root)
            if self._root is None:
                self._kv = ts.KvStore.open(self.location.rstrip("/") + "/", context=_CONTEXT).result()
        except Exception as error:  # each TensorStore driver has its own error types
            raise ArtifactError(f"{self.location}: cannot be opened: {error}") from error

    def _hold(self, folder: str) -> tuple[int, int] | None:
        """Identify the folder, to detect a replacement; None if it does not exist.

        It stays open with the store: the system gives the number of a deleted folder to the next that is made.
        """
        try:
            opened = os.open(folder, _NOT_READ)
        except OSError:
            return None
        weakref.finalize(self, os.close, opened)
        found = os.fstat(opened)
        return found.st_dev, found.st_ino

    def _look(self) -> tuple[int, int] | None:
        """Identify the folder that is there now; None if there is none, or in an object store."""
        path = local_path(self.location)
        try:
            found = None if path is None else os.stat(path)
        except OSError:
            return None
        return None if found is None else (found.st_dev, found.st_ino)

    @property
    def is_replaced(self) -> bool:
        """Whether the folder is no longer the one that was opened."""
        return self._look() != self._identity

    def read(self, name: str, *, limit: int) -> bytes:
        """Read a file of at most `limit` bytes.

        Raises:
            ArtifactError: if it is missing, larger, unreadable, or not a regular file inside the folder; names it.
        """
        if self._root is not None:
            with self._opened(name, limit) as opened:
                return opened.read(limit + 1)
        try:
            found = self._kv.read(name).result()
        except Exception as error:
            raise ArtifactError(f"{self.location}: {name} cannot be read: {error}") from error
        if found.state != "value":
            raise ArtifactError(f"{self.location}: {name} is missing")
        self._check_size(name, len(found.value), limit)
        return found.value

    def is_missing(self, name: str) -> bool:
        """Whether there is no file of that name.

        Raises:
            ArtifactError: if that cannot be found out.
        """
        if self._root is not None:
            return not os.path.lexists(os.path.join(self._root, name))
        try:
            return self._kv.read(name).result().state != "value"
        except Exception as error:
            raise ArtifactError(f"{self.location}: {name} cannot be read: {error}") from error

    def read_into(self, name: str, buffer: memoryview) -> int:
        """Read a file into memory that is there already, which takes half the time of new memory and a copy.

        Args:
            name: the file.
            buffer: bytes to overwrite; the file may have no more.

        Returns:
            The size of the file.

        Raises:
            ArtifactError: as `read`.
        """
        if self._root is None:
            data = self.read(name, limit=len(buffer))
            buffer[: len(data)] = data
            return len(data)
        with self._opened(name, len(buffer)) as opened:
            size = 0
            piece = piece_bytes(len(buffer))
            while count := opened.readinto(buffer[size : size + piece]):
                size += count
                rest()
            return size

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file, atomically.

        Raises:
            ArtifactError: if it cannot be written; names it.
        """
        try:
            if self._root is not None:
                file = pathlib.Path(self._root, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                replace_file(file, data)
            else:
                self._kv.write(name, data).result()
        except Exception as error:
            raise ArtifactError(f"{self.location}: {name} cannot be written: {_said(error)}") from error

    def names(self) -> list[str]:
        """Names of all files, sorted.

        Raises:
            ArtifactError: if they cannot be listed.
        """
        try:
            if self._root is not None:
                found = [os.path.join(folder, name) for folder, _, names in os.walk(self._root) for name in names]
                return sorted(os.path.relpath(name, self._root) for name in found)
            return sorted(os.fsdecode(key) for key in self._kv.list().result())
        except Exception as error:
            raise ArtifactError(f"{self.location}: cannot be listed: {error}") from error

    def delete_all(self) -> None:
        """Delete all files in an object store.

        Raises:
            ArtifactError: if they cannot be deleted.
        """
        try:
            self._kv.delete_range(ts.KvStore.KeyRange()).result()
        except Exception as error:
            raise ArtifactError(f"{self.location}: the existing files cannot be deleted: {error}") from error

    @contextlib.contextmanager
    def _opened(self, name: str, limit: int) -> Generator[io.BufferedReader, None, None]:
        """Open a local file directly: three times as fast as the key-value layer, and detects links."""
        assert self._root is not None
        file = os.path.join(self._root, name)
        try:
            with open(file, "rb") as opened:
                status = os.fstat(opened.fileno())
                inside = os.path.realpath(file).startswith(self._root + os.sep)
                if not inside or not stat.S_ISREG(status.st_mode):
                    raise ArtifactError(f"{self.location}: {name} is not a regular file inside the artifact")
                self._check_size(name, status.st_size, limit)
                yield opened
        except (FileNotFoundError, NotADirectoryError) as error:
            where = "" if os.path.isdir(self._root) else ": there is no such folder"
            raise ArtifactError(f"{self.location}: {name} is missing{where}") from error
        except OSError as error:
            raise ArtifactError(f"{self.location}: {name} cannot be read: {_said(error)}") from error

    def _check_size(self, name: str, size: int, limit: int) -> None:
        if size > limit:
            raise ArtifactError(f"{self.location}: {name} has {size} bytes, more than the limit of {limit}")


class VerifiedFiles:
    """Reads files of a store and checks them against their recorded size and digest; refuses files without a record.

    Args:
        store: the files.
        files: their records.
        opened: `opened(name, data)` decrypts a file whose digest is right; None where nothing is encrypted.
    """

    def __init__(
        self, store: Store, files: Mapping[str, FileEntry], opened: Callable[[str, bytes], bytes] | None = None
    ) -> None:
        self._store = store
        self._files = files
        self._opened = opened

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def read(self, name: str) -> bytes:
        """Read a file, verify it, and decrypt it if it is encrypted.

        Raises:
            ArtifactError: if it is missing, has no record, differs from its record, or does not decrypt; names it.
        """
        where = self._store.location
        entry = self._files.get(name)
        if entry is None:
            raise ArtifactError(f"{where}: {name} is not listed in the manifest, so it is not used")
        data = self._store.read(name, limit=entry.size)
        self._check(name, entry, data, len(data))
        return data if self._opened is None else self._opened(name, data)

    def read_into(self, name: str, array: np.ndarray) -> bool:
        """Read a file into an array of its size and verify it there.

        Args:
            name: the file.
            array: contiguous; what it holds is undefined if this fails.

        Returns:
            False, and nothing is read, if the file has another size or no record, or may be encrypted: use `read`.

        Raises:
            ArtifactError: if it is missing, or differs from its record; names it.
        """
        entry = self._files.get(name)
        if entry is None or entry.size != array.nbytes or self._opened is not None:
            return False
        buffer = memoryview(array.reshape(-1).view(np.uint8))
        self._check(name, entry, buffer, self._store.read_into(name, buffer))
        return True

    def _check(self, name: str, entry: FileEntry, data: bytes | memoryview, size: int) -> None:
        where = self._store.location
        if size != entry.size:
            raise ArtifactError(f"{where}: {name} is damaged: {size} bytes instead of {entry.size}")
        if sha256(data) != entry.sha256:
            raise ArtifactError(f"{where}: {name} is damaged: its SHA-256 differs from the manifest's")


def consistently[T](location: str | os.PathLike[str], read: Callable[[Store], T]) -> T:
    """Run `read` on an artifact, and again if a save replaced the artifact meanwhile, so that all data is of one save.

    Raises:
        ArtifactError: as raised by `read` on an artifact that was not replaced.
    """
    for _ in range(_READ_AGAIN):
        store = Store(location)
        try:
            return read(store)
        except ArtifactError:
            if not store.is_replaced:
                raise
    return read(Store(location))


def _said(error: BaseException) -> str:
    """The reason of an error without its path, which may be temporary."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def local_path(location: str | os.PathLike[str]) -> pathlib.Path | None:
    """The local path of a location; None in an object store.

    Raises:
        ArtifactError: if the path is impossible: it has a null byte, or text that cannot be encoded.

    >>> local_path("models/tiny.lepton"), local_path("gs://bucket/tiny.lepton")
    (PosixPath('models/tiny.lepton'), None)
    """
    text = os.fsdecode(location)
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://"))
    elif "://" in text:
        return None
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ArtifactError(f"{text!r}: is not a path: {error.reason}") from error
    if b"\0" in encoded:
        raise ArtifactError(f"{text!r}: is not a path: it contains a null byte")
    return pathlib.Path(text)


@contextlib.contextmanager
def atomic_store(location: str | os.PathLike[str], *, overwrite: bool) -> Generator[Store, None, None]:
    """A store for a new artifact, which appears at `location` when the block ends without an error.

    A local artifact is written to a hidden folder next to the target, flushed to the disk, and renamed, or atomically
    exchanged with the existing one; if the file system cannot exchange folders, a warning is logged. Leftovers of
    killed saves are removed first. An object store has no rename: files are written in place, and the artifact exists
    once its manifest, written last, does.

    Raises:
        ArtifactError: if the target exists and `overwrite` is not set, or it cannot be written.
    """
    target = local_path(location)
    if target is None:
        store = Store(location)
        if names := store.names():
            _check_replaceable(location, overwrite=overwrite, is_artifact=MANIFEST in names)
            store.delete_all()
        with _undone_by(lambda: store.delete_all()):
            yield store
        return
    if os.path.lexists(target):
        _check_replaceable(location, overwrite=overwrite, is_artifact=os.path.isfile(target / MANIFEST))
    try:
        target = target.absolute()
        temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        temporary.mkdir()
    except OSError as error:
        raise ArtifactError(f"{location}: cannot be created: {_said(error)}") from error
    with _undone_by(lambda: shutil.rmtree(temporary, ignore_errors=True)), held(temporary):
        yield Store(temporary)
        try:
            flush_tree(temporary)
            _put_in_place(temporary, target, overwrite=overwrite)
        except OSError as error:
            raise ArtifactError(f"{location}: cannot be put in place: {_said(error)}") from error


@contextlib.contextmanager
def _undone_by(undo: Callable[[], None]) -> Generator[None, None, None]:
    try:
        yield
    except BaseException:
        undo()
        raise


def _check_replaceable(location: str | os.PathLike[str], *, overwrite: bool, is_artifact: bool) -> None:
    if not overwrite:
        raise ArtifactError(f"{location} exists; give another path, or overwrite it")
    if not is_artifact:
        raise ArtifactError(f"{location} exists and is not an artifact (no {MANIFEST}), so it is not overwritten")


def _remove_abandoned(target: pathlib.Path) -> None:
    """Remove leftovers of saves to this target whose process was killed.

    An artifact that was moved aside is kept while the target is missing: it may be the only copy.
    """
    stem = rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}"
    remove_abandoned(target.parent, re.compile(rf"{stem}\.tmp"))
    if os.path.lexists(target):
        remove_abandoned(target.parent, re.compile(rf"{stem}\.old"), at_once=True)


def _put_in_place(temporary: pathlib.Path, target: pathlib.Path, *, overwrite: bool) -> None:
    """Rename the new artifact to the target; an old one is exchanged for it and then deleted.

    If the file system cannot exchange folders, the old artifact is moved aside first, and moved back if the rename
    fails.
    """
    if not (overwrite and os.path.lexists(target)):
        temporary.rename(target)
        flush(target.parent)
        return
    aside = temporary
    if not exchange(temporary, target):
        _LOG.warning("%s: this file system cannot exchange folders, so the artifact is missing for a moment", target)
        aside = temporary.with_suffix(".old")
        target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            aside.rename(target)
            raise
    flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True) if not aside.is_symlink() else aside.unlink()
