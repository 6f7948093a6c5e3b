"""Every limit is a flag and an environment variable, takes effect, and refuses nonsense before anything is loaded."""

import dataclasses
import json
import math
import re

import click
import numpy as np
import pytest
from click.testing import CliRunner
from serve_fakes import Affine, affine_binary, affine_json, connect, exchange, raw_request, read_response

from lepton_xla.cli import main
from lepton_xla.cli.serve import serve as serve_command
from lepton_xla.errors import ServeError
from lepton_xla.serve import Limits, Options
from lepton_xla.serve.access.tls import TlsFiles
from lepton_xla.serve.http.files import make_room

FIELDS = dataclasses.fields(Limits)
INFER = "/v2/models/affine/infer"
X = np.ones((1, 4), np.float32)


@pytest.fixture
def served(monkeypatch):
    """Runs `leptonx serve` up to the server, and gives the options it would have had."""
    seen = []

    class Recorder:
        loading = False

        def __init__(self, servable, options):
            seen.append(options)

        def run(self, on_ready):
            return True

    monkeypatch.setattr("lepton_xla.serve.server.Server", Recorder)
    monkeypatch.setattr("lepton_xla.compiler.load", lambda path, **trust: None)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1 << 20, 1 << 20))

    def run(*args, **environment):
        result = CliRunner().invoke(main, ["serve", "x.lepton", *args], env=environment, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return seen.pop()

    return run


def refused(*args, **environment):
    """The one line with which the command ends; nothing was loaded, for there is no such artifact."""
    result = CliRunner().invoke(main, ["serve", "nothing.lepton", *args], env=environment)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("leptonx: ")
    assert "nothing.lepton" not in line
    return line


@pytest.mark.parametrize(
    ("files", "asked", "raised", "connections"),
    [
        ((1024, 1 << 20), 10_000, 10_320, 10_000),
        ((1024, -1), 10_000, 10_320, 10_000),  # no bound
        ((1024, 4096), 10_000, 4096, 4096 - 64 - 256),
        ((1024, 4096), 3000, 3320, 3000),
        ((200, 400), 10_000, 400, 400 - 64 - 100),
        ((160, 160), 10_000, None, 160 - 64 - 64),
        ((160, 160), 20, None, 20),
    ],
)
def test_connections_are_no_more_than_there_may_be_files(monkeypatch, caplog, files, asked, raised, connections):
    seen = []
    monkeypatch.setattr("resource.getrlimit", lambda kind: files)
    monkeypatch.setattr("resource.setrlimit", lambda kind, limits: seen.append(limits))
    assert make_room(Limits(max_connections=asked)) == Limits(max_connections=connections)
    assert seen == ([] if raised is None else [(raised, files[1])])
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (connections < asked)
    assert all(f"{connections}, not {asked}," in line for line in warned)


def test_too_few_files_for_any_connection_are_refused(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda kind: (100, 100))
    assert refused().startswith("leptonx: this process may open 100 files, and a server needs 129: raise")


def test_every_limit_and_option_has_a_flag_and_a_twin():
    options = {option.name: option for option in serve_command.params if isinstance(option, click.Option)}
    names = {field.name for field in FIELDS}
    others = {field.name for field in dataclasses.fields(Options)} - {"limits", "tls"}
    tls = {f"tls_{field.name}" for field in dataclasses.fields(TlsFiles)}
    assert set(options) >= names | others | tls
    for name in names | others | tls:
        assert options[name].opts == [f"--{name.replace('_', '-')}"]
        if name != "decrypt_key":  # whose variable may hold the key itself, so click does not take it for a path
            assert options[name].envvar == f"LEPTON_{name.upper()}"
        assert options[name].help
    for field in FIELDS:
        assert options[field.name].default == field.default


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_flag_and_its_twin_reach_the_server(served, field):
    assert served().limits == Limits()
    value = field.default * 2
    assert getattr(served(f"--{field.name.replace('_', '-')}", str(value)).limits, field.name) == value
    assert getattr(served(**{f"LEPTON_{field.name.upper()}": str(value)}).limits, field.name) == value


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", "inf"])
def test_nonsense_is_one_line_and_exit_code_2(field, value):
    line = refused(f"--{field.name.replace('_', '-')}", value)
    assert field.name in line.replace("-", "_")
    assert field.name.upper() in refused(**{f"LEPTON_{field.name.upper()}": value}).replace("-", "_").upper()
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(ServeError, match=field.name):
            Limits(**{field.name: bad})


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--port", "70000"], "--port"),
        (["--port", "-1"], "--port"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:8000"),
        (["--host", "0.0.0.0"], "--insecure-public"),
        (["--host", "::"], "--insecure-public"),
        (["--lame-duck-s", "nan"], "lame_duck_s"),
        (["--stop-timeout-s", "-1"], "stop_timeout_s"),
        (["--max-queue-rows", "0"], "--max-queue-rows"),
        (["--max-body-bytes", str(1 << 40)], "max_buffered_bytes"),
        (["--token-file", "/no/such/file"], "cannot read the token file /no/such/file: No such file"),
        (["--token-file", "/"], "cannot read the token file /: Is a directory"),
        (["--token-file", ""], "token file"),
        (["--tls-cert", "a.pem"], "both --tls-cert and --tls-key"),
        (["--tls-key", "a.pem"], "both --tls-cert and --tls-key"),
        (["--tls-client-ca", "a.pem"], "both --tls-cert and --tls-key"),
        (["--tls-cert", "/no/cert", "--tls-key", "/no/key"], "cannot read the TLS key /no/key"),
    ],
)
def test_options_that_make_no_sense_are_one_line(args, part):
    assert part in refused(*args)


@pytest.mark.parametrize("twin", ["LEPTON_TOKEN_FILE", "LEPTON_TLS_CERT", "LEPTON_TLS_KEY", "LEPTON_TLS_CLIENT_CA"])
def test_a_guard_that_is_set_but_empty_does_not_mean_no_guard(twin):
    assert twin in refused(**{twin: ""})


def test_no_secret_is_ever_an_argument():
    """What is on a command line or in an environment is in `ps`: there are files and names only."""
    for option in serve_command.params:
        assert not re.search("secret|password", option.name)
        assert "token" not in option.name or option.name == "token_file"


# What each limit does. Those of test_http.py: chunks, body and header bytes, headers, pipelining, connections, times.


def test_tensors_of_a_request_are_bounded(make_server):
    server = make_server(Affine(), limits=Limits(max_tensors=3))
    outputs = [{"name": "y"}, {"name": "twice"}]
    assert exchange(server, "POST", INFER, affine_json(X, [1], outputs=outputs[:1]))[0] == 200
    status, _, body = exchange(server, "POST", INFER, affine_json(X, [1], outputs=outputs))
    assert status == 400
    assert "4 tensors" in json.loads(body)["error"]


def test_elements_of_an_input_are_bounded(make_server):
    server = make_server(Affine(), limits=Limits(max_elements=8))
    assert exchange(server, "POST", INFER, *affine_binary(np.ones((2, 4)), [1, 2]))[0] == 200
    status, _, body = exchange(server, "POST", INFER, *affine_binary(np.ones((3, 4)), [1, 2, 3]))
    assert status == 400
    assert "12 elements" in json.loads(body)["error"]


def test_header_fields_are_counted_though_they_repeat(make_server):
    server = make_server(Affine(), limits=Limits(max_headers=10))
    for count, status in ((9, 200), (10, 431)):
        with connect(server) as sock:
            sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * count + b"\r\n")
            assert read_response(sock)[0] == status


def test_connections_of_one_address_are_bounded_and_come_back(make_server):
    server = make_server(Affine(), limits=Limits(max_connections_per_address=2))
    for _ in range(2):
        with connect(server) as first, connect(server) as second:
            for sock in (first, second):
                sock.sendall(raw_request("GET", "/v2"))
                assert read_response(sock)[0] == 200
            with connect(server) as third:
                third.sendall(raw_request("GET", "/v2"))
                status, headers, body = read_response(third)
                assert (status, headers["retry-after"]) == (503, "1")
                assert "address" in json.loads(body)["error"]
                assert third.recv(1) == b""


def test_bodies_of_all_connections_together_are_bounded_and_come_back(make_server, affine):
    # Two requests with what is set aside for their answers, and no third.
    limits = Limits(max_body_bytes=60_000, max_buffered_bytes=260_000)
    server = make_server(affine, limits=limits)
    body, fields = affine_binary(np.ones((2000, 4)), np.ones(2000))
    data = raw_request("POST", INFER, body, fields)
    assert 40_000 < len(body) < 60_000
    for how in ("whole", "partial", "vanishing"):
        affine.gate.clear()
        affine.running.clear()
        with connect(server) as first, connect(server) as second, connect(server) as third:
            first.sendall(data)
            assert affine.running.wait(5)
            second.sendall(data if how == "whole" else data[:-1])
            assert exchange(server, "GET", "/v2")[0] == 200
            third.sendall(data)
            status, headers, answer = read_response(third)
            assert (status, headers["retry-after"]) == (503, "1")
            assert "bodies" in json.loads(answer)["error"]
            affine.gate.set()
            assert read_response(first)[0] == 200
            if how == "partial":
                second.sendall(data[-1:])
            if how != "vanishing":
                assert read_response(second)[0] == 200
        # Everything that was counted is free again: two fit, and a third does not.
        affine.gate.set()
        assert exchange(server, "POST", INFER, body, fields)[0] == 200
