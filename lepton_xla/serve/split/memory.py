"""A piece of memory that two processes share: anonymous, without a name anybody could open, and of a fixed size."""

from __future__ import annotations

import fcntl
import mmap
import os

from lepton_xla.errors import ServeError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(size: int) -> int:
    """The descriptor of new memory, sealed to its size. Pages are only taken once something is written to them."""
    fd = os.memfd_create("lepton-tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def attach(fd: int) -> memoryview:
    """The bytes of memory that another process may have made; they stay as long as a view of them does.

    Raises:
        ServeError: where it could shrink under its reader, which would end the process.
    """
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        size = os.fstat(fd).st_size
        if not sealed or not size:
            raise ServeError("shared memory is empty, or not sealed to its size")
        return memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED))
    except OSError as error:
        raise ServeError(f"shared memory cannot be used: {error.strerror}") from error


def give_back(view: memoryview, size: int) -> None:
    """Gives the pages of the first `size` bytes back to the system, in all processes; they read as zeros then."""
    mapped = view.obj
    assert isinstance(mapped, mmap.mmap)
    mapped.madvise(mmap.MADV_REMOVE, 0, size)
