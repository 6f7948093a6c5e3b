"""A placement over two processes with two devices each."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
def test_each_process_keeps_the_parts_of_its_devices():
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), address]
    started = [
        subprocess.Popen(
            [*command, str(number)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    for process in started:
        out, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-2000:]
        said = json.loads(out.splitlines()[-1])
        assert said["total"] == sum(range(32)) + 3 + sum(range(8))
        # The first axis of the mesh is the processes.
        assert said["shapes"] == {"up": [[8, 2]] * 2, "whole": [[3]] * 2, "cut": [[4]] * 2}
        assert "an artifact runs in one process" in said["refused"]
