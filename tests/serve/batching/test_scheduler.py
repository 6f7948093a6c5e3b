"""Deadlines, priorities, failures and bounds, over HTTP with a model whose runs can be held back."""

import asyncio
import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time

import numpy as np
import pytest
from serve_fakes import (
    Affine,
    Tokens,
    affine_binary,
    affine_json,
    connect,
    counted,
    exchange,
    raw_request,
    read_outputs,
    read_response,
    wait_rows,
)

from lepton_xla.serve.batching import scheduler
from lepton_xla.serve.batching.batcher import Batcher
from lepton_xla.serve.batching.costs import Costs
from lepton_xla.serve.batching.device import Device
from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.protocol.wire import Decoder

INFER = "/v2/models/affine/infer"


class Held:
    """A server whose model is held in a run of one row; requests are sent on, and answers read later."""

    def __init__(self, server, affine, stack):
        self.server, self.affine, self.stack = server, affine, stack
        affine.gate.clear()
        affine.running.clear()
        self.first = self.send(0)
        assert affine.running.wait(5)
        affine.seen.clear()

    def send(self, *n, waiting=None, **parameters):
        """Sends a request with these values of n; waits until so many rows are in the queue."""
        sock = self.stack.enter_context(connect(self.server))
        body = affine_json(np.zeros((len(n), 4)), n, parameters=parameters)
        sock.sendall(raw_request("POST", INFER, body))
        if waiting is not None:
            wait_rows(self.server, waiting)
        return sock

    def release(self):
        self.affine.gate.set()

    def order(self):
        """The values of n that ran since, padding and repetition apart."""
        values = [int(value) for _, n in self.affine.seen for value in n if value]
        return [value for value, _ in itertools.groupby(values)]


@pytest.fixture
def held(make_server, affine):
    with contextlib.ExitStack() as stack:

        def make(**options):
            return Held(make_server(affine, **options), affine, stack)

        yield make
        affine.gate.set()


def metrics(server):
    return exchange(server, "GET", "/metrics")[2].decode()


def status_of(sock):
    status, _, body = read_response(sock)
    return status, json.loads(body).get("error")


def test_a_request_that_waits_too_long_is_504_in_time_and_never_run(held):
    run = held()
    start = time.monotonic()
    sock = run.send(7, timeout=100_000)
    assert status_of(sock) == (504, "the request's timeout has passed")
    assert 0.09 < time.monotonic() - start < 5
    run.release()
    assert status_of(run.first)[0] == 200
    assert run.order() == []
    assert 'lepton_inference_expired_total{model="affine",version="3"} 1.0' in metrics(run.server)


def test_a_request_that_runs_too_long_is_504_in_time_too(held):
    run = held(default_timeout_s=0.1)
    start = time.monotonic()
    assert status_of(run.first)[0] == 504
    assert time.monotonic() - start < 5
    run.release()
    assert exchange(run.server, "POST", INFER, affine_json(np.zeros((1, 4)), [1]))[0] == 200


def test_one_deadline_after_the_other_is_kept(held):
    run = held()
    start = time.monotonic()
    sockets = [run.send(7, timeout=timeout) for timeout in (300_000, 100_000, 200_000)]
    for sock, seconds in zip((sockets[1], sockets[2], sockets[0]), (0.1, 0.2, 0.3), strict=True):
        assert status_of(sock)[0] == 504
        assert seconds < time.monotonic() - start < 5
    run.release()
    assert status_of(run.first)[0] == 200


def test_the_longest_timeout_bounds_those_that_clients_ask_for(held):
    run = held(max_timeout_s=0.1)
    start = time.monotonic()
    assert status_of(run.send(7, timeout=10_000_000))[0] == 504
    assert status_of(run.first)[0] == 504
    assert time.monotonic() - start < 5


def test_a_split_request_that_expires_is_504_once(held):
    run = held()
    sock = run.send(*range(1, 21), timeout=150_000)
    assert status_of(sock)[0] == 504
    run.release()
    assert status_of(run.first)[0] == 200


def test_a_timeout_too_short_for_the_model_is_504_at_once(server):
    server_costs = [line for line in metrics(server).splitlines() if line.startswith("lepton_cost_seconds{")]
    assert len(server_costs) == 3
    assert 'batch="8",model="affine",shape=""' in server_costs[-1]
    body = affine_json(np.zeros((1, 4)), [1], parameters={"timeout": 20})
    status, headers, answer = exchange(server, "POST", INFER, body)
    assert (status, "shorter than running it takes" in json.loads(answer)["error"]) == (504, True)
    assert "retry-after" not in headers


def test_a_timeout_that_the_load_makes_too_short_is_503_with_the_time_to_wait(make_server):
    class Slow(Affine):
        def run(self, sizes, arrays):
            time.sleep(0.15)
            return super().run(sizes, arrays)

    server = make_server(Slow((1,)))
    body = affine_json(np.zeros((1, 4)), [1], parameters={"priority": 1})
    with contextlib.ExitStack() as stack:
        for _ in range(9):
            stack.enter_context(connect(server)).sendall(raw_request("POST", INFER, body))
        wait_rows(server, 8)
        body = affine_json(np.zeros((1, 4)), [1], parameters={"timeout": 500_000})
        status, headers, answer = exchange(server, "POST", INFER, body)
        assert status == 503, answer
        assert headers["retry-after"] in ("2", "3")  # 1.2 to 1.35 s where nothing else runs, rounded up


def test_priority_decides_who_goes_first(held):
    run = held(priority_levels=3)
    sockets = [
        run.send(*[10 + level] * 8, priority=level, waiting=8 * (index + 1)) for index, level in enumerate((3, 0, 1, 2))
    ]
    run.release()
    for sock in sockets:
        assert status_of(sock)[0] == 200
    assert run.order() == [11, 10, 12, 13]


def test_the_earliest_deadline_goes_first(held):
    run = held()
    sockets = [
        run.send(*[seconds] * 8, timeout=seconds * 1_000_000, waiting=8 * (index + 1))
        for index, seconds in enumerate((9, 5, 7))
    ]
    run.release()
    for sock in sockets:
        assert status_of(sock)[0] == 200
    assert run.order() == [5, 7, 9]


@pytest.mark.parametrize("priority", [4, 1000])
def test_a_priority_that_there_is_not_is_400(server, priority):
    body = affine_json(np.zeros((1, 4)), [1], parameters={"priority": priority})
    status, _, answer = exchange(server, "POST", INFER, body)
    assert (status, json.loads(answer)) == (400, {"error": f"parameter 'priority' must be 0 to 3, not {priority}"})


def test_a_higher_priority_takes_the_place_of_a_lower_one_in_a_full_queue(held):
    run = held(max_queue_rows=8)
    low = [run.send(index, priority=3, waiting=index) for index in range(1, 9)]
    high = run.send(99, priority=1)
    assert status_of(low[-1]) == (503, "the queue is full, and others have a higher priority")
    run.release()
    assert status_of(high)[0] == 200
    assert [status_of(sock)[0] for sock in low[:-1]] == [200] * 7


def test_while_the_queue_is_full_equal_requests_are_refused_unread_and_no_other(held, monkeypatch):
    decoded = []
    decode = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, *of: decoded.append(of) or decode(self, *of))
    run = held(max_queue_rows=2)

    def ask(n, **extra):
        sock = run.stack.enter_context(connect(run.server))
        sock.sendall(raw_request("POST", INFER, *affine_binary(np.zeros((1, 4)), [n], **extra)))
        return sock

    first, second = ask(1), ask(2)
    wait_rows(run.server, 2)
    decoded.clear()
    for _ in range(5):
        assert status_of(ask(3)) == (503, "the queue is full")
    assert len(decoded) == 1
    assert 'lepton_inference_rejected_total{model="affine",version="3"} 5.0' in metrics(run.server)
    # What says something else gets its own answer, each time.
    for _ in range(3):
        late = ask(3, parameters={"timeout": 1, "binary_data_output": True})
        assert status_of(late) == (504, "the request's timeout is shorter than running it takes")
    # Too long for what it says: read, and found out.
    body, fields = affine_binary(np.zeros((1, 4)), [3])
    assert exchange(run.server, "POST", INFER, body + b"more", fields)[0] == 400
    # What goes first has a place, and what left makes one.
    urgent = ask(4, parameters={"priority": 1, "binary_data_output": True})
    assert status_of(second) == (503, "the queue is full, and others have a higher priority")
    assert status_of(ask(3)) == (503, "the queue is full")
    first.close()
    wait_rows(run.server, 1)
    taken = ask(5)
    wait_rows(run.server, 2)
    run.release()
    for sock, n in ((urgent, 4), (taken, 5)):
        status, headers, answer = read_response(sock)
        assert status == 200
        np.testing.assert_array_equal(read_outputs(headers, answer)["y"], np.full((1, 4), n))
    assert run.order() == [4, 5]


def test_the_queue_is_bounded_by_bytes(held):
    run = held(max_queue_bytes=50)
    sock = run.send(1, 1, waiting=2)  # 40 bytes
    status, headers, body = exchange(run.server, "POST", INFER, affine_json(np.zeros((1, 4)), [1]))
    assert (status, headers["retry-after"], json.loads(body)) == (503, "1", {"error": "the queue is full"})
    run.release()
    assert status_of(sock)[0] == 200


@pytest.mark.parametrize("short_s", [0.0, 10.0])
def test_one_poisoned_request_does_not_fail_its_neighbours(make_server, affine, monkeypatch, short_s):
    """On the engine's thread, and on the event loop."""
    monkeypatch.setattr(scheduler, "_SHORT_S", short_s)
    monkeypatch.setattr(scheduler, "_SHORT_ON_ONE_CORE_S", short_s)
    server = make_server(affine, max_delay_us=500_000)
    values = [1, 2, -1, 4, 5, 6, 7, 8]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(connect(server)) for _ in values]
        for sock, value in zip(sockets, values, strict=True):
            sock.sendall(raw_request("POST", INFER, affine_json(np.zeros((1, 4)), [value])))
        for sock, value in zip(sockets, values, strict=True):
            status, headers, body = read_response(sock)
            assert status == (500 if value == -1 else 200)
            if value != -1:
                assert read_outputs(headers, body)["twice"].tolist() == [2 * value]
    assert counted(server).failures == 1
    assert counted(server).failed_batches in (3, 4)  # of eight, or of the four that went first


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", [ValueError, SystemExit])
def test_where_the_engine_has_ended_requests_are_503_at_once(held, monkeypatch, fault):
    """A fault of the server's own ends the engine's thread: those behind it do not wait for their timeouts."""
    run = held()
    waiting = [run.send(index, waiting=index, **more) for index, more in ((1, {}), (2, {"timeout": 60_000_000}))]

    def broken(self, completion):
        raise fault("a fault of the queue")

    monkeypatch.setattr(scheduler.Scheduler, "_settle", broken)
    run.release()
    for sock in (run.first, *waiting):
        assert status_of(sock) == (503, "the engine has stopped")
    for path, wanted in (("ready", 503), ("live", 503)):
        until = time.monotonic() + 5
        while exchange(run.server, "GET", f"/v2/health/{path}")[0] != wanted:
            assert time.monotonic() < until
    status, headers, body = exchange(run.server, "POST", INFER, affine_json(np.zeros((1, 4)), [1]))
    assert (status, headers["retry-after"], json.loads(body)) == (503, "1", {"error": "the engine has stopped"})
    assert run.order() == []
    assert (counted(run.server).failures, counted(run.server).rejected) == (3, 1)


def test_requests_that_left_are_not_run(held):
    run = held()
    for index in range(1, 4):
        run.send(index, waiting=1).close()
        while counted(run.server).cancelled != index:
            pass
    run.send(9, waiting=1)
    run.release()
    assert status_of(run.first)[0] == 200
    assert exchange(run.server, "POST", INFER, affine_json(np.zeros((1, 4)), [5]))[0] == 200
    assert run.order() == [9, 5]


def test_short_sequences_join_longer_ones_and_get_their_own_rows(make_server, monkeypatch):
    monkeypatch.setattr("lepton_xla.serve.server._WARM_UP_S", math.inf)  # no size is timed while requests are counted

    class Even(Tokens):
        """Every run takes the same time, so that one is cheaper than two."""

        def run(self, sizes, arrays):
            time.sleep(0.005)
            return super().run(sizes, arrays)

    tokens = Even()
    server = make_server(tokens)
    answers = {}

    def ask(seq):
        given = {"name": "tokens", "datatype": "INT32", "shape": [1, seq], "data": list(range(1, seq + 1))}
        body = json.dumps({"inputs": [given]}).encode()
        _, headers, answer = exchange(server, "POST", "/v2/models/tokens/infer", body)
        answers[seq] = read_outputs(headers, answer)

    tokens.runs.clear()
    threads = [threading.Thread(target=ask, args=(seq,)) for seq in (8, 3, 7, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    for seq in (8, 3, 7, 4):
        assert answers[seq]["out"].tolist() == [list(range(2, seq + 2))]
        assert answers[seq]["length"].tolist() == [seq]
    assert len(tokens.runs) < 4


class Where(Affine):
    """Takes so long at load, so long afterwards, busy or asleep, and remembers on which threads."""

    def __init__(self, at_load_s, then_s, busy=False):
        super().__init__((1,))
        self.pauses = at_load_s, then_s
        self.busy = busy
        self.threads = []

    def run(self, sizes, arrays):
        x, n = arrays
        pause = self.pauses[bool(n.any())]
        until = time.thread_time() + pause
        while self.busy and time.thread_time() < until:
            pass
        time.sleep(0 if self.busy else pause)
        if n.any():
            self.threads.append(threading.current_thread().name)
        return [2 * x + n[:, None].astype(np.float32), 2 * n]


@pytest.mark.parametrize(
    ("at_load_s", "then_s", "first", "last"),
    [
        (0.0, 0.0, "lepton-serve", "lepton-serve"),
        (0.0, 5e-3, "lepton-serve", "lepton-serve"),  # a busy machine makes it longer than what is short at load
        (0.0, 6e-2, "lepton-serve", "lepton-engine"),
        (2e-2, 0.0, "lepton-engine", "lepton-engine"),
    ],
)
def test_a_batch_that_was_short_at_load_runs_on_the_event_loop_until_it_takes_far_longer(
    make_server, monkeypatch, at_load_s, then_s, first, last
):
    # Room for what a test's machine adds to either.
    monkeypatch.setattr(scheduler, "_SHORT_S", 1e-2)
    monkeypatch.setattr(scheduler, "_SHORT_ON_ONE_CORE_S", 1e-2)
    where = Where(at_load_s, then_s)
    server = make_server(where)
    for _ in range(20):
        assert exchange(server, "POST", INFER, affine_json([[0.0] * 4], [1]))[0] == 200
    assert (where.threads[0], where.threads[-1]) == (first, last)


@pytest.mark.parametrize(
    ("cores", "busy", "thread"),
    [({0}, True, "lepton-serve"), ({0}, False, "lepton-engine"), ({0, 1}, True, "lepton-engine")],
)
def test_where_the_model_has_the_only_core_the_event_loop_runs_batches_of_a_millisecond_too(
    make_server, monkeypatch, cores, busy, thread
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    measure = Engine._measure

    def undisturbed(self, size, key, run, **how):
        times, _ = measure(self, size, key, run, **how)
        return times, sum(times) * busy

    monkeypatch.setattr(Engine, "_measure", undisturbed)
    where = Where(1e-3, 1e-3, busy=busy)
    server = make_server(where)
    for _ in range(3):
        assert exchange(server, "POST", INFER, affine_json([[0.0] * 4], [1]))[0] == 200
    assert set(where.threads) == {thread}


class Told(scheduler.Call, kw_only=True, eq=False):
    """A call that keeps its outputs."""

    outputs: list | None = None

    def finish(self, outputs):
        self.outputs = [bytes(output) for output in outputs]


def test_a_batch_of_one_request_makes_few_calls():
    # At half the capacity of a small model most batches hold one or two requests, and the event loop has little time to
    # spare: some microseconds more in each batch once tripled the p99. Calls are counted, since times vary.
    model = Where(0.0, 0.0)
    signature = signature_of(model)
    here = f"{os.sep}lepton_xla{os.sep}serve{os.sep}"
    made = []

    def saw(frame, event, _):
        if event == "call" and here in frame.f_code.co_filename:
            made.append(frame.f_code.co_qualname)

    async def run():
        costs = {(): dict.fromkeys(signature.bucket_sizes, 1e-5)}
        batcher = Batcher(signature.bucket_sizes, costs=Costs(signature.bucket_sizes, costs), levels=3)
        engine, device, loop = Engine(model, signature), Device(), asyncio.get_running_loop()
        device._loop = loop
        asked = scheduler.Scheduler(signature, batcher, engine, Metrics("affine"), loop, device, levels=3, cores=1)
        asked._longest_s = 60.0  # on the event loop, however busy the machine is
        body = affine_json(np.zeros((1, 4)), [7])
        request = Decoder(signature, Limits(), 8).decode(body, None)
        counts = []
        for _ in range(20):
            call = Told(1, (), time.monotonic(), nbytes=8, request=request)
            made.clear()
            sys.setprofile(saw)
            asked.submit(call)
            await asyncio.sleep(0)
            sys.setprofile(None)
            assert np.frombuffer(call.outputs[1], np.int32) == [14]
            counts.append(len(made))
        return counts

    counts = asyncio.run(run())
    assert set(counts[1:]) == {counts[-1]}, made
    assert counts[-1] <= 42, made
