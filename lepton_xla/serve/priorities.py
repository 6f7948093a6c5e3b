"""Which of the threads of a process the kernel runs first."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import threading

# Steps of priority, as `nice` counts them: beside one that serves, a thread gets a tenth of a core, or a seventieth.
_LATER, _LAST = 10, 19
# The shortest that the kernel takes, in nanoseconds.
_SHORT_NS = 100_000
# Number of the system call `sched_setattr`, which the C library does not have.
_CALLS = {"x86_64": 314, "aarch64": 274}


# How long a thread holds the interpreter beside others that ask for it, while one of them has stepped back.
_SWITCH_S = 2e-5


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
    _put_back(_LATER)


def come_last() -> None:
    """As `step_back`, for what nobody waits for.

    Whenever the kernel gives a core to another thread than the one that serves, it may keep it until the next tick,
    which comes every 4 ms in many kernels: 15 times a second after `step_back`, if both have always something to do,
    and twice a second after this.
    """
    _put_back(_LAST)


def _put_back(steps: int) -> None:
    nice = min(os.getpriority(os.PRIO_PROCESS, 0) + steps, 19)
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


class QuickTurns:
    """While there is work for a thread that stepped back, whoever asks for the interpreter gets it sooner.

    The kernel's priorities say nothing of the interpreter: as long as such a thread holds it, the event loop waits for
    it after every look at its sockets, and a batch before and after it runs. Call it on one thread only.
    """

    def __init__(self) -> None:
        self._count = 0
        self._usual_s = 0.0

    def begin(self) -> None:
        """Such work begins."""
        if not self._count:
            self._usual_s = sys.getswitchinterval()
            sys.setswitchinterval(min(self._usual_s, _SWITCH_S))
        self._count += 1

    def end(self) -> None:
        """Such work has ended."""
        self._count -= 1
        if not self._count and sys.getswitchinterval() <= _SWITCH_S:  # nobody has set another one meanwhile
            sys.setswitchinterval(self._usual_s)
