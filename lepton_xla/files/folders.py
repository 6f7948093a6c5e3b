"""Folders that appear whole or not at all: locked while they are written, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import time
from collections.abc import Generator

# Whoever makes a temporary folder locks it right after; younger folders may not be locked yet.
_ABANDONED_AFTER_S = 60.0


@contextlib.contextmanager
def held(folder: str | os.PathLike[str], *, wait: bool = False) -> Generator[bool, None, None]:
    """Lock a folder until the block or the process ends.

    Args:
        folder: what to lock.
        wait: whether to wait for whoever holds it.

    Yields:
        False if another holds it, it is gone, or the file system has no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        free = True
    except OSError:  # locked by another process, or a file system without locks
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


def remove_abandoned(parent: pathlib.Path, names: re.Pattern[str], *, at_once: bool = False) -> None:
    """Remove folders that killed processes left behind: their names match, nobody locks them, and they are not young.

    Args:
        parent: where they are.
        names: what their whole names match.
        at_once: remove young ones too, because none of them can be about to be locked.
    """
    for entry in os.scandir(parent):
        if not names.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
            continue
        try:
            is_done = at_once or time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_AFTER_S
        except FileNotFoundError:  # another process cleans up, too
            continue
        with held(entry.path) as is_free:
            if is_done and is_free:
                shutil.rmtree(entry.path, ignore_errors=True)


def flush_tree(root: str | os.PathLike[str]) -> None:
    """Flush the folders of a tree to the disk; its files were flushed when they were written."""
    for folder, _, _ in os.walk(root, topdown=False):
        flush(folder)


def flush(path: str | os.PathLike[str]) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
