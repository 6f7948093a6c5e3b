"""The load generator against servers whose delays, stalls and refusals are known. Nothing here depends on speed."""

import asyncio
import threading
import time

import numpy as np
import pytest
import scipy.stats
from serve_fakes import raw_answer

from lepton_xla.errors import ServeError
from lepton_xla.serve.client.endpoint import endpoint
from lepton_xla.serve.load import generator as generator_module
from lepton_xla.serve.load.generator import generate
from lepton_xla.serve.load.result import BROKEN, NO_CONNECTION, TIMED_OUT, Load, Result

BODY = (b"x" * 100,)
OK, BUSY = raw_answer(200, b"y" * 50), raw_answer(503, b"{}")


class Known:
    """A server on a thread of its own: answers each request after `delay_s`, with the answers in turn.

    An answer of None closes the connection. `stall(s)` stops the whole server for so long, from its next request on.
    """

    def __init__(self, *answers, delay_s=0.0):
        self.answers = answers or (OK,)
        self.delay_s = delay_s
        self.requests = self.connections = self.in_flight = self.most_in_flight = 0
        self.stall_s, self.stalled = 0.0, None
        self.open = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._ready.wait(10)
        self.target = endpoint(f"http://127.0.0.1:{self.port}")
        self.request = self.target.request("POST", "/v2/models/m/infer", BODY)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _main(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(lambda: _Known(self), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for transport in tuple(self.open):
            transport.abort()
        while self.open:
            await asyncio.sleep(0.001)


class _Known(asyncio.Protocol):
    def __init__(self, server):
        self.server, self.received = server, 0
        server.connections += 1

    def connection_made(self, transport):
        self.transport = transport
        self.server.open.add(transport)

    def connection_lost(self, exc):
        self.server.open.discard(self.transport)

    def data_received(self, data):
        server = self.server
        self.received += len(data)
        assert self.received <= len(server.request), "a second request before the first has its answer"
        if self.received < len(server.request):
            return
        self.received = 0
        server.requests += 1
        server.in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server.in_flight)
        if server.stall_s:
            began = time.monotonic()
            time.sleep(server.stall_s)
            server.stalled, server.stall_s = (began, time.monotonic()), 0.0
        answer = server.answers[(server.requests - 1) % len(server.answers)]
        asyncio.get_running_loop().call_later(server.delay_s, self.answer, answer)

    def answer(self, answer):
        self.server.in_flight -= 1
        if self.transport.is_closing():
            return
        if answer is None:
            self.transport.close()
        elif answer:
            self.transport.write(answer)
            if b"Connection: close" in answer:
                self.transport.close()


def load(rate=None, connections=100, seconds=0.5, warmup_s=0.1, timeout_s=5.0):
    return Load(rate, connections, seconds, warmup_s, timeout_s)


def test_latency_is_at_least_the_delay_and_every_request_is_counted():
    with Known(delay_s=0.03) as server:
        result = generate(server.target, server.request, load(rate=400.0))
    assert result.counts == {"200": len(result.status)}
    assert result.errors == 0
    assert server.requests >= len(result.status) > 120  # 200 are expected, with a deviation of 14
    assert len(result.due_s) == len(result.latency_s) == len(result.lag_s) == len(result.status)
    assert result.latency_s.min() >= 0.03
    assert ((result.due_s >= 0) & (result.due_s < 0.5)).all()
    assert (result.lag_s >= 0).all()
    assert result.seconds == 0.5
    assert result.good == result.answered > 0
    assert 1 < result.most_connections == server.connections <= 100


def test_requests_that_become_due_during_a_stall_are_late():
    """With two connections nearly none of them could be sent meanwhile; each is late until the stall ends all the same.

    A generator that counts from sending, or that waits with the next request, has two late requests here.
    """
    with Known() as server:

        def watch(generator):
            if server.stalled is None and time.monotonic() > generator.began:
                server.stall_s = 0.4
            seen["began"] = generator.began

        seen = {}
        slow = load(rate=500.0, connections=2, seconds=1.5)
        result = _generate_watched(server, slow, watch)
        began, ended = (moment - seen["began"] for moment in server.stalled)
    late = (result.due_s > began) & (result.due_s < ended)
    assert late.sum() > 120  # 200 are expected
    assert (result.due_s[late] + result.latency_s[late] >= ended).all()
    assert result.latency_s[late].max() > 0.3
    assert server.most_in_flight <= 2
    assert result.errors == 0
    assert result.percentiles()["p90"] > 0.1


def _generate_watched(server, wanted, watch):
    """As `generate`, looking more often."""

    async def main():
        return await generator_module.Generator(server.target, server.request, wanted).run(watch, 0.05)

    return asyncio.run(main())  # asyncio's own loop will do too


def test_arrivals_are_a_poisson_process(monkeypatch):
    """Gaps are exponential, also where one block of them ends, and whatever the machine does meanwhile."""
    monkeypatch.setattr(generator_module, "_BLOCK", 37)
    with Known() as server:
        result = generate(server.target, server.request, load(rate=1000.0, seconds=1.0, warmup_s=0.0))
    gaps = np.diff(np.sort(result.due_s))
    assert len(gaps) == pytest.approx(1000, abs=120)
    assert scipy.stats.kstest(gaps, "expon", args=(0, 1e-3)).pvalue > 0.01
    # They are those that were drawn: a generator that is late does not ask for less.
    np.testing.assert_allclose(gaps, np.random.default_rng(0).exponential(1e-3, len(gaps) + 1)[1:], atol=1e-8)


def test_refusals_are_counted_and_do_not_make_it_look_fast():
    with Known(OK, BUSY, BUSY) as server:
        result = generate(server.target, server.request, load(rate=300.0, warmup_s=0.0))
    assert set(result.counts) == {"200", "503"}
    assert result.errors == result.counts["503"] == pytest.approx(2 / 3 * len(result.status), abs=1)
    assert result.good == pytest.approx(result.answered / 3, abs=1)
    assert result.counted.sum() == result.counts["200"]


def test_what_is_never_answered_is_given_up():
    with Known(b"") as server:
        result = generate(server.target, server.request, load(rate=100.0, connections=5, seconds=0.3, timeout_s=0.2))
    assert result.counts == {"timeout": len(result.status)}
    assert len(result.status) > 5
    assert (result.latency_s >= 0.2).all()
    assert result.percentiles()["p50"] >= 0.2
    assert result.good == result.answered == 0


@pytest.mark.parametrize("rate", [200.0, None])
def test_connections_that_break(rate):
    with Known(OK, None) as server:
        result = generate(server.target, server.request, load(rate=rate, connections=3, seconds=0.3))
    assert result.counts["connection broken"] > 1
    assert result.counts["200"] > 1
    assert set(result.counts) == {"200", "connection broken"}


@pytest.mark.parametrize("rate", [200.0, None])
def test_nobody_there(rate):
    with Known() as server:
        target, request = server.target, server.request
    result = generate(target, request, load(rate=rate, connections=3, seconds=0.3))
    assert set(result.counts) == {"no connection"}
    assert np.isnan(result.percentiles()["p99"])
    assert result.to_json()["answered_per_s"] == 0


def test_an_answer_that_is_not_http():
    with Known(b"SSH-2.0\r\n\r\n") as server:
        result = generate(server.target, server.request, load(rate=100.0, seconds=0.2))
    assert set(result.counts) == {"connection broken"}


def test_a_server_that_closes_after_each_answer():
    with Known(OK.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)) as server:
        result = generate(server.target, server.request, load(rate=200.0, connections=3, seconds=0.3))
        assert server.connections >= len(result.status) > 20
    assert result.errors == 0


def test_the_closed_loop_asks_again_once_it_has_its_answer():
    with Known(delay_s=0.01) as server:
        result = generate(server.target, server.request, load(connections=7))
        assert (server.connections, server.most_in_flight) == (7, 7)
        assert server.requests >= len(result.status)
    assert len(result.status) <= 7 * 0.5 / 0.01 + 7
    assert result.latency_s.min() >= 0.01
    assert result.errors == 0
    assert result.to_json()["connections"] == 7


def test_the_closed_loop_goes_on_after_timeouts():
    with Known(b"", OK, OK, OK) as server:
        result = generate(server.target, server.request, load(connections=2, seconds=0.5, timeout_s=0.05))
    assert result.counts["timeout"] > 1
    assert result.counts["200"] > result.counts["timeout"]


def test_a_load_that_is_stopped():
    with Known() as server:
        result = _generate_watched(server, load(rate=200.0, seconds=60), lambda generator: generator.stop())
    assert result.seconds < 30
    assert result.errors == 0


def test_percentiles_are_latencies_that_were_measured():
    """The nearest rank: the smallest latency that at least so many requests do not exceed."""
    random = np.random.default_rng(0)
    latency_s = random.permutation(np.arange(1, 2001) / 1000)
    status = np.full(2000, 200)
    status[latency_s > 1.999] = TIMED_OUT
    refused = np.full(500, 503)
    result = Result(
        load=load(rate=1.0),
        seconds=2.0,
        due_s=np.zeros(2500),
        latency_s=np.concatenate([latency_s, np.full(500, 1e-6)]),
        status=np.concatenate([status, refused]),
        lag_s=np.array([0.5]),
        answered=2499,
        good=1999,
        most_connections=1,
        cores=0.0,
    )
    assert result.percentiles() == {"p50": 1.0, "p90": 1.8, "p99": 1.98, "p99.9": 1.998, "max": 2.0}
    document = result.to_json()
    assert document["counts"] == {"timeout": 1, "200": 1999, "503": 500}
    assert (document["errors"], document["goodput_per_s"]) == (501, 999.5)
    assert document["send_lag_s"]["p99"] == 0.5
    assert {NO_CONNECTION, BROKEN, TIMED_OUT} == {-1, -2, -3}


@pytest.mark.parametrize(
    "changes", [{"rate": 0.0}, {"rate": 1e7}, {"connections": 0}, {"seconds": 0}, {"warmup_s": -1}, {"timeout_s": 0}]
)
def test_a_load_that_cannot_be(changes):
    with pytest.raises(ServeError):
        load(**changes)
