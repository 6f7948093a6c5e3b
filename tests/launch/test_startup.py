"""Joining a run: real processes, real ports."""

import os
import socket
import subprocess
import sys
import time

import pytest

import lepton_xla as lx
from lepton_xla.errors import LaunchError
from lepton_xla.launch import coordinator

JOIN = """
import sys, lepton_xla as lx
place = lx.launch.initialize(timeout_s=float(sys.argv[1]))
import jax
print(place.index, place.count, jax.process_index(), jax.device_count(), lx.launch.initialize() == place, flush=True)
"""


def process(code, *args, **environ):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "LEPTON", "JAX"))}
    clean |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", **environ}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ours(address, count, index):
    return {"JAX_COORDINATOR_ADDRESS": address, "LEPTON_NUM_PROCESSES": str(count), "LEPTON_PROCESS_ID": str(index)}


@pytest.fixture
def address():
    with coordinator.reserve() as held:
        yield f"127.0.0.1:{held.getsockname()[1]}"


def test_two_processes_join(address):
    both = [process(JOIN, 30, **ours(address, 2, index)) for index in range(2)]
    for index, each in enumerate(both):
        out, err = each.communicate(timeout=60)
        assert each.returncode == 0, err
        assert out.split() == [str(index), "2", str(index), "2", "False"]


def test_a_process_alone_joins_nothing():
    out, err = process(JOIN, 30).communicate(timeout=60)
    assert out.split() == ["0", "1", "0", "1", "True"], err


def test_an_exception_ends_its_process_at_once(address):
    """JAX alone would wait for the others until the shutdown's timeout, five minutes."""
    code = JOIN + "import time\nif place.index == 1: raise ZeroDivisionError('one')\ntime.sleep(60)"
    both = [process(code, 30, **ours(address, 2, index)) for index in range(2)]
    try:
        _, err = both[1].communicate(timeout=30)
        assert both[1].returncode == 1
        assert err.rstrip().endswith("ZeroDivisionError: one")
        assert both[0].poll() is None
    finally:
        for each in both:
            each.kill()
            each.communicate()


def test_a_coordinator_that_does_not_answer(address):
    with pytest.raises(LaunchError, match=rf"process 1 of 2: the coordinator {address} does not answer after 0.3 s .*"):
        coordinator.wait_for(address, 0.3, "process 1 of 2")
    with pytest.raises(LaunchError, match=r"no-such-host\.invalid:1 does not answer"):
        coordinator.wait_for("no-such-host.invalid:1", 0.1, "process 1 of 2")


def test_a_coordinator_that_answers_late(address):
    port = coordinator.split(address)[1]
    code = (
        "import socket, sys, time; time.sleep(0.5); s = socket.create_server(('', int(sys.argv[1])), reuse_port=True)"
    )
    late = process(code + "; time.sleep(20)", port)
    try:
        began = time.monotonic()
        coordinator.wait_for(address, 20, "process 1 of 2")
        assert time.monotonic() - began < 15
    finally:
        late.kill()
        late.communicate()


def test_a_process_whose_peers_do_not_come_says_so(address):
    lonely = process(JOIN, 2, **ours(address, 2, 0))
    _, err = lonely.communicate(timeout=60)
    assert lonely.returncode == 1
    assert f"process 0 of 2 at {address} has waited" in err
    assert "Check failure" not in err


@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_in_use(reuse):
    """Also by a program that lets others listen on it, as another run's coordinator does."""
    with socket.create_server(("", 0), reuse_port=reuse) as server:
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=f"the coordinator's port {port} is in use"):
            coordinator.check_free(f"127.0.0.1:{port}")


def test_a_free_or_reserved_port_is_not_in_use(address):
    coordinator.check_free(address)


@pytest.mark.parametrize("address", ["host", "host:", ":1", "host:0", "host:65536", "host:x"])
def test_addresses_that_are_none(address):
    with pytest.raises(LaunchError, match="is not host:port"):
        coordinator.split(address)


def test_two_reservations_differ():
    with coordinator.reserve() as one, coordinator.reserve() as two:
        assert one.getsockname()[1] != two.getsockname()[1]


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS is set, but LEPTON_NUM_PROCESSES"),
        ({"SLURM_JOB_ID": "7"}, "inside a SLURM job"),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, "leptonx launch jobset"),
    ],
)
def test_half_an_environment(environ, said, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "LEPTON", "JAX_COORDINATOR", "KUBERNETES", "OMPI")):
            monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=said):
        lx.launch.initialize()
    assert lx.launch.initialize(cluster="none").count == 1
    monkeypatch.setenv("LEPTON_CLUSTER", "none")
    assert lx.launch.initialize().count == 1
