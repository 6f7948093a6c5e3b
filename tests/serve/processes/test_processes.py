"""`leptonx serve --workers 2` as users have it: processes, and what happens when one dies."""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from serve_fakes import exchange, raw_request, read_response, start_script
from serve_tls import Authority, client, connect, copy

from lepton_xla.serve.access.tls import TlsFiles
from lepton_xla.serve.access.tokens import create_token
from lepton_xla.serve.client import Client, RequestError
from lepton_xla.serve.http.reserve import RESERVED

ROOT = Path(__file__).parents[3]
INFER = "/v2/models/wait/infer"
# Turns of the model's loop that take some seconds.
LONG = 400_000_000


def make_artifact(path, w):
    """y = tanh(w x) for each token, after as many turns of a loop as n says for its row."""
    import jax
    import jax.numpy as jnp

    from lepton_xla.compiler import compile
    from lepton_xla.program import TensorSpec, trace

    def wait(weights, x, n):
        def turn(state):
            at, value = state
            return at + 1, jnp.where(at < n, jnp.sin(value), value)

        start = (jnp.zeros((), jnp.int32), n.astype(jnp.float32))
        _, value = jax.lax.while_loop(lambda state: (state[0] < n).any(), turn, start)
        return jnp.tanh(x * weights["w"]) + jnp.float32(0) * value[:, None]

    inputs = {"x": TensorSpec(("batch", "seq"), "float32"), "n": TensorSpec(("batch",), "int32")}
    program = trace(wait, {"w": np.float32(w)}, inputs)
    compile(program, {"batch": (1, 4), "seq": (4, 8)}, name="wait").save(path)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("artifact") / "wait.lepton", 0.5)


class Served:
    """A running command with two workers."""

    def __init__(self, path, *flags, files=None, errors=None):
        command = "from lepton_xla.cli.serve import serve; serve()"
        if files is not None:
            few = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))"
            command = f"{few}; {command}"
        self.process = start_script(
            command, path, "--json", "--port", "0", "--workers", "2", *flags,
            environment=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        event = json.loads(self.process.stdout.readline())
        assert (event["event"], event["model"]) == ("listening", "wait")
        self.address = (event["host"], event["port"])
        self.url = event["url"]

    @property
    def workers(self):
        """Those that have got as far as running the worker's module."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "lepton_xla.serve.processes.worker" in child.cmdline():
                    found.append(child)
        return found

    def client(self, **options):
        return Client(self.url, model="wait", **options)

    def get(self, path):
        return exchange(self, "GET", path)

    def wait_for(self, path, status, seconds=20.0):
        deadline = time.monotonic() + seconds
        while (got := self.get(path)[0]) != status:
            assert time.monotonic() < deadline, f"{path} is {got}, not {status}"
            time.sleep(0.02)

    def metric(self, name):
        lines = self.get("/metrics")[2].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def kill(self):
        if self.process.poll() is None:
            for each in (*psutil.Process(self.process.pid).children(), self.process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def served(artifact):
    running = Served(artifact)
    yield running
    running.kill()


def ask(client, rng, rows, seq):
    x = rng.standard_normal((rows, seq)).astype(np.float32)
    got = client.infer(x=x, n=np.zeros(rows, np.int32))["output"]
    np.testing.assert_allclose(got, np.tanh(x.astype(np.float64) * 0.5), atol=1e-5)


def infer_bytes(rows=1, turns=0, **parameters):
    inputs = [
        {"name": "x", "datatype": "FP32", "shape": [rows, 4], "data": [0.5] * (4 * rows)},
        {"name": "n", "datatype": "INT32", "shape": [rows], "data": [turns] * rows},
    ]
    return raw_request("POST", INFER, json.dumps({"inputs": inputs, "parameters": parameters}).encode())


def split(request):
    """Body and header fields of a request, for `exchange`."""
    return request.partition(b"\r\n\r\n")[2], {}


def test_answers_are_right_whatever_the_encoding_the_size_and_the_process(served):
    def work(number):
        rng = np.random.default_rng(number)
        with served.client(binary=bool(number % 2)) as client:
            for rows, seq in ((1, 4), (2, 3), (9, 8), (1, 1), (4, 5), (3, 8)):
                ask(client, rng, rows, seq)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert served.metric("lepton_inference_requests_total") == 48
    assert served.metric("lepton_rows_total") == 8 * 20
    stats = json.loads(served.get("/v2/models/wait/stats")[2])["model_stats"][0]
    assert stats["inference_stats"]["success"]["count"] == 48


def shares(served):
    """How many of twenty connections each process gets."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_connection(served.address, 10)) for _ in range(20)]
        for sock in sockets:
            sock.sendall(raw_request("GET", "/v2/health/ready"))
        for sock in sockets:
            assert read_response(sock)[0] == 200
        ours = {sock.getsockname()[1] for sock in sockets}
        return [
            sum(bool(each.raddr) and each.raddr.port in ours for each in worker.net_connections())
            for worker in served.workers
        ]


def wait_for_even_shares(served):
    """Connections that were closed just now still count for a moment, and a process may have yet to start."""
    deadline = time.monotonic() + 30
    while len(got := shares(served)) < 2 or min(got) < 8:
        assert time.monotonic() < deadline, got
        time.sleep(0.05)


def test_connections_are_dealt_out_evenly(served):
    wait_for_even_shares(served)


def test_the_supervisor_has_no_jax(served):
    assert "jaxlib" not in Path(f"/proc/{served.process.pid}/maps").read_text()
    for worker in served.workers:
        assert "jaxlib" in Path(f"/proc/{worker.pid}/maps").read_text()


def test_a_killed_process_takes_nobody_with_it(served):
    before = served.metric("lepton_http_responses_total")
    with contextlib.ExitStack() as stack:
        sockets = {}
        workers = served.workers
        while len(sockets) < 2:
            sock = stack.enter_context(socket.create_connection(served.address, 10))
            sock.sendall(raw_request("GET", "/v2/health/ready"))
            read_response(sock)
            mine = sock.getsockname()[1]
            owner = next(w for w in workers if mine in [each.raddr.port for each in w.net_connections() if each.raddr])
            sockets[owner.pid] = sock
        victim, other = workers
        for sock in sockets.values():
            sock.sendall(infer_bytes(turns=LONG // 10))
        time.sleep(0.05)
        victim.kill()
        with pytest.raises(ConnectionError):
            read_response(sockets[victim.pid])
        status, _, body = read_response(sockets[other.pid])
        assert (status, json.loads(body)["outputs"][0]["shape"]) == (200, [1, 4])
        with served.client() as client:
            ask(client, np.random.default_rng(0), 5, 7)
    wait_for_even_shares(served)  # so it is back
    assert served.metric("lepton_http_responses_total") > before


def test_a_stopped_process_gets_no_connections_until_it_goes_on(served):
    """SIGSTOP, as a debugger or a frozen cgroup: it stays there, and answers nothing."""
    stopped, other = served.workers
    stopped.suspend()
    try:
        time.sleep(1.3)
        for _ in range(12):  # none of which is in time where it stands still
            assert served.get("/v2/health/live")[0] == 200
        # With nobody left, connections wait in the kernel; the first that goes on takes them.
        other.suspend()
        time.sleep(1.3)
        with contextlib.closing(socket.create_connection(served.address, 10)) as sock:
            sock.sendall(raw_request("GET", "/v2/health/live"))
            sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            other.resume()
            sock.settimeout(10)
            assert read_response(sock)[0] == 200
    finally:
        for each in (stopped, other):
            each.resume()
    wait_for_even_shares(served)
    assert sorted(each.pid for each in served.workers) == sorted([stopped.pid, other.pid])


def test_health_is_answered_beyond_the_connections_that_there_are_files_for(artifact, tmp_path):
    """Each of two workers may open few files, and has as many connections as that leaves room for, and its reserve."""
    with (tmp_path / "log").open("w") as log, contextlib.ExitStack() as stack:
        served = Served(artifact, files=160, errors=log)
        stack.callback(served.kill)
        line = "may open 160 files: --max-connections is 32, not 10000"
        assert (tmp_path / "log").read_text().count(line) == 1
        for _ in range(2 * 32):
            sock = stack.enter_context(contextlib.closing(socket.create_connection(served.address, 20)))
            sock.sendall(raw_request("GET", "/v2/health/live"))
            assert read_response(sock)[0] == 200
        for _ in range(2 * RESERVED):
            stack.enter_context(contextlib.closing(socket.create_connection(served.address, 20)))
        for path in ("/v2/health/live", "/v2/health/ready") * 5:
            assert served.get(path)[0] == 200
        assert served.get("/v2")[0] == 503
    assert "cannot be taken" not in (tmp_path / "log").read_text()


def test_sighup_ends_no_process(served):
    """There is nothing to read again."""
    before = [served.process.pid, *(child.pid for child in psutil.Process(served.process.pid).children())]
    for pid in before:
        os.kill(pid, signal.SIGHUP)
    time.sleep(0.2)
    assert served.get("/v2/health/ready")[0] == 200
    assert [served.process.pid, *(child.pid for child in psutil.Process(served.process.pid).children())] == before


def test_workers_are_replaced_by_such_as_serve_what_the_artifact_is_now(artifact, tmp_path):
    """One that starts again finds other weights; then all do, and nobody who asks meanwhile goes without an answer."""
    path = shutil.copytree(artifact, tmp_path / "wait.lepton")
    make_artifact(tmp_path / "new.lepton", 0.25)
    running = Served(path)
    found, failures, over = [], [], threading.Event()

    def work():
        x = np.full((1, 4), 0.5, np.float32)
        try:
            with running.client() as client:
                while not over.is_set():
                    y = client.infer(x=x, n=np.zeros(1, np.int32))["output"]
                    found.append(min((0.5, 0.25), key=lambda w: abs(np.tanh(w * 0.5) - y[0, 0])))
                    np.testing.assert_allclose(y, np.tanh(np.float64(found[-1]) * x), atol=1e-5)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        before = {worker.pid for worker in running.workers}
        path.rename(tmp_path / "old.lepton")
        (tmp_path / "new.lepton").rename(path)
        running.workers[0].terminate()
        deadline = time.monotonic() + 30
        while len(after := running.workers) < 2 or before & {worker.pid for worker in after}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.wait_for("/v2/health/ready", 200)
        wait_for_even_shares(running)
        first = found[0]
        found.clear()
        time.sleep(0.3)
    finally:
        over.set()
        for thread in threads:
            thread.join(20)
        running.kill()
    assert not failures
    assert first == 0.5
    assert set(found) == {0.25}


def test_workers_share_the_cores(artifact):
    running = Served(artifact)
    try:
        cores = len(os.sched_getaffinity(0))
        for worker in running.workers:
            names = [path.read_text().strip() for path in Path(f"/proc/{worker.pid}/task").glob("*/comm")]
            assert names.count("tf_XLAEigen") == max(1, cores // 2)
    finally:
        running.kill()


def test_deadlines_and_priorities_reach_the_engine(served):
    with socket.create_connection(served.address, 20) as busy:
        busy.sendall(infer_bytes(turns=LONG // 20))
        time.sleep(0.1)
        status, _, body = exchange(served, "POST", INFER, *split(infer_bytes(timeout=1)))
        assert (status, "timeout" in json.loads(body)["error"]) == (504, True)
        assert exchange(served, "POST", INFER, *split(infer_bytes(priority=9)))[0] == 400
        assert read_response(busy)[0] == 200


def test_sigterm_under_load_answers_everything(served):
    answered, refused, failures = [], [], []

    def work(number):
        rng = np.random.default_rng(number)
        try:
            with served.client(retries=0) as client:
                while True:
                    ask(client, rng, 1 + number % 5, 8)
                    answered.append(number)
        except RequestError as error:
            # The server is gone: nobody was there to take the connection.
            (refused if error.status is None and "refused" in str(error) else failures).append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    served.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(20)
    assert not failures
    assert len(refused) == 8
    assert len(answered) > 8
    assert json.loads(served.process.stdout.readline()) == {"event": "stopped", "all_answered": True}
    assert served.process.wait(15) == 0


def test_certificates_and_tokens_change_in_every_process(artifact, tmp_path):
    authority = Authority(tmp_path)
    pair = TlsFiles(tmp_path / "pair.pem", tmp_path / "pair.key")
    copy(authority.issue("first", "127.0.0.1"), pair)
    known = client(authority, authority.issue("client", "client"))
    tokens = tmp_path / "tokens.jsonl"
    infers, reads = create_token(tokens, "infers", ["infer"]), create_token(tokens, "reads", ["read"])
    flags = {"token-file": tokens, "tls-cert": pair.cert, "tls-key": pair.key, "tls-client-ca": authority.root}
    running = Served(artifact, *(f"--{name}={value}" for name, value in flags.items()))

    def of_all(request, token, context=known):
        """Serials of certificates, and statuses, on more connections than go to one process."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(connect(running, context)) for _ in range(6)]
            for sock in sockets:
                head, _, body = request.partition(b"\r\n\r\n")
                sock.sendall(head + b"\r\nAuthorization: Bearer " + token.encode() + b"\r\n\r\n" + body)
            statuses = {read_response(sock)[0] for sock in sockets}
            return {sock.getpeercert()["serialNumber"] for sock in sockets}, statuses

    def wait_for(true):
        deadline = time.monotonic() + 10
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    try:
        first, statuses = of_all(infer_bytes(), infers)
        assert (len(first), statuses) == (1, {200})
        assert of_all(infer_bytes(), reads)[1] == {403}
        assert of_all(infer_bytes(), "leptonx_" + "w" * 43)[1] == {401}
        with pytest.raises((ssl.SSLError, ConnectionError)):
            of_all(infer_bytes(), infers, client(authority))
        copy(authority.issue("second", "127.0.0.1"), pair)
        wait_for(lambda: not of_all(infer_bytes(), infers)[0] & first)
        tokens.write_text("".join(line for line in tokens.read_text().splitlines(True) if "reads" in line))
        running.process.send_signal(signal.SIGHUP)
        wait_for(lambda: of_all(infer_bytes(), infers)[1] == {401})
        assert of_all(raw_request("GET", "/v2"), reads)[1] == {200}
        with connect(running, known) as kept:
            kept.sendall(raw_request("GET", "/v2/health/ready"))
            assert read_response(kept)[0] == 200
            running.process.terminate()
            assert json.loads(running.process.stdout.readline()) == {"event": "stopped", "all_answered": True}
            assert running.process.wait(20) == 0
    finally:
        running.kill()


def test_without_their_supervisor_the_others_end(artifact):
    running = Served(artifact)
    try:
        family = psutil.Process(running.process.pid).children()
        assert len(family) == 2
        running.process.kill()
        _, alive = psutil.wait_procs(family, 10)
        assert not alive
    finally:
        running.kill()


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "none.lepton").write_bytes(b"no artifact")
    code = "import sys; from lepton_xla.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", str(tmp_path / "none.lepton"), "--port", "0", "--workers", "2"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "none.lepton" in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_serve_a_unix_socket(artifact, tmp_path):
    path = tmp_path / "a.sock"
    process = start_script(
        "from lepton_xla.cli.serve import serve; serve()",
        artifact, "--json", "--workers", "2", "--unix-socket", path,
        environment=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        event = json.loads(process.stdout.readline())
        assert event["unix_socket"] == str(path)
        with Client(event["url"], model="wait") as client:
            for rows in (1, 3, 5):
                ask(client, np.random.default_rng(rows), rows, 7)
        process.terminate()
        assert json.loads(process.stdout.readline()) == {"event": "stopped", "all_answered": True}
        assert process.wait(20) == 0
        assert not path.exists()
    finally:
        if process.poll() is None:
            for each in (*psutil.Process(process.pid).children(), process):
                each.kill()
        process.wait(10)
        process.stdout.close()
