"""Swaps that go wrong at every step: processes that are killed, disks that are full, artifacts that must not be served.

Clients ask all the time and try again what a dead process did not answer: no answer is wrong, and none is lost.
"""

import contextlib
import shutil
import threading

import numpy as np
import psutil
import pytest
from killing import STEPS, environment
from serve_fakes import exchange
from test_repository_of_workers import ROW, Served, make_numbered, wait

from lepton_xla.serve.client import Client, RequestError
from lepton_xla.serve.client.repository import RepositoryClient
from lepton_xla.serve.models.repository import Repository

FAST = {"commit"}


def some(steps):
    """Steps as parameters: one in every run, all of them in the long one."""
    return [step if step in FAST else pytest.param(step, marks=pytest.mark.slow) for step in steps]


class Users:
    """Threads that ask all the time and check every answer; a request that gets none in time counts as lost."""

    def __init__(self, url, count=3):
        self.answers, self.wrong = [], []
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url,)) for _ in range(count)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        for thread in self._threads:
            thread.join(60)
        assert not self.wrong, self.wrong

    def _ask(self, url):
        with Client(url, model="m", retries=20, timeout_s=60) as client:
            while not self._done.is_set():
                try:
                    outputs = client.infer(x=np.float32([ROW]))
                    factor = outputs["first"][0, 0]
                    np.testing.assert_array_equal(outputs["first"], np.float32([ROW]) * factor)
                    np.testing.assert_array_equal(outputs["second"], outputs["first"])
                    self.answers.append(int(factor))
                except Exception as error:
                    self.wrong.append(repr(error))
                    return

    def get(self, number):
        """Waits until everyone is answered by the version of this number."""
        wait(lambda: self.wrong or self.answers[-20:] == [number] * 20, 60)
        assert not self.wrong, self.wrong


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_numbered(tmp_path_factory.mktemp("made"), (1, 2, 3, 4))


@pytest.fixture(scope="module")
def armed(tmp_path_factory):
    return tmp_path_factory.mktemp("armed")


@pytest.fixture(scope="module")
def several(made, armed, tmp_path_factory):
    """A server of two workers that can be killed, and its repository."""
    repository = Repository(tmp_path_factory.mktemp("several") / "MODELS")
    repository.push(made[1], "m")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(armed).items():
            patch.setenv(name, value)
        served = Served(repository.root)
    yield served, repository
    served.kill()


def pushed(repository, made):
    """Pushes another version than the last one; returns the number that it answers with."""
    last = max(map(int, repository.scan()["m"].versions))
    number = last % 4 + 1
    repository.push(made[number], "m")
    return number


def both_hold_the_last(served, repository):
    """Whether both workers serve the last version: one that has been started again has caught up."""
    last = max(repository.scan()["m"].versions, key=int)
    line = f'lepton_model_ready{{model="m",version="{last}"}} 2.0\n'
    return line in exchange(served, "GET", "/metrics")[2].decode()


@pytest.mark.parametrize("step", some(STEPS))
def test_a_worker_killed_at_every_step_of_a_swap(several, armed, made, step):
    served, repository = several
    wait(lambda: both_hold_the_last(served, repository), 60)
    with Users(served.url) as users:
        wait(lambda: len(users.answers) > 20, 60)
        before = {each.pid for each in served.workers}
        (armed / step).touch()
        number = pushed(repository, made)
        wait(lambda: not (armed / step).exists(), 60)
        users.get(number)
        # The other went on, and a new one has taken its place and answers as the other does.
        wait(lambda: len(served.workers) == 2 and len({each.pid for each in served.workers} & before) == 1, 60)
        number = pushed(repository, made)
        users.get(number)
    wait(lambda: both_hold_the_last(served, repository), 60)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_server_of_one_process_killed_at_every_step_of_a_swap(tmp_path, armed, made, step, monkeypatch):
    """It is started again, as systemd or Kubernetes would, on the same address."""
    repository = Repository(tmp_path / "MODELS")
    repository.push(made[1], "m")
    folder = tmp_path / "armed"
    for name, value in environment(folder).items():
        monkeypatch.setenv(name, value)
    served = Served(repository.root, "--workers", "1")
    with Users(served.url) as users:
        wait(lambda: len(users.answers) > 20, 60)
        (folder / step).touch()
        number = pushed(repository, made)
        assert served.process.wait(60) == -9
        again = Served(repository.root, "--workers", "1", "--port", served.address[1])
        try:
            users.get(number)
        finally:
            served.kill()
    again.kill()


def test_a_full_disk_refuses_a_push_by_name_and_disturbs_no_answer(several, made):
    served, repository = several
    wait(lambda: both_hold_the_last(served, repository), 60)
    before = repository.scan()["m"].versions.keys()
    processes = [psutil.Process(served.process.pid), *served.workers]
    limits = [each.rlimit(psutil.RLIMIT_FSIZE) for each in processes]
    with Users(served.url) as users, RepositoryClient(served.url) as client:
        wait(lambda: len(users.answers) > 20, 60)
        for each in processes:
            each.rlimit(psutil.RLIMIT_FSIZE, (100, limits[0][1]))  # no file may be longer: as if the disk were full
        try:
            with pytest.raises(RequestError, match=r"cannot be written: File too large \(HTTP 503\)"):
                client.push(made[2], "m")
            count = len(users.answers)
            wait(lambda: len(users.answers) > count + 50, 60)
        finally:
            for each, limit in zip(processes, limits, strict=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.rlimit(psutil.RLIMIT_FSIZE, limit)
        assert repository.scan()["m"].versions.keys() == before
        assert [each.pid for each in processes[1:]] == [each.pid for each in served.workers]
        version = client.push(made[2], "m")
        users.get(2)
        assert served.versions() == {version}
    assert exchange(served, "GET", "/v2/health/ready")[0] == 200


@pytest.mark.slow  # tests/serve/models/test_swaps.py has it for one process
def test_a_copy_that_stops_half_way_and_goes_on_is_served_when_it_is_whole(several, made):
    served, repository = several
    number = str(max(map(int, repository.scan()["m"].versions)) + 1)
    target = repository.root / "m" / f"{number}.lepton"
    with Users(served.url) as users:
        wait(lambda: len(users.answers) > 20, 60)
        shutil.copytree(made[3], target)
        gone = sorted(each for each in target.rglob("*") if each.is_file() and each.name != "manifest.json")[1:]
        for each in gone:
            each.write_bytes(each.read_bytes()[:10])
        wait(lambda: served.index().get(("m", number), {}).get("state") == "UNAVAILABLE", 60)
        shutil.copytree(made[3], target, dirs_exist_ok=True)
        users.get(3)
