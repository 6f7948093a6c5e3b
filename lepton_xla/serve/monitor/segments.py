"""Files of samples of one model: written at their ends, begun anew when they are long or old, removed when too many."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from time import time

from lepton_xla.samples import SUFFIX

# Files of so many processes, one of each under way, are within the bound. A longer record than one file is not kept.
_PARTS = 64


class Segments:
    """The folder of a model's samples, as one of several processes writes to it.

    What is written has reached the operating system: it stays if the process is killed. The file under way is locked,
    so another process knows that it must not remove it.

    Args:
        folder: made if it is missing, for this user alone.
        max_bytes: of all files in the folder, those of other processes included.
        max_age_s: after which files are removed.
        clock: seconds since the epoch.

    Attributes:
        most: bytes of the longest record that is kept.
    """

    def __init__(self, folder: Path, max_bytes: int, max_age_s: float, clock: Callable[[], float] = time) -> None:
        self.most = max_bytes // _PARTS
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._file: int | None = None
        self._name = ""
        self._begun_s = 0.0
        self._bytes = 0

    def write(self, data: bytes) -> None:
        """Appends whole records. Those that do not fit the disk are not there afterwards.

        Raises:
            OSError: if they cannot be written.
        """
        if self._file is not None and (self._bytes + len(data) > self.most or self._is_old(self._begun_s, 1 / _PARTS)):
            self.close()
        if self._file is None:
            self.remove_old(begins=True)
            self._begin()
        assert self._file is not None
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError:
            # A reader passes over what is left of the last record, but need not.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._bytes)
            raise
        self._bytes += written

    def _begin(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{int(self._clock() * 1e9):020d}-{os.getpid()}{SUFFIX}"
        file = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: the newest files are removed last anyway
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file, self._name, self._begun_s, self._bytes = file, name, self._clock(), 0

    def remove_old(self, *, begins: bool = False) -> None:
        """Removes files that are too old, and the oldest of too many.

        Args:
            begins: whether there has to be room for another file.
        """
        if self._file is not None and self._is_old(self._begun_s, 1 / _PARTS):
            self.close()
        found: list[tuple[str, int, float]] = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._folder):
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.endswith(SUFFIX):
                        told = entry.stat(follow_symlinks=False)
                        found.append((entry.name, told.st_size, told.st_mtime))
        # The last file of each process may grow.
        last = {name.partition("-")[2]: size for name, size, _ in sorted(found)}
        total = sum(size for _, size, _ in found) + sum(max(0, self.most - size) for size in last.values())
        total += self.most * begins
        for name, size, changed_s in sorted(found):
            if name != self._name and (total > self._max_bytes or self._is_old(changed_s)) and self._remove(name):
                total -= size

    def _is_old(self, since_s: float, share: float = 1.0) -> bool:
        return self._clock() - since_s > self._max_age_s * share

    def _remove(self, name: str) -> bool:
        """Removes a file, unless another process writes to it."""
        path = self._folder / name
        with contextlib.suppress(FileNotFoundError):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except OSError:
                return False
            finally:
                os.close(file)
        return True

    def close(self) -> None:
        """Ends the file under way; the next record begins another."""
        if self._file is not None:
            os.close(self._file)
            self._file, self._name = None, ""
