"""Two processes that hold parts of every weight shrink and freeze ranges as one process does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import two_processes

HERE = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_two_processes_decide_and_train_like_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, HERE / "two_processes.py", str(port), str(rank), tmp_path / str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outs = [process.communicate(timeout=180) for process in running]
    assert [process.returncode for process in running] == [0, 0], [err[-2000:] for _, err in outs]
    got, other = (json.loads((tmp_path / str(rank)).read_text(encoding="utf-8")) for rank in range(2))
    assert got == other
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = two_processes.said(*two_processes.run())
    assert got["decided"]["cuts"] == expected["decided"]["cuts"]
    np.testing.assert_allclose(got["decided"]["ranges"]["up"], expected["decided"]["ranges"]["up"], rtol=1e-5)
    np.testing.assert_allclose(got["sums"], expected["sums"], rtol=1e-4)
