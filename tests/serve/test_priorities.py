"""Which threads the kernel runs first."""

import asyncio
import ctypes
import os
import platform
import sys
import threading

import pytest

from lepton_xla.errors import LeptonError
from lepton_xla.serve import priorities
from lepton_xla.serve.models.changes import Change, Source
from lepton_xla.serve.models.host import Host
from lepton_xla.serve.observe.server_metrics import ServerMetrics

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
    then = on_a_thread(priorities.come_first, lambda: on_a_thread(priorities.come_last, attributes))
    assert then == (19, usual)


@pytest.mark.parametrize("machine", ["x86_64", "riscv64"])
def test_where_the_kernel_refuses_only_the_niceness_changes(monkeypatch, machine):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setitem(priorities._CALLS, "x86_64", 1 << 20)  # there is no such call
    nice = os.getpriority(os.PRIO_PROCESS, 0)

    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert on_a_thread(priorities.come_first, niceness) == nice
    assert on_a_thread(priorities.step_back, niceness) == min(nice + 10, 19)


class Seen:
    """A loader, and the models that are loaded; notes how it is run."""

    def __init__(self):
        self.found, self.loaded, self.fails = [], {}, False

    def load(self, name, version, source, others):
        self.found.append((os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), sys.getswitchinterval()))
        if self.fails:
            raise LeptonError("no")

    def open(self, loaded):
        return loaded

    def names(self):
        return list(self.loaded)

    def versions(self, name):
        return self.loaded.get(name, [])

    def find(self, name, version):
        return name, version


def test_versions_of_what_serves_are_loaded_last_and_hand_the_interpreter_over_soon():
    nice, usual = os.getpriority(os.PRIO_PROCESS, 0), sys.getswitchinterval()
    seen = Seen()
    host = Host(seen, seen, ServerMetrics())

    async def change(name, *versions):
        made = await host.prepare(1, Change(name, {version: Source("a") for version in versions}))
        assert set(made) == (set(versions) if seen.fails else set())
        assert sys.getswitchinterval() == usual

    async def changes():
        await change("a", "1")
        seen.loaded["a"] = ["1"]
        await change("b", "1")  # somebody may wait for it
        seen.fails = True
        await change("a", "2", "3")

    asyncio.run(changes())
    host.close()
    assert [each for each, _ in seen.found] == [nice, min(nice + 10, 19), 19, 19]
    assert {round(interval, 6) for _, interval in seen.found} == {2e-5}


def test_another_interval_that_was_set_meanwhile_stays():
    usual, turns = sys.getswitchinterval(), priorities.QuickTurns()
    try:
        turns.begin()
        turns.begin()
        turns.end()
        assert sys.getswitchinterval() < 1e-4
        sys.setswitchinterval(2e-4)
        turns.end()
        assert sys.getswitchinterval() == pytest.approx(2e-4)
    finally:
        sys.setswitchinterval(usual)
