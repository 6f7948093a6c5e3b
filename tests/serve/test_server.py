"""Starting, stopping, and the command line."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from serve_fakes import Affine, Identity, affine_binary, connect, exchange, raw_request, read_outputs, read_response

from lepton_xla.cli.serve import serve as serve_command
from lepton_xla.errors import ServeError
from lepton_xla.serve import Limits, Options, Server

INFER = "/v2/models/affine/infer"
X = np.ones((1, 4), np.float32)


def infer_bytes(n):
    body, fields = affine_binary(X, [n])
    return raw_request("POST", INFER, body, fields)


def check(response, n):
    status, headers, body = response
    assert status == 200
    np.testing.assert_array_equal(read_outputs(headers, body)["y"], 2 * X + n)


def hold(affine):
    affine.gate.clear()
    affine.running.clear()
    affine.runs.clear()


def stop_in_background(server):
    thread = threading.Thread(target=server.stop)
    thread.start()
    return thread


def test_stop_answers_everything_accepted_and_closes_the_rest(server, affine):
    hold(affine)
    with connect(server) as running, connect(server) as queued, connect(server) as idle, connect(server) as partial:
        running.sendall(infer_bytes(1))
        assert affine.running.wait(5)
        queued.sendall(infer_bytes(2) + infer_bytes(3))
        idle.sendall(raw_request("GET", "/v2/health/ready"))
        assert read_response(idle)[0] == 200
        partial.sendall(infer_bytes(4)[:-5])
        time.sleep(0.1)
        stopping = stop_in_background(server)
        assert idle.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(server.address, 1)
        partial.sendall(infer_bytes(4)[-5:])
        time.sleep(0.05)
        affine.gate.set()
        check(read_response(running), 1)
        buffer = bytearray()
        check(read_response(queued, buffer=buffer), 2)
        last = read_response(queued, buffer=buffer)
        check(last, 3)
        assert last[1]["connection"] == "close"
        check(read_response(partial), 4)
        for sock in (running, queued, partial):
            assert sock.recv(1) == b""
    stopping.join(5)
    assert not stopping.is_alive()


def test_readiness_goes_first_and_the_lame_duck_still_answers(make_server):
    server = make_server(Affine(), lame_duck_s=0.5)
    stopping = stop_in_background(server)
    time.sleep(0.1)
    assert exchange(server, "GET", "/v2/health/ready")[0] == 503
    assert exchange(server, "GET", "/v2/models/affine/ready")[0] == 503
    assert exchange(server, "GET", "/v2/health/live")[0] == 200
    check(exchange(server, "POST", INFER, *affine_binary(X, [1])), 1)
    stopping.join(5)
    assert not stopping.is_alive()


def test_a_stop_gives_up_at_its_deadline(make_server, affine):
    server = make_server(affine, stop_timeout_s=0.3)
    hold(affine)
    with connect(server) as sock:
        sock.sendall(infer_bytes(1))
        assert affine.running.wait(5)
        start = time.monotonic()
        server.stop()
        assert 0.2 < time.monotonic() - start < 3
        with pytest.raises((ConnectionError, ConnectionResetError)):
            read_response(sock)
    affine.gate.set()


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


SCRIPT = textwrap.dedent(
    """
    import logging, sys, time
    sys.path.insert(0, {here!r})
    from serve_fakes import Affine
    from lepton_xla.serve import Options, Server

    class Slow(Affine):
        def run(self, sizes, arrays):
            time.sleep(0.2)
            return super().run(sizes, arrays)

    logging.basicConfig(level="INFO")
    done = Server(Slow((1,)), Options(port=0)).run(on_ready=lambda server: print(server.address[1], flush=True))
    sys.exit(0 if done else 1)
    """
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_what_was_accepted_and_exits_with_0(number):
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", SCRIPT.format(here=str(here))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            port = int(process.stdout.readline())
            sockets = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(4)]
            for n, sock in enumerate(sockets):
                sock.sendall(infer_bytes(n))
            time.sleep(0.1)
            process.send_signal(number)
            for n, sock in enumerate(sockets):
                check(read_response(sock), n)
                sock.close()
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_help_names_the_environment_twin_of_every_option():
    text = " ".join(CliRunner().invoke(serve_command, ["--help"], terminal_width=400).output.split())
    for option in serve_command.params:
        if option.param_type_name == "option" and option.name != "as_json":
            assert f"LEPTON_{option.name.upper()}" in text
    assert "tritonclient" in text


def test_a_missing_artifact_is_a_lepton_error(tmp_path):
    from lepton_xla.errors import ArtifactError

    result = CliRunner().invoke(serve_command, [str(tmp_path / "nothing.lepton"), "--port", "0"])
    assert isinstance(result.exception, ArtifactError)


def test_log_lines_are_json_and_one_line_each():
    import logging

    from lepton_xla.serve.logs import JsonLines, PlainLines

    record = logging.LogRecord("lepton_xla.serve", logging.ERROR, "x.py", 1, "a\nb \x1b[31m %s", ("c\r",), None)
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "a\nb \x1b[31m c\r"
    plain = PlainLines().format(record)
    assert plain.isprintable()


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
