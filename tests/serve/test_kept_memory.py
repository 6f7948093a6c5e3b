"""`leptonx serve` has the allocator keep what is freed, unless there is a budget of memory."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from lepton_xla.cli import main
from lepton_xla.errors import ServeError
from lepton_xla.serve import runtime, server

SCRIPT = """
import ctypes, os
from lepton_xla.serve.models.trimming import trim
from lepton_xla.serve.runtime import keep_memory

library, size = ctypes.CDLL(None), 64 << 20
library.malloc.restype = ctypes.c_void_p

def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

def use():
    memory = ctypes.c_void_p(library.malloc(size))
    ctypes.memset(memory, 1, size)
    library.free(memory)
    return megabytes()

kept, empty = keep_memory(), megabytes()
print(kept, use() - empty, use() - empty, trim() or megabytes() - empty)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("more", "kept"),
    [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, False)],
)
def test_what_is_freed_stays_until_it_is_trimmed_and_other_settings_stay(more, kept):
    if not hasattr(runtime.ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("another allocator")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | more, capture_output=True, text=True, check=True
    )
    told, first, second, trimmed = done.stdout.split()
    assert told == str(kept)
    # A few megabytes for whatever else the process does.
    assert (int(first) > 56, int(second) > 56) == (kept, kept)
    assert int(second) < 72
    assert int(trimmed) < 8


@pytest.mark.parametrize("budget", [(), ("--memory", "1GiB")])
def test_serve_keeps_memory_only_without_a_budget(budget, monkeypatch, tmp_path):
    asked = []

    def refuse(*_, **__):
        raise ServeError("no server")

    monkeypatch.setattr(runtime, "keep_memory", lambda: asked.append(True))
    monkeypatch.setattr(server, "Server", refuse)
    assert CliRunner().invoke(main, ["serve", str(tmp_path), *budget], prog_name="leptonx").exit_code == 2
    assert asked == ([] if budget else [True])
