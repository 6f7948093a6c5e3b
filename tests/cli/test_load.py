"""`leptonx load` against servers in this process: what it sends, what it prints, how it ends."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
import trustme

from lepton_xla.cli import _load_views
from lepton_xla.program import TensorSpec
from lepton_xla.serve import Options, Server
from lepton_xla.serve.access.tls import TlsFiles
from lepton_xla.serve.access.tokens import create_token
from lepton_xla.serve.load.generator import Generator
from lepton_xla.serve.load.result import Load

SHORT = ("--seconds", 0.3, "--warmup", 0.1)


class Keeper:
    """Gives its input back and keeps what came; negative input fails, and everything after `left` runs."""

    name = "keeper"
    version = "1"

    def __init__(self, dtype="float32", shape=("batch", 3), **buckets):
        self.inputs = {"x": TensorSpec(shape, dtype), "y": TensorSpec(("batch",), "int32")}
        self.outputs = {"z": TensorSpec(("batch",), "int32")}
        self.buckets = {"batch": (1, 4), **buckets}
        self.seen = []
        self.left = math.inf

    def run(self, sizes, arrays):
        self.seen.append([array.copy() for array in arrays])
        self.left -= 1
        if (arrays[1] < 0).any() or self.left < 0:
            raise ValueError("negative")
        return [arrays[1].copy()]

    @property
    def last(self):
        return self.seen[-1]


@pytest.fixture
def keeper():
    return Keeper()


@pytest.fixture
def url(keeper):
    with Server(keeper, Options(port=0)) as server:
        yield server.url


def test_the_document(cli, url, keeper):
    document = cli.json("load", url, "--rate", "50,200", "--rows", 2, *SHORT)
    assert (document["url"], document["model"]) == (url, "keeper")
    assert document["inputs"]["x"] == {"dtype": "float32", "shape": [2, 3]}
    assert [run["rate"] for run in document["runs"]] == [50, 200]
    for run in document["runs"]:
        assert run["counts"] == {"200": run["requests"]}
        assert run["errors"] == 0
        latency = [run["latency_s"][name] for name in ("p50", "p90", "p99", "p99.9", "max")]
        assert latency == sorted(latency)
        assert latency[0] > 0
        assert run["goodput_per_s"] == run["answered_per_s"] > 0
        assert run["seconds"] == pytest.approx(0.3)
        assert run["send_lag_s"]["p50"] >= 0
        assert run["generator_cores"] > 0
    assert document["runs"][1]["requests"] > document["runs"][0]["requests"]
    x, y = keeper.last
    assert x.any()
    assert len(np.unique(x[:1])) == 3
    assert (y >= 0).all()


def test_the_table(cli, url):
    text = cli.ok("load", url.removeprefix("http://"), "--model", "keeper", "--connections", "1,3", *SHORT)
    assert "requests a second, latency in ms" in text
    rows = [line.split() for line in text.splitlines() if line.strip()[:2] in ("1 ", "3 ")]
    assert [row[0] for row in rows] == ["1", "3", "1", "3"]  # in the table, and in the lines below it
    assert len(rows[0]) == len(rows[1]) == 9
    assert rows[0][-1] == "0"
    assert "Each 0.3 s after 0.1 s of warm-up; " in text
    assert "x float32[1, 3], y int32[1]" in text
    text = cli.ok("load", url, "--rate", 50, *SHORT)
    assert "50/s: " in text
    assert "send lag p50" in text


def test_a_server_on_a_unix_socket(cli, tmp_path, keeper):
    with Server(keeper, Options(unix_socket=tmp_path / "s")) as server:
        assert server.url.startswith("http+unix://%2F")
        document = cli.json("load", server.url, "--rate", 50, *SHORT)
        (run,) = document["runs"]
        assert document["url"] == server.url
        assert run["counts"] == {"200": run["requests"]}
        assert cli.ok("load", server.url, "--rate", 50, *SHORT).startswith(f"keeper at {server.url}: ")
    assert f"{server.url}: no answer after" in cli.refused("load", server.url, *SHORT)


def test_arrays_from_files(cli, tmp_path):
    keeper = Keeper("bfloat16")
    x = np.array([[1, 2, 3]], ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "y.json").write_text('{"y": [7]}')
    with Server(keeper, Options(port=0)) as server:
        cli.ok("load", server.url, "--input", f"x={tmp_path / 'x.npy'}", "--input", tmp_path / "y.json", *SHORT)
    np.testing.assert_array_equal(keeper.last[0][:1], x)
    assert keeper.last[1][0] == 7


def test_sizes_of_dimensions_that_vary(cli):
    keeper = Keeper("int8", ("batch", "seq"), seq=(4, 8))
    with Server(keeper, Options(port=0)) as server:
        line = cli.refused("load", server.url, *SHORT)
        assert "input 'x' is int8[?, ?]: set its variable dimensions with --size" in line
        for size in ("8", "x=8"):
            assert cli.json("load", server.url, "--size", size, *SHORT)["inputs"]["x"]["shape"] == [1, 8]
        assert keeper.last[0].shape[1] == 8
        assert "expected a size" in cli.refused("load", server.url, "--size", "seq=8", *SHORT)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--rate", "0"], "from 1 to a million"),
        (["--rate", "1,x"], "from 1 to a million"),
        (["--rate", "1e7"], "from 1 to a million"),
        (["--connections", "1.5"], "from 1 to a million"),
        (["--connections", "1", "--rate", "1"], "not both"),
        (["--seconds", "0"], "seconds must be"),
        (["--warmup", "-1"], "warmup_s must be"),
        (["--timeout", "nan"], "timeout_s must be"),
        (["--rows", "0"], "--rows"),
        (["--size", "x"], "expected a size"),
        (["--input", "w=w.npy"], "w.npy"),
        (["--input", "w.json"], "not an input of the model: x, y"),
        (["--input", "bad.json"], "is not int32"),
        (["--model", "other"], "unknown model"),
        (["--rows", "5000"], "5000"),
        (["--token-file", "nothing"], "token file 'nothing' cannot be read"),
        (["--tls-ca", "ca.pem"], "not https"),
        (["--plot", "no/folder.svg"], "the folder"),
        (["--prompts", "w.json"], "--prompts without --generate"),
        (["--generate", "2", "--prompts", "nothing"], "--prompts nothing: No such file"),
        (["--generate", "2", "--prompts", "empty"], "no line with a prompt"),
        (["--generate", "2", "--prompts", "latin"], "--prompts latin: 'utf-8' codec"),
        (["--generate", "2", "--prompts", "w.json", "--size", "4"], "not both"),
    ],
)
def test_what_cannot_be_done_is_one_line(cli, url, tmp_path, monkeypatch, args, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.json").write_text('{"w": 1}')
    (tmp_path / "bad.json").write_text('{"y": [99999999999]}')
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    assert part in cli.refused("load", url, *args)


def test_nobody_there(cli):
    assert "Connection refused" in cli.refused("load", "http://127.0.0.1:9", "--timeout", 1)


def test_errors_while_it_runs_end_with_1(cli, tmp_path):
    """The request is tried out first; what goes wrong later is counted."""
    keeper = Keeper()
    with Server(keeper, Options(port=0)) as server:
        (tmp_path / "y.json").write_text('{"y": [-1]}')
        assert "inference failed" in cli.refused("load", server.url, "--input", tmp_path / "y.json")
        keeper.left = 1
        done = cli("load", server.url, "--rate", 100, *SHORT)
    assert done.exit_code == 1
    assert "errors: " in done.stdout
    assert "x 500" in done.stdout


def test_tls_and_a_token(cli, tmp_path, monkeypatch):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    pair = authority.issue_cert("127.0.0.1")
    files = TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem")
    files.key.touch(0o600)
    pair.cert_chain_pems[0].write_to_path(files.cert)
    pair.private_key_pem.write_to_path(files.key)
    secret = create_token(tmp_path / "tokens.jsonl", "load", ["infer", "read"])
    (tmp_path / "token").write_text(secret)
    with Server(Keeper(), Options(port=0, tls=files, token_file=tmp_path / "tokens.jsonl")) as server:
        trusted = ("load", server.url, "--tls-ca", tmp_path / "ca.pem", "--connections", 2, *SHORT)
        assert "HTTP 401" in cli.refused(*trusted, "--model", "keeper")
        done = cli.json(*trusted, "--model", "keeper", "--token-file", tmp_path / "token")
        assert done["runs"][0]["errors"] == 0
        assert secret not in json.dumps(done)
        monkeypatch.setenv("LEPTON_TOKEN", secret)
        assert cli.json(*trusted, "--model", "keeper")["runs"][0]["errors"] == 0


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_plot(cli, url, tmp_path, kind):
    path = tmp_path / f"load.{kind}"
    cli.ok("load", url, "--rate", "100,200", "--plot", path, *SHORT)
    start = path.read_bytes()[:300]
    assert (b"<svg" in start or b"<?xml" in start) if kind == "svg" else start[1:4] == b"PNG"


def test_the_live_line():
    generator = Generator(None, b"", Load(100.0, 5, 10.0, 1.0, 1.0))
    now = time.monotonic()
    generator.began, generator.ends, generator.unanswered = now + 1, now + 11, 3
    assert _load_views.status_line(generator, 0) == "100/s  warming up  3 in flight"
    generator.began, generator.ends = now - 2, now + 8.1
    generator.due.extend([now - 2, now - 1, now - 1])
    generator.latencies.extend([5.0, 0.001, 0.003])
    generator.statuses.extend([200, 200, 503])
    line = _load_views.status_line(generator, 1)
    assert line.startswith("100/s  8 s left  ")
    assert line.endswith("3 in flight  p50 1.0 ms  p99 1.0 ms  1 errors")


def test_a_process_without_jax_that_is_interrupted(url):
    """Ctrl-C ends the run early, and the figures so far are printed."""
    code = (
        "import sys, json; from lepton_xla.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'jax', 'jaxlib', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "load", url, "--rate", "50", "--seconds", "100", "--warmup", "0", "--json"]
    environment = os.environ | {"LEPTON_TOKEN": ""}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert 0 < json.loads(out)["runs"][0]["seconds"] < 50
    assert err.strip().splitlines()[-1] == "[]"
