"""Triton's own example scripts for its HTTP client, unmodified, each run as a process against a served model.

They are read from a checkout of github.com/triton-inference-server/client that LEPTON_TRITON_CLIENT names; nothing of
it is in this project. The table says which pass, and what the others need that is not there.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lepton_xla.compiler import compile
from lepton_xla.program import TensorSpec, trace
from lepton_xla.serve import Options, Server
from lepton_xla.serve.models.repository import Repository

CHECKOUT = os.environ.get("LEPTON_TRITON_CLIENT")
FOLDER = Path(CHECKOUT or ".") / "src/python/examples"

PASSING = (
    "simple_http_infer_client.py",
    "simple_http_async_infer_client.py",
    "simple_http_aio_infer_client.py",
    "simple_http_health_metadata.py",
)
CONTROL = "simple_http_model_control.py"
SHARED_MEMORY = "shared memory is not supported"
OTHERS = {
    # These two want other models: one that keeps state, one that takes strings.
    "simple_http_sequence_sync_infer_client.py": "Request for unknown model: 'simple_sequence'",
    "simple_http_string_infer_client.py": "Request for unknown model: 'simple_string'",
    "simple_http_shm_client.py": SHARED_MEMORY,
    "simple_http_shm_string_client.py": SHARED_MEMORY,
    # It imports NVIDIA's CUDA bindings before it asks.
    "simple_http_cudashm_client.py": "Error",
}
OPTIONS = [
    ("-v",),
    ("--request-compression-algorithm", "gzip", "--response-compression-algorithm", "deflate"),
    ("--request-compression-algorithm", "deflate", "--response-compression-algorithm", "gzip"),
    ("-H", "X-Custom:7"),
]

pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="LEPTON_TRITON_CLIENT names no checkout of Triton's client")


class Simple:
    """What Triton's examples call `simple`: OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1."""

    name = "simple"
    version = "1"
    inputs = {name: TensorSpec(("batch", 16), "int32") for name in ("INPUT0", "INPUT1")}  # noqa: RUF012
    outputs = {name: TensorSpec(("batch", 16), "int32") for name in ("OUTPUT0", "OUTPUT1")}  # noqa: RUF012
    buckets = {"batch": (1, 8)}  # noqa: RUF012

    def run(self, sizes, arrays):
        first, second = (array.astype(np.int32) for array in arrays)
        return [first + second, first - second]


def run(server, script, *options):
    command = [sys.executable, str(FOLDER / script), "-u", server.url.removeprefix("http://"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def simple(make_server):
    return make_server(Simple(), server_name="triton")


def test_the_table_knows_every_script():
    assert {path.name for path in FOLDER.glob("simple_http_*.py")} == {*PASSING, CONTROL, *OTHERS}


def test_models_are_loaded_unloaded_and_configured(tmp_path):
    """The script wants seven models in the repository, and one whose largest batch can be set to 16."""
    inputs = {name: TensorSpec(("batch", 16), "int32") for name in ("INPUT0", "INPUT1")}
    program = trace(
        lambda weights, INPUT0, INPUT1: {"OUTPUT0": INPUT0 + INPUT1, "OUTPUT1": INPUT0 - INPUT1}, {}, inputs
    )
    compile(program, {"batch": (1, 8, 16)}, name="simple").save(tmp_path / "simple.lepton")
    repository = Repository(tmp_path / "MODELS")
    for name in ("simple", *(f"other{number}" for number in range(6))):
        repository.push(tmp_path / "simple.lepton", name)
    with Server(options=Options(port=0, explicit=True), repository=repository.root) as server:
        code, output = run(server, CONTROL)
    assert code == 0, output
    assert "PASS: model control" in output


@pytest.mark.parametrize("script", PASSING)
def test_passes(simple, script):
    code, output = run(simple, script)
    assert code == 0, output


@pytest.mark.parametrize("script", ["simple_http_infer_client.py", "simple_http_aio_infer_client.py"])
@pytest.mark.parametrize("options", OPTIONS)
def test_passes_with_options(simple, script, options):
    code, output = run(simple, script, *options)
    assert code == 0, output


@pytest.mark.parametrize("script", OTHERS)
def test_does_not_pass_for_the_reason_told(simple, script):
    code, output = run(simple, script)
    assert code != 0
    assert OTHERS[script] in output
