"""Which threads the kernel runs first."""

import ctypes
import os
import platform
import threading

import pytest

from lepton_xla.serve import priorities

_GET = {"x86_64": 315, "aarch64": 275}


def attributes():
    """Niceness and slice in nanoseconds of the calling thread, as the kernel has them."""
    found = priorities._Attributes()
    size = ctypes.sizeof(found)
    assert ctypes.CDLL(None).syscall(_GET[platform.machine()], 0, ctypes.byref(found), size, 0) == 0
    return found.nice, found.runtime_ns


def on_a_thread(*functions):
    """What the last of functions gives when a new thread calls them."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(function() for function in functions))
    thread.start()
    thread.join()
    return found[-1]


@pytest.mark.skipif(platform.machine() not in _GET, reason="the number of the system call is not known here")
def test_who_serves_has_a_short_slice_and_who_loads_the_usual_one_and_less_of_a_core():
    nice, usual = on_a_thread(attributes)
    if not usual:
        pytest.skip("this kernel has no slices")
    assert on_a_thread(priorities.come_first, attributes) == (nice, 100_000)
    # A thread that loads is started by the one that serves.
    then = on_a_thread(priorities.come_first, lambda: on_a_thread(priorities.step_back, attributes))
    assert then == (min(nice + 10, 19), usual)


@pytest.mark.parametrize("machine", ["x86_64", "riscv64"])
def test_where_the_kernel_refuses_only_the_niceness_changes(monkeypatch, machine):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setitem(priorities._CALLS, "x86_64", 1 << 20)  # there is no such call
    nice = os.getpriority(os.PRIO_PROCESS, 0)

    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert on_a_thread(priorities.come_first, niceness) == nice
    assert on_a_thread(priorities.step_back, niceness) == min(nice + 10, 19)
