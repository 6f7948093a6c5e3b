"""Stopping: nothing that was accepted is lost, and connections are closed in an order that clients can follow."""

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
from serve_fakes import Affine, affine_binary, connect, exchange, raw_request, read_outputs, read_response, start_script

INFER = "/v2/models/affine/infer"
READY = raw_request("GET", "/v2/health/ready")
X = np.ones((1, 4), np.float32)


def infer_bytes(n):
    body, fields = affine_binary(X, [n])
    return raw_request("POST", INFER, body, fields)


def check(response, n):
    status, headers, body = response
    assert status == 200, body
    np.testing.assert_array_equal(read_outputs(headers, body)["y"], 2 * X + n)


def hold(affine):
    affine.gate.clear()
    affine.running.clear()
    affine.runs.clear()


def stop_in_background(server):
    thread = threading.Thread(target=server.stop)
    thread.start()
    while server.metrics.ready:
        time.sleep(0.001)
    return thread


def test_stop_answers_everything_accepted_and_closes_the_rest(server, affine):
    hold(affine)
    with connect(server) as running, connect(server) as queued, connect(server) as idle, connect(server) as partial:
        idle.sendall(READY)
        assert read_response(idle)[0] == 200
        running.sendall(infer_bytes(1))
        assert affine.running.wait(5)
        queued.sendall(infer_bytes(2) + infer_bytes(3))
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
        first = read_response(queued, buffer=buffer)
        check(first, 2)
        assert "connection" not in first[1]
        last = read_response(queued, buffer=buffer)
        check(last, 3)
        assert last[1]["connection"] == "close"
        check(read_response(partial), 4)
        for sock in (running, queued, partial):
            assert sock.recv(1) == b""
    stopping.join(5)
    assert not stopping.is_alive()


def test_readiness_goes_first_and_the_lame_duck_still_answers(make_server):
    server = make_server(Affine(), lame_duck_s=2.0)
    with connect(server) as idle, connect(server) as used:
        for sock in (idle, used):
            sock.sendall(READY)
            status, headers, _ = read_response(sock)
            assert (status, "connection" in headers) == (200, False)
        began = time.monotonic()
        stopping = stop_in_background(server)
        for path in ("/v2/health/ready", "/v2/models/affine/ready"):
            assert exchange(server, "GET", path)[0] == 503
        assert exchange(server, "GET", "/v2/health/live")[0] == 200
        check(exchange(server, "POST", INFER, *affine_binary(X, [1])), 1)
        used.sendall(infer_bytes(2))
        answer = read_response(used)
        check(answer, 2)
        assert answer[1]["connection"] == "close"
        assert used.recv(1) == b""
        assert time.monotonic() - began < 1.9
        assert idle.recv(1) == b""
        assert time.monotonic() - began > 1.99
    stopping.join(5)
    assert not stopping.is_alive()


def test_a_connection_in_use_is_closed_by_an_answer(make_server):
    """Without a lame duck too: closing between an answer and the next request would lose that request."""
    server = make_server(Affine())
    with connect(server) as sock:
        sock.sendall(infer_bytes(1))
        check(read_response(sock), 1)
        stopping = stop_in_background(server)
        time.sleep(0.1)
        sock.sendall(infer_bytes(2))
        answer = read_response(sock)
        check(answer, 2)
        assert answer[1]["connection"] == "close"
    stopping.join(5)
    assert not stopping.is_alive()


def test_a_request_sent_too_late_does_not_take_the_last_answer_with_it(make_server):
    """Bytes that reach a closed socket reset the connection, and what the client has not read may be lost."""
    server = make_server(Affine(), lame_duck_s=2.0)
    with connect(server) as sock:
        stopping = stop_in_background(server)
        sock.sendall(infer_bytes(1))
        time.sleep(0.2)  # answered, and closed on the server's side
        for n in (2, 3):  # the second would meet the reset that the first had brought
            sock.sendall(infer_bytes(n))
            time.sleep(0.05)
        answer = read_response(sock)
        check(answer, 1)
        assert answer[1]["connection"] == "close"
        assert sock.recv(1) == b""
    stopping.join(5)
    assert not stopping.is_alive()


def test_connections_that_the_kernel_accepted_are_served(make_server):
    """Those that wait at the listening socket when it is closed would be reset."""

    class Busy(Affine):
        def run(self, sizes, arrays):
            time.sleep(0.002)
            return super().run(sizes, arrays)

    server = make_server(Busy())
    block, blocked = threading.Event(), threading.Event()

    def hold_the_loop():
        blocked.set()
        block.wait(10)

    server._loop.call_soon_threadsafe(hold_the_loop)
    assert blocked.wait(5)
    with contextlib.ExitStack() as stack:
        # The loop is held: these are accepted by the kernel only, and the stop comes before the loop can look.
        server._loop.call_soon_threadsafe(server._stop.asked.set)
        sockets = [stack.enter_context(connect(server)) for _ in range(20)]
        for n, sock in enumerate(sockets):
            sock.sendall(infer_bytes(n))
        block.set()
        for n, sock in enumerate(sockets):
            check(read_response(sock), n)


def test_a_stop_gives_up_at_its_deadline(make_server, affine):
    server = make_server(affine, stop_timeout_s=0.3)
    hold(affine)
    with connect(server) as sock, connect(server) as partial:
        sock.sendall(infer_bytes(1))
        partial.sendall(infer_bytes(2)[:-5])
        assert affine.running.wait(5)
        start = time.monotonic()
        server.stop()
        assert 0.2 < time.monotonic() - start < 3
        for each in (sock, partial):
            status, headers, body = read_response(each)
            assert (status, headers["connection"]) == (503, "close")
            assert json.loads(body) == {"error": "the server has stopped"}
    assert server.metrics.codes[503] == 2
    affine.gate.set()


SCRIPT = """
    import json, logging, sys, time
    from serve_fakes import Affine
    from lepton_xla.serve import Options, Server

    options = json.loads(sys.argv[1])
    delay_s = options.pop("delay_s")

    class Slow(Affine):
        def run(self, sizes, arrays):
            # Warmed up with zeros, and not so short as to be run on the event loop.
            time.sleep(delay_s if arrays[1].any() else 0.002)
            return super().run(sizes, arrays)

    logging.basicConfig(level="INFO")
    server = Server(Slow((1,)), Options(port=0, **options))
    done = server.run(on_ready=lambda server: print(server.address[1], flush=True))
    sys.exit(0 if done else 1)
"""


@contextlib.contextmanager
def process_of(**options):
    """A server in a process of its own, and its port."""
    with start_script(SCRIPT, json.dumps(options), stdout=subprocess.PIPE) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_sighup_hurts_nobody_where_there_is_nothing_to_read_again():
    with start_script(SCRIPT, json.dumps({"delay_s": 0.0}), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            port = int(process.stdout.readline())
            process.send_signal(signal.SIGHUP)
            while "SIGHUP: nothing is read again" not in (line := process.stderr.readline()):
                assert line
            with socket.create_connection(("127.0.0.1", port), 10) as sock:
                sock.sendall(raw_request("GET", "/v2/health/ready"))
                assert read_response(sock)[0] == 200
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_what_was_accepted_and_exits_with_0(number):
    with process_of(delay_s=0.2) as (process, port):
        sockets = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(4)]
        for n, sock in enumerate(sockets, 1):
            sock.sendall(infer_bytes(n))
        time.sleep(0.1)
        process.send_signal(number)
        for n, sock in enumerate(sockets, 1):
            check(read_response(sock), n)
            sock.close()
        assert process.wait(10) == 0


@pytest.mark.parametrize("lame_duck_s", [0.0, 0.7])
def test_a_load_of_kept_connections_sees_no_failure_while_the_server_stops(lame_duck_s):
    answers, failures = [], []

    def client(port):
        """Asks again and again, opening a connection anew when it is told to, until there is none to be had."""
        sock = None
        try:
            for n in range(100_000):
                if sock is None:
                    try:
                        sock = socket.create_connection(("127.0.0.1", port), 10)
                    except ConnectionRefusedError:
                        return
                sock.sendall(infer_bytes(n % 100))
                response = read_response(sock)
                check(response, n % 100)
                last = response[1].get("connection") == "close"
                answers.append(last)
                if last:
                    sock.close()
                    sock = None
        except Exception as error:
            failures.append(error)

    with process_of(delay_s=0.002, lame_duck_s=lame_duck_s) as (process, port):
        threads = [threading.Thread(target=client, args=(port,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        assert process.wait(10) == 0
    assert failures == []
    assert answers.count(False) > 20
    assert answers.count(True) >= (100 if lame_duck_s else 8)


@pytest.mark.parametrize(("owing", "code"), [(True, 1), (False, 0)])
def test_a_second_signal_stops_at_once(owing, code):
    with (
        process_of(delay_s=5.0 if owing else 0.0, lame_duck_s=60.0) as (process, port),
        socket.create_connection(("127.0.0.1", port), 10) as sock,
    ):
        sock.sendall(infer_bytes(1))
        if not owing:
            check(read_response(sock), 1)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        if owing:
            assert read_response(sock)[0] == 503
        assert process.wait(3) == code
