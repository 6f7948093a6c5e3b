"""One device among several models: turns on the event loop and on the thread, made-up and real ones."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest
from serve_fakes import Affine, affine_json, connect, exchange, raw_request, read_response, wait_rows

import lepton_xla as lx
from lepton_xla.errors import ServeError
from lepton_xla.serve import Client, Options, Server
from lepton_xla.serve.batching import scheduler
from lepton_xla.serve.batching.device import Device
from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.models.settings import Serving
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.server import open_model


class Loop:
    """Calls back when the test says; `turns` are those of the loop."""

    def __init__(self):
        self.calls = []
        self.turns = 0

    def call_soon(self, function, *args):
        self.calls.append((function, args))

    call_soon_threadsafe = call_soon

    def run(self, turns=1):
        for _ in range(turns):
            calls, self.calls = self.calls, []
            self.turns += bool(calls)
            for function, args in calls:
                function(*args)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Member:
    """A model that always has work, of batches that take this long on a made-up clock."""

    def __init__(self, name, device, clock, log, seconds, weight=1.0):
        self.device, self.clock, self.log, self.name, self.seconds = device, clock, log, name, seconds
        self.ended = threading.Event()
        self.share = device.join(self.turn, self.ended.set, weight, short=True)

    def turn(self, on_loop):
        assert on_loop
        self.clock.now += self.seconds
        self.log.append(self.name)
        self.device.ask_again(self.share)
        return self.seconds


def test_short_batches_of_several_models_share_the_event_loop_by_time():
    loop, clock, log = Loop(), Clock(), []
    device = Device(clock)
    device.start(loop)
    members = [Member(*args) for args in (
        ("A", device, clock, log, 1e-4), ("B", device, clock, log, 3e-4), ("C", device, clock, log, 1e-4, 2.0),
    )]  # fmt: skip
    for member in members:
        device.ask(member.share)
    assert not log  # after the sockets that are readable now
    loop.run(2000)
    device.stop()
    used = np.array([member.share.used_s for member in members])
    np.testing.assert_allclose(used / used.sum(), [0.25, 0.25, 0.5], atol=0.01)
    # The sockets are looked at again after at most a quarter of a millisecond and one batch.
    assert clock.now / loop.turns <= 2.5e-4 + 3e-4
    assert len(log) > loop.turns


def test_one_model_has_one_batch_between_two_looks_at_the_sockets():
    loop, clock, log = Loop(), Clock(), []
    device = Device(clock)
    device.start(loop)
    device.ask(Member("A", device, clock, log, 1e-6).share)
    loop.run(5)
    device.stop()
    assert len(log) == 5


@pytest.mark.parametrize(
    ("arrivals_s", "full", "gathered"),
    [((0, 0, 0), False, 5), ((2e-4, 2e-4, 0), False, 4), ((3e-4, 0, 0), False, 3), ((0, 0, 0), True, 2)],
)
def test_models_that_begin_to_wait_one_by_one_are_gathered_for_a_while(arrivals_s, full, gathered):
    """Their requests would be a batch each; for how long is bounded, and neither one model nor full batches wait."""
    loop, clock, log = Loop(), Clock(), []
    device = Device(clock)
    device.start(loop)
    first, *others = (Member(name, device, clock, log, 1e-6) for name in "ABCDE")
    device.ask(first.share, full=full)
    device.ask(others[0].share, full=full)
    for member, seconds in zip(others[1:], arrivals_s, strict=True):
        loop.run()
        if log:
            break
        clock.now += seconds
        device.ask(member.share, full=full)
    while not log:
        loop.run()
    device.stop()
    assert sorted(set(log)) == list("ABCDE")[:gathered]


def test_a_fault_in_one_model_ends_that_one_and_others_go_on(caplog):
    loop, clock, log = Loop(), Clock(), []
    device = Device(clock)
    device.start(loop)
    good, bad = Member("good", device, clock, log, 1e-4), Member("bad", device, clock, log, 1e-4)
    good.share.short = bad.share.short = False
    bad.share.turn = lambda on_loop: 1 / 0
    device.ask(bad.share)
    device.ask(good.share)
    loop.run(4)
    assert bad.ended.is_set()
    assert not good.ended.is_set()
    device.stop()
    assert log == ["good"] * 3
    device.ask(bad.share)
    assert not bad.share.waiting
    assert "the engine has failed" in caplog.text


async def on_device(*works, weight=1.0):
    """Runs functions as guests of a device, each on a thread of its own; gives what they raise."""
    device = Device()
    device.start(asyncio.get_running_loop())

    def guest(work):
        with device.guest(weight) as run:
            run(work)

    try:
        return await asyncio.gather(*(asyncio.to_thread(guest, work) for work in works), return_exceptions=True)
    finally:
        assert device.stop(5.0)


def test_guests_run_on_the_thread_one_at_a_time_and_get_what_they_raise():
    running, seen = threading.Lock(), []

    def work():
        assert running.acquire(blocking=False)
        time.sleep(0.01)
        seen.append(threading.current_thread().name)
        running.release()

    def broken():
        raise KeyError("broken")

    results = asyncio.run(on_device(work, broken, work))
    assert [type(result) for result in results] == [type(None), KeyError, type(None)]
    assert seen == ["lepton-engine"] * 2


def test_a_guest_of_a_device_that_stops_is_told():
    async def main():
        device = Device()
        device.start(asyncio.get_running_loop())
        gate = threading.Event()

        def guest():
            with device.guest(1.0) as run:
                run(gate.wait)

        first, second = (asyncio.create_task(asyncio.to_thread(guest)) for _ in range(2))
        await asyncio.sleep(0.05)
        stopping = asyncio.create_task(asyncio.to_thread(device.stop, 5.0))
        await asyncio.sleep(0.05)
        gate.set()
        assert await stopping
        return await asyncio.gather(first, second, return_exceptions=True)

    results = asyncio.run(main())
    assert sorted(type(result).__name__ for result in results) == ["NoneType", "ServeError"]
    assert isinstance(next(filter(None, results)), ServeError)


# With real models.


def put(server, servable, **options):
    """Has a running server answer for a further model, warmed up beside those that it has; gives its handle."""

    async def make():
        signature = signature_of(servable)
        engine = Engine(servable, signature)

        def warm_up():
            with server.devices[0].guest(1.0) as run:
                return engine.warm_up(run)

        measured = await asyncio.to_thread(warm_up)
        handle = open_model(engine, measured, signature, server.options, server.metrics, server.devices[0], **options)
        server.models.put(handle)
        return handle

    return asyncio.run_coroutine_threadsafe(make(), server._loop).result(30)


def linear(name, factor, width=4):
    program = lx.trace(
        lambda w, x: x @ w["w"], {"w": factor * np.eye(width, dtype=np.float32)},
        {"x": lx.TensorSpec(("batch", width), "float32")},
    )  # fmt: skip
    return lx.compile(program, {"batch": (1, 8)}, name=name).servable()


def test_two_models_of_one_server_answer_each_for_itself_and_are_charged_for_it():
    rng = np.random.default_rng(3)
    with Server(linear("double", 2.0), Options(port=0)) as server:
        other = put(server, linear("triple", 3.0, 6))
        first = next(iter(server.models))
        wrong = []

        def ask(name, factor, width):
            with Client(server.url) as client:
                for _ in range(50):
                    x = rng.normal(size=(3, width)).astype(np.float32)
                    if not np.array_equal(client.infer(name, x=x)["output"], np.float32(factor) * x):
                        wrong.append(name)

        threads = [threading.Thread(target=ask, args=args) for args in (("double", 2, 4), ("triple", 3, 6)) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert first.scheduler.share.turns >= 50
        assert other.scheduler.share.turns >= 50
        assert other.scheduler.share.used_s > 0


def test_the_limits_of_one_model_are_not_those_of_another(server):
    put(server, linear("rated", 1.0), serving=Serving(rate=0.01))
    narrow = Named("narrow", 0.0)
    put(server, narrow, serving=Serving(max_concurrency=2))
    with Client(server.url) as client:
        assert client.infer("rated", x=np.ones((1, 4), np.float32))["output"].sum() == 4
    x = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
    status, headers, answer = exchange(
        server, "POST", "/v2/models/rated/infer", json.dumps({"inputs": [x]}).encode()
    )  # fmt: skip
    assert (status, json.loads(answer)["error"]) == (429, "too many requests to this model")
    assert 90 < int(headers["retry-after"]) <= 100
    path, body, bad = "/v2/models/narrow/infer", affine_json([[0.0] * 4], [1]), affine_json([[0.0] * 4], [-1])
    late = affine_json([[0.0] * 4], [1], parameters={"timeout": 50_000})
    # Whatever becomes of a request, it is under way no longer: answered, failed, split, too late, its client gone.
    for _ in range(3):
        assert exchange(server, "POST", path, bad)[0] == 500
        assert exchange(server, "POST", path, affine_json(np.zeros((5, 4)), [1] * 5))[0] == 200
        narrow.gate.clear()
        narrow.running.clear()
        with connect(server) as gone, connect(server) as other:
            gone.sendall(raw_request("POST", path, body))
            assert narrow.running.wait(5)
            other.sendall(raw_request("POST", path, late))
            assert read_response(other)[0] == 504
            other.sendall(raw_request("POST", path, body))
            wait_rows(server, 1, "narrow")
            status, headers, answer = exchange(server, "POST", path, body)
            assert (status, json.loads(answer)["error"]) == (503, "too many requests to this model are under way")
            assert int(headers["retry-after"]) >= 1
            gone.close()
            narrow.gate.set()
            assert read_response(other)[0] == 200
        until = time.monotonic() + 5
        while exchange(server, "POST", path, body)[0] == 503:  # the server has not seen yet that a client has gone
            assert time.monotonic() < until
    assert exchange(server, "POST", "/v2/models/affine/infer", body)[0] == 200


class Named(Affine):
    """`Affine` under another name, whose batches take so long."""

    def __init__(self, name, seconds):
        super().__init__((1, 2))
        self.name, self.seconds, self.where = name, seconds, set()

    def run(self, sizes, arrays):
        time.sleep(self.seconds)
        self.where.add(threading.current_thread().name)
        return super().run(sizes, arrays)


@pytest.mark.parametrize(("seconds", "where"), [(0.0, {"lepton-serve", "lepton-engine"}), (2e-3, {"lepton-engine"})])
def test_a_model_beside_one_whose_queue_is_never_empty_waits_for_one_of_its_batches(
    make_server, monkeypatch, seconds, where
):
    monkeypatch.setattr(scheduler, "_SHORT_S", 1e-3)
    monkeypatch.setattr(scheduler, "_SHORT_ON_ONE_CORE_S", 1e-3)
    slow, quick = Named("slow", 0.02), Named("quick", seconds)
    server = make_server(slow)
    put(server, quick)
    quick.where.clear()
    body = affine_json(np.zeros((1, 4)), [1])
    stop, answers = threading.Event(), []

    def flood():
        with connect(server) as sock:
            while not stop.is_set():
                sock.sendall(raw_request("POST", "/v2/models/slow/infer", body))
                answers.append(read_response(sock)[0])

    threads = [threading.Thread(target=flood) for _ in range(12)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 10
    while not slow.seen and time.monotonic() < until:
        time.sleep(0.01)
    waits = []
    for _ in range(20):
        began = time.monotonic()
        assert exchange(server, "POST", "/v2/models/quick/infer", body)[0] == 200
        waits.append(time.monotonic() - began)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(answers) == {200}
    # Behind all 12 requests of the other's, in batches of two, it would take 100 ms or more.
    assert np.median(waits) < 0.05
    assert quick.where <= where
