"""A budget of memory that several workers share: all hold the same models, whichever of them is asked."""

import contextlib
import json
import re
import threading
import time

import numpy as np
import pytest
from serve_fakes import exchange
from test_repository_of_workers import Served, wait

import lepton_xla as lx

SIDE = 1000  # 4 MB of weights


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, width in [*((f"m{index}", SIDE) for index in range(5)), ("huge", 3 * SIDE)]:
        weights = {"w": np.full((SIDE, width), 1.0 + int(name[1]) if name != "huge" else 0.0, np.float32)}
        program = lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", SIDE), "float32")})
        lx.compile(program, {"batch": (1,)}, name=name).save(root / name / "1.lepton")
    served = Served(root, "--memory", "20MiB")  # of each worker's 10 MiB two models take 8 or 9
    yield served
    served.kill()


def ask(served, index):
    """The status of a request for a model, and whether its answer is right."""
    body = {"inputs": [{"name": "x", "shape": [1, SIDE], "datatype": "FP32", "data": [1.0] * SIDE}]}
    status, _, answer = exchange(served, "POST", f"/v2/models/m{index}/infer", json.dumps(body).encode())
    if status != 200:
        return status, answer.decode()
    return status, set(json.loads(answer)["outputs"][0]["data"]) == {SIDE * (1.0 + index)}


def ready(served):
    return {name for (name, _), entry in served.index().items() if entry.get("state") == "READY"}


def loaded(served):
    """By model, in how many workers it is loaded."""
    text = exchange(served, "GET", "/metrics")[2].decode()
    found = re.findall(r'^lepton_model_ready{model="(\w+)",version="1"} (\S+)$', text, re.MULTILINE)
    return {name: float(count) for name, count in found if float(count)}


def test_models_come_and_go_in_all_workers_within_their_part_of_the_budget(served):
    assert served.name == ""
    assert not ready(served)
    asked, broken = [], []

    def client(first):
        try:
            for turn in range(12):
                asked.append(ask(served, (first + turn) % 5))
        except BaseException as error:
            broken.append(error)

    threads = [threading.Thread(target=client, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(ready(served)) <= 2
        time.sleep(0.05)
    assert not broken
    assert len(asked) == 48
    assert {answer for answer in asked if answer[0] != 503} == {(200, True)}
    assert sum(status == 200 for status, _ in asked) >= 40
    # Both workers have the same models, and no more than there is room for.
    wait(lambda: set(loaded(served).values()) == {2.0} and set(loaded(served)) == ready(served))
    assert 1 <= len(ready(served)) <= 2
    assert exchange(served, "GET", "/v2/models/m9")[0] == 404


def test_a_worker_that_is_killed_comes_back_with_what_the_other_has(served):
    assert ask(served, 1) == (200, True)
    served.workers[0].kill()
    until = time.monotonic() + 30
    while True:  # a connection that the dead worker had is lost
        with contextlib.suppress(OSError):
            assert ask(served, 2)[0] in (200, 503)
            if loaded(served) == dict.fromkeys(ready(served), 2.0):
                break
        assert time.monotonic() < until, loaded(served)
        time.sleep(0.1)
    assert "m2" in ready(served)
    for name in 2 * sorted(ready(served)):
        assert ask(served, int(name[1])) == (200, True)


def test_a_model_larger_than_a_worker_s_part_is_507_for_requests_and_admins(served):
    status, _, body = exchange(served, "GET", "/v2/models/huge")
    assert status == 507
    assert re.search(
        "'huge' takes 12[0-9]* bytes, more than the memory for all of each worker, 10485760", body.decode()
    )
    assert served.control("load", "huge")[0] == 507
    assert "huge" not in ready(served)
