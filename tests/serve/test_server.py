"""Starting, stopping, and the command line."""

import gc

import numpy as np
import pytest
from click.testing import CliRunner
from serve_fakes import Affine, Identity, affine_binary, connect, raw_request, read_outputs, read_response

from lepton_xla.cli.serve import serve as serve_command
from lepton_xla.errors import ServeError
from lepton_xla.serve import Limits, Options, Server
from lepton_xla.serve.processes import worker

INFER = "/v2/models/affine/infer"
X = np.ones((1, 4), np.float32)


def infer_bytes(n):
    body, fields = affine_binary(X, [n])
    return raw_request("POST", INFER, body, fields)


def check(response, n):
    status, headers, body = response
    assert status == 200
    np.testing.assert_array_equal(read_outputs(headers, body)["y"], 2 * X + n)


def test_a_taken_port_is_a_serve_error(server):
    with pytest.raises(ServeError, match=f"{server.address[1]}.*in use"):
        Server(Affine(), Options(port=server.address[1])).start()


@pytest.mark.parametrize(
    "bad", [{"port": 70000}, {"max_queue_rows": 0}, {"max_delay_us": -1}, {"stop_timeout_s": -1.0}]
)
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(ServeError, match=next(iter(bad))):
        Options(**bad)
    with pytest.raises(ServeError, match="max_chunks"):
        Limits(max_chunks=0)


def test_a_model_whose_outputs_are_not_as_declared_does_not_start():
    class Liar(Identity):
        def run(self, sizes, arrays):
            return [arrays[0][:, :2]]

    with pytest.raises(ServeError, match="signature"):
        Server(Liar(), Options(port=0)).start()


def test_every_compiled_size_is_warm_before_the_server_listens(affine):
    with Server(affine, Options(port=0)):
        assert set(affine.runs) == {1, 4, 8}


def test_help_names_the_environment_twin_of_every_option():
    text = " ".join(CliRunner().invoke(serve_command, ["--help"], terminal_width=400).output.split())
    for option in serve_command.params:
        if option.param_type_name == "option" and option.name != "as_json":
            assert f"LEPTON_{option.name.upper()}" in text
    assert "Triton" in text


def test_a_missing_artifact_is_a_lepton_error(tmp_path):
    from lepton_xla.errors import ArtifactError

    result = CliRunner().invoke(serve_command, [str(tmp_path / "nothing.lepton"), "--port", "0"])
    assert isinstance(result.exception, ArtifactError)


def test_workers_do_not_share_a_device(monkeypatch):
    worker.check_device()
    monkeypatch.setattr("lepton_xla.compiler.devices.platform_here", lambda: "gpu")
    with pytest.raises(ServeError, match="on the gpu: serve from one process"):
        worker.check_device()


def test_a_request_leaves_nothing_for_the_garbage_collector(server):
    """A cycle a request would bring full collections, which stop every answer for as long as they take."""
    with connect(server) as sock:
        for n in range(10):
            sock.sendall(infer_bytes(n))
            read_response(sock)
        gc.collect()
        gc.disable()
        try:
            for n in range(300):
                sock.sendall(infer_bytes(n % 10))
                check(read_response(sock), n % 10)
            assert gc.collect() < 300
        finally:
            gc.enable()
