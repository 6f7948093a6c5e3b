"""Which of the threads of a process the kernel runs first."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import threading

# Steps of priority, as `nice` counts them: beside one that serves, a thread that stepped back gets a tenth of a core.
_LATER = 10
# The shortest that the kernel takes, in nanoseconds.
_SHORT_NS = 100_000
# Number of the system call `sched_setattr`, which the C library does not have.
_CALLS = {"x86_64": 314, "aarch64": 274}


class _Attributes(ctypes.Structure):
    """The kernel's `struct sched_attr`."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    )


def come_first() -> None:
    """Has the calling thread, and those that it starts, run as soon as they have something to do.

    A thread that computes keeps a core for its slice, some 3 ms, whoever else wants it, unless that one's slice is
    shorter (Linux 6.12 and later, where nobody has set the policy). Nobody gets more of the core for it.
    """
    _schedule(os.getpriority(os.PRIO_PROCESS, 0), _SHORT_NS)


def step_back() -> None:
    """Has the calling thread, and those that it starts, leave the cores to threads that serve.

    By some only: what holds the interpreter while it waits for a core holds up all.
    """
    nice = min(os.getpriority(os.PRIO_PROCESS, 0) + _LATER, 19)
    if not _schedule(nice, 0):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def _schedule(nice: int, slice_ns: int) -> bool:
    """Sets priority and slice of the calling thread, 0 for the usual one; false where the kernel does not let it."""
    call = _CALLS.get(platform.machine())
    if sys.platform != "linux" or call is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    asked = _Attributes(ctypes.sizeof(_Attributes), os.SCHED_OTHER, 0, nice, 0, slice_ns, 0, 0)
    return ctypes.CDLL(None).syscall(call, 0, ctypes.byref(asked), 0) == 0
