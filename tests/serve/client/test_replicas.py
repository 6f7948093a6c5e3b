"""Clients of several servers: the policy on a clock of the test's own, and both clients against faulty servers."""

import asyncio
import heapq
import random
import socket
import threading
import time

import numpy as np
import pytest
from serve_fakes import Affine, Scripted, raw_answer

from lepton_xla.errors import ServeError
from lepton_xla.serve.client import (
    AsyncClient,
    Client,
    DeadlineError,
    RequestError,
    async_client,
    sync_client,
    transport,
)
from lepton_xla.serve.client.endpoint import endpoint
from lepton_xla.serve.client.replicas import FAILURES, LONGEST_REST_S, SLOW_ANSWERS, Replicas
from lepton_xla.serve.client.repository import RepositoryClient

SEVEN = b'{"outputs": [{"name": "y", "datatype": "INT32", "shape": [1], "data": [7]}]}'
GOOD = raw_answer(200, SEVEN)
FULL = raw_answer(503, b'{"error": "full"}', {"Retry-After": "30"})


@pytest.fixture(autouse=True)
def _same_draws():
    """What is drawn between equal replicas is the same in each run."""
    random.seed(7)


class Fleet:
    """Replicas on a clock that stands still unless it is moved."""

    def __init__(self, count):
        self.now = 100.0
        self.replicas = Replicas([endpoint(f"http://r{number}") for number in range(count)], lambda: self.now)
        self.all = self.replicas.all

    def ask(self, replica=None, seconds=0.01, kind="k"):
        """One request from beginning to end; its replica. Without seconds it fails."""
        taken = self.replicas.take([each for each in self.all if replica not in (None, each)])
        began, self.now = self.now, self.now + (seconds or 0.01)
        self.replicas.ended(taken)
        if seconds is None:
            self.replicas.failed(taken, began, certain=False)
        else:
            self.replicas.answered(taken, began, seconds, kind)
        return taken

    def simulate(self, service, clients, count):
        """So many clients, each asks as soon as it is answered: the latencies, and how many each replica was given."""
        latencies, given, due = [], [0] * len(self.all), []
        order = iter(range(10**9))

        def send():
            taken = self.replicas.take()
            number = self.all.index(taken)
            given[number] += 1
            seconds, kind = service(number)
            heapq.heappush(due, (self.now + seconds, next(order), taken, self.now, seconds, kind))

        for _ in range(clients):
            send()
        while len(latencies) < count:
            self.now, _, taken, began, seconds, kind = heapq.heappop(due)
            self.replicas.ended(taken)
            self.replicas.answered(taken, began, seconds, kind)
            latencies.append(seconds)
            send()
        for _, _, taken, *_ in due:
            self.replicas.ended(taken)
        return latencies, given


def test_the_one_with_the_fewest_unanswered_requests_is_asked():
    fleet, source = Fleet(4), random.Random(0)
    out = []
    for _ in range(2000):
        if out and source.random() < 0.5:
            fleet.replicas.ended(out.pop(source.randrange(len(out))))
        else:
            least = min(each.outstanding for each in fleet.all)
            out.append(fleet.replicas.take())
            assert out[-1].outstanding == least + 1
    assert sum(each.outstanding for each in fleet.all) == len(out)


def test_idle_replicas_share_the_requests():
    fleet = Fleet(3)
    counts = [sum(fleet.ask() is each for _ in range(600)) for each in fleet.all]
    assert all(120 < count < 280 for count in counts), counts


@pytest.mark.parametrize(("certain", "needed"), [(False, FAILURES), (True, 1)])
def test_a_replica_that_fails_rests_and_each_rest_is_twice_as_long(certain, needed):
    fleet = Fleet(2)
    bad, good = fleet.all
    for _ in range(needed):
        assert not bad.resting
        fleet.replicas.failed(bad, fleet.now, certain=certain)
    expected = 1.0
    for _ in range(9):
        rest = bad.until - fleet.now
        assert 0.75 * expected <= rest <= 1.25 * expected
        assert all(fleet.ask(seconds=1e-6) is good for _ in range(50))
        fleet.now = bad.until
        first, second = fleet.replicas.take(), fleet.replicas.take()
        assert (first, second) == (bad, good), "one request tells whether it is well, the others do not wait for that"
        for each in (first, second):
            fleet.replicas.ended(each)
        fleet.replicas.failed(bad, fleet.now, certain=False)
        expected = min(LONGEST_REST_S, 2 * expected)
    fleet.now = bad.until
    assert fleet.ask(seconds=1e-6) is bad
    assert not bad.resting
    fleet.now += LONGEST_REST_S + 1
    fleet.replicas.failed(bad, fleet.now, certain=True)
    assert bad.until - fleet.now <= 1.25, "what was well for long begins anew"


def test_failures_that_are_not_in_a_row_are_forgiven():
    fleet = Fleet(2)
    for _ in range(20):
        for _ in range(FAILURES - 1):
            fleet.ask(fleet.all[0], seconds=None)
        fleet.ask(fleet.all[0])
    assert not fleet.all[0].resting


def test_what_was_sent_before_a_rest_neither_ends_nor_prolongs_it():
    fleet = Fleet(2)
    bad = fleet.all[0]
    before = fleet.now
    fleet.now += 1
    fleet.replicas.failed(bad, fleet.now, certain=True)
    until = bad.until
    for _ in range(5):
        fleet.replicas.failed(bad, before, certain=True)
    fleet.replicas.answered(bad, before, 0.01, "k")
    assert bad.resting
    assert bad.until == until


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("clients", [1, 4, 16])
def test_with_one_replica_five_times_slower_hardly_a_request_waits_for_it(count, clients):
    """Exponential around two thirds fixed, so that fast answers are often slower than slow ones are fast."""
    fleet, source = Fleet(count), random.Random(count * clients)

    def service(number):
        return (5.0 if number == 0 else 1.0) * 0.01 * (0.67 + 0.33 * source.expovariate(1)), "k"

    alone = sorted(service(1)[0] for _ in range(10_000))
    latencies, given = fleet.simulate(service, clients, 10_000)
    latencies.sort()
    assert latencies[9_900] <= 1.5 * alone[9_900]
    assert SLOW_ANSWERS <= given[0] < 100
    assert min(given[1:]) > 0.8 * 10_000 / count


def test_a_replica_that_is_fast_again_is_used_again():
    fleet, slow_until = Fleet(2), 130.0
    _, given = fleet.simulate(lambda number: (0.05 if number == 0 and fleet.now < slow_until else 0.01, "k"), 4, 8000)
    assert fleet.now < slow_until
    assert given[0] < 100
    fleet.now = 190.0
    _, given = fleet.simulate(lambda number: (0.01, "k"), 4, 1000)
    assert 300 < given[0] < 700


def test_equal_replicas_are_not_taken_for_slow():
    """Neither where times vary as much as those of a queue, nor where one request in five takes 30 times as long."""
    for kinds in (lambda source: ("k", 1.0), lambda source: ("big", 30.0) if source.random() < 0.2 else ("small", 1.0)):
        fleet, source = Fleet(3), random.Random(7)

        def service(number, kinds=kinds, fleet=fleet, source=source):
            assert not any(each.resting for each in fleet.all)
            kind, factor = kinds(source)
            return factor * 0.01 * (0.5 + 0.5 * source.expovariate(1)), kind

        fleet.simulate(service, 8, 20_000)


def test_when_everything_gets_slower_nobody_is_to_blame():
    fleet = Fleet(3)
    fleet.simulate(lambda number: (0.01, "k"), 6, 500)
    fleet.simulate(lambda number: (0.2, "k"), 6, 500)
    assert not any(each.resting for each in fleet.all)


@pytest.mark.parametrize(("slow", "rest"), [(1, True), (2, True), (3, False)])
def test_no_more_than_half_of_the_replicas_are_slow(slow, rest):
    """Else the few that are left would get it all, and one that is fast because it refuses would get it first."""
    fleet = Fleet(4)
    _, given = fleet.simulate(lambda number: (0.05 if number < slow else 0.01, "k"), 8, 6000)
    assert [each.rests > 0 for each in fleet.all] == [rest] * slow + [False] * (4 - slow)
    assert (sum(given[:slow]) < 100 * slow) == rest


def test_a_busy_replica_is_left_alone_for_as_long_as_it_asks():
    fleet = Fleet(2)
    busy, other = fleet.all
    fleet.replicas.busy(busy, 5.0)
    assert all(fleet.ask() is other for _ in range(50))
    assert not fleet.replicas.has_other([other])
    fleet.now += 5
    assert fleet.replicas.has_other([other])
    assert busy in {fleet.ask() for _ in range(50)}
    assert busy.rests == 0


def test_if_none_is_well_a_slow_one_is_better_than_one_that_fails():
    fleet = Fleet(2)
    slow, dead = fleet.all
    for _ in range(20):
        fleet.ask(dead)
        fleet.ask(slow, seconds=1.0)
    assert slow.resting
    fleet.replicas.failed(dead, fleet.now, certain=True)
    slow.until = fleet.now + 50
    assert fleet.replicas.has_other([dead])
    assert fleet.ask(seconds=1.0) is slow


def test_one_url_is_not_watched():
    fleet = Fleet(1)
    for _ in range(10):
        fleet.ask(seconds=None)
    only = fleet.all[0]
    assert (only.outstanding, only.failures, only.resting) == (0, 0, False)


@pytest.mark.parametrize("urls", [[], ["http://a", "http://a"], ["http://a:80", "a"], ["http://a", "ftp://b"]])
def test_urls_that_are_none_or_the_same(urls):
    with pytest.raises(ServeError, match="URL"):
        Client(urls)


# Both clients, against servers.


def blocking(urls, method, *args, options=None, **kwargs):
    with Client(urls, **(options or {})) as client:
        return getattr(client, method)(*args, **kwargs)


def awaited(urls, method, *args, options=None, **kwargs):
    async def main():
        async with AsyncClient(urls, **(options or {})) as client:
            return await getattr(client, method)(*args, **kwargs)

    return asyncio.run(main())


@pytest.fixture(params=[blocking, awaited])
def ask(request):
    """Calls one method of a client, blocking or asynchronous."""
    return request.param


@pytest.fixture
def in_order(monkeypatch):
    """Of equal replicas the first is asked."""
    monkeypatch.setattr("lepton_xla.serve.client.replicas.random.random", lambda: 0.0)


@pytest.fixture
def impatient(monkeypatch):
    for module in (transport, sync_client, async_client):
        monkeypatch.setattr(module, "PATIENCE_S", 0.1)


def nobody():
    """A URL where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_requests_go_to_all_and_name_the_one_they_go_to():
    with Scripted(GOOD) as first, Scripted(GOOD) as second, Client([first.url, second.url], model="m") as client:
        for _ in range(40):
            assert client.infer(x=[1.0])["y"] == [7]
        for server in (first, second):
            assert len(server.requests) > 5
            assert server.connections == 1
            assert all(f"Host: {server.url[7:]}\r\n".encode() in head + b"\r\n" for head, _ in server.requests)
        assert client.url == f"{first.url}, {second.url}"


def test_those_that_are_not_there_cost_neither_attempts_nor_delays(ask, in_order):
    with Scripted(GOOD) as server:
        started = time.monotonic()
        options = {"retries": 0, "model": "m"}
        assert ask([nobody(), nobody(), nobody(), server.url], "infer", x=[1.0], options=options)["y"] == [7]
        assert ask([nobody(), server.url], "live") is True
        assert time.monotonic() - started < 1


def test_what_one_is_too_busy_for_another_is_asked_at_once(ask, in_order):
    with Scripted(FULL) as full, Scripted(GOOD) as server:
        assert ask([full.url, server.url], "infer", "m", x=[1.0], options={"retries": 0, "timeout_s": 5})["y"] == [7]
        assert len(full.requests) == 1
        with pytest.raises(RequestError, match="full"):
            ask([full.url], "infer", "m", x=[1.0], options={"retries": 1, "timeout_s": 5})


def test_if_all_are_busy_the_last_word_is_theirs(ask):
    with Scripted(FULL) as first, Scripted(FULL) as second, pytest.raises(RequestError, match="full") as caught:
        ask([first.url, second.url], "infer", "m", x=[1.0], options={"timeout_s": 5})
    assert caught.value.status == 503
    assert len(first.requests) == len(second.requests) == 1


def test_what_fails_inside_is_asked_of_one_other_only(ask, in_order):
    """A request that breaks every server that runs it must not reach all of them."""
    broken = raw_answer(500, b'{"error": "inference failed"}')
    with Scripted(broken) as first, Scripted(GOOD) as second:
        assert ask([first.url, second.url], "infer", "m", x=[1.0])["y"] == [7]
    servers = [Scripted(broken) for _ in range(4)]
    with servers[0], servers[1], servers[2], servers[3]:
        with pytest.raises(RequestError, match="inference failed"):
            ask([server.url for server in servers], "infer", "m", x=[1.0])
        assert sum(len(server.requests) for server in servers) == 2


def test_a_request_that_kills_servers_reaches_no_more_than_it_may(ask, in_order):
    servers = [Scripted(None) for _ in range(6)]
    with servers[0], servers[1], servers[2], servers[3], servers[4], servers[5]:
        with pytest.raises(RequestError, match="no answer after 4 attempts"):
            ask([server.url for server in servers], "infer", "m", x=[1.0], options={"retries": 3})
        assert sum(len(server.requests) for server in servers) == 4


def test_bad_requests_are_nobodys_failure(ask, in_order):
    wrong = raw_answer(400, b'{"error": "no such input"}')
    with Scripted(wrong) as first, Scripted(GOOD) as second:
        with pytest.raises(RequestError, match="no such input"):
            ask([first.url, second.url], "infer", "m", x=[1.0])
        assert len(second.requests) == 0


def test_a_server_that_stops_answering_is_left_for_another(ask, in_order, impatient):
    with Scripted(lambda sock: None) as stalled, Scripted(GOOD) as server:
        started = time.monotonic()
        assert ask([stalled.url, server.url], "infer", "m", x=[1.0], options={"timeout_s": 20})["y"] == [7]
        assert 0.15 < time.monotonic() - started < 5
        assert b"/v2/health/live" in stalled.requests[1][0]


def test_a_server_that_takes_long_and_is_alive_is_waited_for(ask, in_order, impatient, make_server):
    """Its requests are not sent twice: another server would take as long."""
    affine = Affine()
    server = make_server(affine)
    affine.gate.clear()
    threading.Timer(0.6, affine.gate.set).start()
    x, n = np.ones((1, 4), np.float32), np.ones(1, np.int32)
    with Scripted(GOOD) as other:
        outputs = ask([server.url, other.url], "infer", "affine", x=x, n=n)
        assert len(other.requests) == 0
    np.testing.assert_array_equal(outputs["y"], 3 * x)


def test_a_deadline_is_one_for_several_too(ask, impatient):
    stall = lambda sock: None  # noqa: E731
    with Scripted(stall) as first, Scripted(stall) as second:
        started = time.monotonic()
        with pytest.raises(DeadlineError, match=r"no answer within 0\.15 s"):
            ask([first.url, second.url], "infer", "m", x=[1.0], timeout_s=0.15)
        assert time.monotonic() - started < 2


def test_a_server_that_dies_and_returns(in_order):
    """Among requests of eight threads none is lost, and the one that returns is used again."""
    with Scripted(GOOD) as stays:
        dying = Scripted(*[GOOD] * 20, None)
        with Client([dying.url, stays.url], model="m", retries=3) as client:

            def work():
                for _ in range(40):
                    assert client.infer(x=[1.0])["y"] == [7]

            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            bad = client._replicas.all[0]
            assert bad.resting
            assert bad.outstanding == client._replicas.all[1].outstanding == 0
            dying._script[:] = [GOOD]
            bad.until = 0.0
            for _ in range(20):
                client.infer(x=[1.0])
            assert not bad.resting
        dying.__exit__()


def test_feedback_goes_to_the_server_that_answered(ask):
    unknown = raw_answer(404, b'{"error": "no such request"}')
    known = raw_answer(200, b'{"rows": 1}')
    with Scripted(unknown) as first, Scripted(unknown, known) as second:
        urls = [first.url, nobody(), second.url]
        with pytest.raises(RequestError, match="Connection refused"):
            ask(urls, "feedback", "m", {"a": 1}, options={"retries": 0})
        assert ask(urls, "feedback", "m", {"b": 1, "c": 2}, options={"retries": 0}) == 2
        assert [body for _, body in second.requests[1:]] == [
            b'{"feedback":[{"id":"b","label":1}]}',
            b'{"feedback":[{"id":"c","label":2}]}',
        ]
        with pytest.raises(RequestError, match="no such request"):
            ask([first.url, first.url + "/x"], "feedback", "m", {"a": 1})


def test_a_repository_is_changed_on_one_server():
    with pytest.raises(ServeError, match="several are given"):
        RepositoryClient(["http://a", "http://b"])
