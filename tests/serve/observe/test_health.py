"""When a server says that it is ready, and when that it is live."""

import dataclasses
import time

import numpy as np
import pytest
from serve_fakes import Affine, affine_binary, exchange

from lepton_xla.serve.observe.health import Health
from lepton_xla.serve.observe.metrics import Metrics

INFER = "/v2/models/affine/infer"


@dataclasses.dataclass
class Engine:
    """A runner whose state is set by hand."""

    alive: bool = True
    running: bool = False
    works: bool = True
    hangs: bool = False
    checks: int = 0
    given_up: int = 0

    def give_up(self):
        self.given_up += 1

    def check(self):
        self.checks += 1
        while self.hangs:
            time.sleep(0.01)
        if not self.works:
            raise ValueError("broken")


class Watch:
    """A health, its engine and its metrics, with a clock of its own."""

    def __init__(self):
        self.engine, self.metrics = Engine(), Metrics("m")
        self.health = Health(self.engine, self.metrics, stall_s=30.0)
        self.now = 1000.0

    def step(self, seconds=0.5, failed=0, good=0):
        """Lets time pass, and checks; gives ready and live."""
        self.now += seconds
        self.metrics.failed_batches += failed
        for _ in range(good):
            self.metrics.batch(1, 1, 0.0, 0.001)
        self.health.check(self.now)
        thread = self.health._asking
        if thread is not None and not self.engine.hangs:
            thread.join(5)
        return self.health.ready, self.health.live


@pytest.fixture
def watch():
    watching = Watch()
    yield watching
    watching.engine.hangs = False


def test_failures_of_some_are_none_of_the_model(watch):
    for _ in range(20):
        assert watch.step(failed=5, good=1) == (True, True)
    assert watch.engine.checks == 0


def test_failures_of_all_are_looked_into(watch):
    """Somebody who sends nothing but poison cannot make the server unready for others."""
    for _ in range(20):
        assert watch.step(failed=5) == (True, True)
    assert watch.engine.checks > 5


def test_two_failures_are_not_enough(watch):
    watch.engine.works = False
    watch.step(failed=2)
    watch.step(good=1)
    for _ in range(10):
        assert watch.step() == (True, True)
    assert watch.step(failed=2) == (True, True)
    assert watch.step() == (True, True)
    assert watch.engine.checks == 0
    watch.step(failed=1)
    assert watch.engine.checks == 1


def test_a_model_that_fails_is_not_ready_and_after_a_minute_not_live(watch):
    watch.engine.works = False
    watch.step(failed=3)
    began = watch.now + 0.5
    while watch.now < began + 59:
        assert watch.step() == (False, True)
    assert not watch.engine.given_up
    watch.step(1.5)
    assert watch.step() == (False, False)
    assert watch.engine.given_up


def test_it_is_ready_again_once_zeros_run(watch):
    watch.engine.works = False
    watch.step(failed=3)
    assert watch.step() == (False, True)
    watch.engine.works = True
    watch.step()
    assert watch.step() == (True, True)
    assert "fails" not in watch.health.reason


def test_it_is_ready_again_once_a_batch_runs(watch):
    watch.engine.works = False
    watch.step(failed=3)
    assert watch.step() == (False, True)
    watch.engine.hangs = True  # what is asked now gets no answer
    watch.step()
    assert watch.step(good=1) == (True, True)


def test_an_execution_that_does_not_end(watch):
    assert watch.step() == (True, True)
    watch.engine.running = True
    began = watch.now
    while watch.now < began + 30:
        assert watch.step() == (True, True)
    assert watch.step() == (False, True)
    while watch.now < began + 91:
        watch.step()
    assert watch.step() == (False, False)


def test_a_busy_engine_that_gets_on_is_well(watch):
    watch.engine.running = True
    for _ in range(200):
        assert watch.step(good=1) == (True, True)


def test_a_check_that_does_not_end(watch):
    watch.engine.hangs = True
    watch.step(failed=3)
    for _ in range(59):
        assert watch.step() == (True, True)
    watch.step(1.0)
    assert watch.step()[0] is False
    assert watch.engine.checks == 1


def test_a_thread_that_has_ended_is_neither(watch):
    watch.engine.alive = False
    assert watch.step() == (False, False)


class Breakable(Affine):
    """Fails whatever it is given while `broken`."""

    broken = False

    def run(self, sizes, arrays):
        if self.broken:
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        return super().run(sizes, arrays)


def status(server, path):
    return exchange(server, "GET", path)[0]


def until(server, path, wanted):
    deadline = time.monotonic() + 10
    while status(server, path) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def infer(server, n):
    return exchange(server, "POST", INFER, *affine_binary(np.ones((1, 4)), [n]))[0]


def test_a_server_whose_model_breaks_says_so_and_recovers(make_server):
    model = Breakable()
    server = make_server(model)
    model.broken = True
    assert [infer(server, 1) for _ in range(4)] == [500] * 4
    until(server, "/v2/health/ready", 503)
    assert status(server, "/v2/models/affine/ready") == 503
    assert status(server, "/v2/health/live") == 200
    model.broken = False
    until(server, "/v2/health/ready", 200)
    assert infer(server, 1) == 200


def test_poison_alone_does_not_make_a_server_unready(server):
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert infer(server, -1) == 500
        assert status(server, "/v2/health/ready") == status(server, "/v2/health/live") == 200


def test_a_server_whose_engine_has_ended_is_not_live(server):
    server.devices[0].stop(5.0)
    until(server, "/v2/health/live", 503)
    assert status(server, "/v2/health/ready") == 503
