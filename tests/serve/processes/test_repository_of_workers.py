"""`leptonx serve MODELS/ --workers 2`: all workers change together, and one that dies in the middle changes nothing."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from serve_fakes import exchange, start_script

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from numbered import ROW, Clients, make_numbered, wait

from lepton_xla.serve.client import Client
from lepton_xla.serve.client.repository import RepositoryClient
from lepton_xla.serve.models.repository import Repository


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_numbered(tmp_path_factory.mktemp("made"), (1, 2, 3, 4))


class Served:
    """A running command with two workers and a repository."""

    def __init__(self, root, *flags):
        self.process = start_script(
            "from lepton_xla.cli.serve import serve; serve()",
            root, "--json", "--port", "0", "--workers", "2", "--repository-poll-s", "0.05", *flags,
            environment=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
        )  # fmt: skip
        event = json.loads(self.process.stdout.readline())
        self.name, self.url = event["model"], event["url"]
        self.address = (event["host"], event["port"])

    @property
    def workers(self):
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "lepton_xla.serve.processes.worker" in child.cmdline():
                    found.append(child)
        return found

    def index(self):
        _, _, body = exchange(self, "POST", "/v2/repository/index")
        return {(each["name"], each.get("version", "")): each for each in json.loads(body)}

    def control(self, action, name="m"):
        status, _, body = exchange(self, "POST", f"/v2/repository/models/{name}/{action}")
        return status, json.loads(body).get("error", "")

    def versions(self):
        """What each of many connections gets: both workers, many times."""
        return {json.loads(exchange(self, "GET", "/v2/models/m")[2]).get("versions", [""])[-1] for _ in range(20)}

    def kill(self):
        if self.process.poll() is None:
            for each in (*psutil.Process(self.process.pid).children(), self.process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture
def repository(tmp_path, made):
    repository = Repository(tmp_path / "MODELS")
    repository.push(made[1], "m")
    return repository


@pytest.fixture
def serve(repository):
    started = []

    def start(*flags):
        started.append(Served(repository.root, *flags))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_all_workers_change_together_and_no_answer_is_lost_or_wrong(serve, repository, made):
    served = serve()
    assert served.name == "m"
    with Clients(served, count=4) as clients:
        for number in (2, 3):
            repository.push(made[number], "m")
            wait(lambda n=number: clients.answers.get(str(n), 0) > 50)
        assert served.versions() == {"3"}
        shutil.copytree(made[4], repository.root / "m" / "4.lepton")
        (repository.root / "m" / "5.lepton").mkdir()
        (repository.root / "m" / "5.lepton" / "manifest.json").write_text("{")
        wait(lambda: served.index().get(("m", "5"), {}).get("state") == "UNAVAILABLE")
        assert served.versions() <= {"3", "4"}
    wait(lambda: ("m", "3") not in served.index() or served.index()["m", "3"]["state"] == "READY")
    text = exchange(served, "GET", "/metrics")[2].decode()
    for version, count in clients.answers.items():
        assert f'lepton_inference_requests_total{{model="m",version="{version}"}} {float(count)}\n' in text
    served.process.terminate()
    assert served.process.wait(20) == 0


@pytest.mark.slow
def test_clients_load_and_unload_in_all_workers(serve, repository, made):
    served = serve("--explicit", "--load", "m")
    assert served.versions() == {"1"}
    repository.push(made[2], "m")
    assert served.versions() == {"1"}
    assert served.control("load") == (200, "")
    assert served.versions() == {"2"}
    assert served.control("load", "nobody") == (
        404, "failed to load 'nobody', the repository has no model of that name",
    )  # fmt: skip
    assert served.control("unload") == (200, "")
    assert served.versions() == {""}
    assert served.control("unload")[0] == 404


def ask_forever(served, done, wrong, answers):
    """A client that tries again when a worker dies under it, as users have it."""
    with Client(served.url, model="m", retries=5, timeout_s=30) as client:
        while not done.is_set():
            try:
                outputs = client.infer(x=np.float32([ROW]))
                factor = outputs["first"][0, 0]
                np.testing.assert_array_equal(outputs["first"], np.float32([ROW]) * factor)
                np.testing.assert_array_equal(outputs["second"], outputs["first"])
                answers.append(int(factor))
            except Exception as error:
                wrong.append(repr(error))
                return


@pytest.mark.parametrize("moment", [0.03, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.0, 0.1, 0.2))])
def test_a_worker_killed_in_the_middle_of_a_swap(serve, repository, made, moment):
    served = serve()
    done, wrong, answers = threading.Event(), [], []
    threads = [threading.Thread(target=ask_forever, args=(served, done, wrong, answers)) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait(lambda: len(answers) > 20)
        victim = served.workers[0]
        repository.push(made[2], "m")
        time.sleep(0.05 + moment)
        victim.send_signal(signal.SIGKILL)
        wait(lambda: answers[-20:] == [2] * 20, 40)
        wait(lambda: len(served.workers) == 2 and victim.pid not in {each.pid for each in served.workers}, 40)
        repository.push(made[3], "m")
        wait(lambda: answers[-20:] == [3] * 20, 40)
        wait(lambda: served.versions() == {"3"}, 40)
    finally:
        done.set()
        for thread in threads:
            thread.join(40)
    assert not wrong, wrong
    assert set(answers) == {1, 2, 3}


def test_a_version_is_pushed_through_any_worker(serve, repository, made):
    served = serve()
    with Clients(served, count=4) as clients, RepositoryClient(served.url) as client:
        assert client.push(made[2], "m") == "2"
        wait(lambda: clients.answers.get("2", 0) > 50)
        assert client.promote("m", "1") is None
        client.remove("m", "2")
        wait(lambda: served.versions() == {"1"})
