"""A compiled artifact behind the real command, asked over real sockets."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from serve_fakes import raw_request, read_response


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    import jax.numpy as jnp

    from lepton_xla.compiler import compile
    from lepton_xla.program import TensorSpec, trace

    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((16, 3)).astype(np.float32)}
    program = trace(lambda w, x: jnp.tanh(x @ w["w"]), weights, {"x": TensorSpec(("batch", 16), "float32")})
    path = tmp_path_factory.mktemp("artifact") / "tanh.lepton"
    compile(program, {"batch": (1, 8)}, name="tanh").save(path)
    return path, weights["w"]


def test_the_command_serves_an_artifact(artifact):
    path, w = artifact
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "LEPTON_PORT": "0",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", "from lepton_xla.cli.serve import serve; serve()", str(path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            event = json.loads(process.stdout.readline())
            assert (event["event"], event["model"], event["host"]) == ("listening", "tanh", "127.0.0.1")
            address = (event["host"], event["port"])
            rng = np.random.default_rng(1)

            def ask(rows):
                x = rng.standard_normal((rows, 16)).astype(np.float32)
                given = {"name": "x", "datatype": "FP32", "shape": [rows, 16], "data": x.ravel().tolist()}
                with socket.create_connection(address, 10) as sock:
                    body = json.dumps({"inputs": [given]}).encode()
                    sock.sendall(raw_request("POST", "/v2/models/tanh/infer", body))
                    status, _, answer = read_response(sock)
                assert status == 200, answer
                (output,) = json.loads(answer)["outputs"]
                expected = np.tanh(x.astype(np.float64) @ w.astype(np.float64))
                np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), expected, atol=1e-5)

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(ask, [1, 2, 3, 8, 9, 30] * 5))
            process.send_signal(signal.SIGTERM)
            assert json.loads(process.stdout.readline()) == {"event": "stopped", "all_answered": True}
            assert process.wait(10) == 0
        finally:
            process.kill()
