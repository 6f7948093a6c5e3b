"""A disk cache of measured times, so that other processes need not measure them again.

Each measurement is a file, written under a temporary name and renamed, so that concurrent processes see it whole or not
at all. Unreadable files are measured again and replaced. Disk failures are not errors.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pathlib
import tempfile
import time

import msgspec

from lepton_xla.environment.machine import cache_folder

_LOG = logging.getLogger(__name__)

# Maximum number of files; beyond it, the oldest half is removed.
MAX_FILES = 8192
# Longer files are not ours.
_MAX_BYTES = 2**16
# Age after which partly written files of killed processes are removed.
_LEFT_S = 3600.0


class Times(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The result of one measurement.

    Attributes:
        us: median microseconds of each function, in order.
        error: error of the results, as in `measurement.Timing`; None for NaN.
    """

    us: list[float]
    error: float | None = 0.0


class TimingCache:
    """Measurements by key, in a folder.

    Attributes:
        folder: folder of the files; None disables the cache.
    """

    def __init__(self, folder: pathlib.Path | None) -> None:
        self.folder = folder
        self._written = False

    @classmethod
    def default(cls) -> TimingCache:
        """The cache in the folder of `machine.cache_folder`; disabled where there is none."""
        folder = cache_folder()
        return cls(None if folder is None else folder / "times")

    def get(self, key: str, count: int) -> Times | None:
        """Read the times of `count` functions under a key; None if they are missing or unreadable."""
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                times = msgspec.json.decode(file.read(_MAX_BYTES), type=Times)
            if len(times.us) != count or not all(math.isfinite(each) and each > 0 for each in times.us):
                raise msgspec.ValidationError(f"not {count} times")
        except FileNotFoundError:
            return None
        except OSError as error:
            _LOG.info("%s: cannot be read (%s), so it is measured again", path, error.strerror)
            return None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            _LOG.warning("%s: is damaged (%s), so it is measured again and replaced", path, error)
            return None
        return times

    def put(self, key: str, times: Times) -> None:
        """Keep a measurement; if it cannot be written, disable writing."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._written:
                self._written = True
                _make_room(self.folder)
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as file:
                try:
                    file.write(msgspec.json.encode(times))
                    file.close()
                    os.replace(file.name, self._path(key))
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(file.name)
                    raise
        except OSError as error:
            _LOG.info("measured times are not kept: %s: %s", self.folder, error.strerror)
            self.folder = None

    def _path(self, key: str) -> pathlib.Path:
        assert self.folder is not None
        return self.folder / f"{key}.json"


def _make_room(folder: pathlib.Path) -> None:
    """Remove the oldest half of the files if there are too many, and partly written files."""
    with os.scandir(folder) as entries:
        found: list[tuple[float, str]] = []
        for entry in entries:
            with contextlib.suppress(OSError):  # another process may remove it meanwhile
                found.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
    kept = sorted(each for each in found if each[1].endswith(".json"))
    gone = kept[: len(kept) // 2] if len(kept) > MAX_FILES else []
    gone += [each for each in found if each[1].endswith(".tmp") and each[0] < time.time() - _LEFT_S]
    for _, path in gone:
        with contextlib.suppress(OSError):
            os.unlink(path)
