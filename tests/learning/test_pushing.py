"""A learner and a running server: through a rollout, killed at every step, and what the users notice."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import learning_model
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.learning import Learner, LearningPlan
from lepton_xla.learning import learner as steps
from lepton_xla.learning.pushing import Push
from lepton_xla.learning.rounds import Rounds
from lepton_xla.samples import Samples
from lepton_xla.serve import Client, Options, Server
from lepton_xla.serve.client import RequestError
from lepton_xla.serve.client.repository import RepositoryClient
from lepton_xla.serve.models.repository import Repository

PLAN = LearningPlan(
    steps=100, least_rows=100, least_held_out=20,
    stages=({"shadow": 1.0, "answers": 5}, {"share": 0.5, "answers": 5}),
    rollback=("errors > stable + 1%", "accuracy < stable surely"),
)  # fmt: skip


@pytest.fixture
def server(bases, tmp_path):
    Repository(tmp_path / "models").push(bases["int8"], "blobs")
    # A version that is unloaded right after a promotion would not know the answers that it has just given.
    (tmp_path / "models" / "blobs" / "model.toml").write_text('versions = "all"\n')
    options = Options(port=0, samples=tmp_path / "samples", repository_poll_s=0.05)
    with Server(options=options, repository=tmp_path / "models") as running:
        yield running


@pytest.fixture
def client(server):
    with RepositoryClient(server.url) as opened:
        yield opened


class Users:
    """People who send shifted requests, say later what was right, and remember every answer."""

    def __init__(self, url, sign=-1.0):
        self.answers = []
        self.failures = []
        self._stop = threading.Event()
        self._url = url
        self._sign = sign
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self):
        with Client(self._url, retries=0) as client:
            for number in itertools.count():
                x, labels = learning_model.rows(1, 10_000 + number, self._sign)
                try:
                    answer = client.infer("blobs", x=x, request_id=f"user {number}")["output"]
                    client.feedback("blobs", {f"user {number}": int(labels[0])})
                    self.answers.append(bool(answer.argmax() == labels[0]))
                except RequestError as error:
                    self.failures.append(error)
                if self._stop.wait(0.002):
                    return

    def wait(self, count):
        until = time.monotonic() + 60
        while len(self.answers) < count:
            assert time.monotonic() < until
            time.sleep(0.02)


def learner_of(client, bases, tmp_path, plan=PLAN):
    push = Push(client, "blobs", poll_s=0.05)
    return Learner(
        learning_model.spec(), bases["int8"], tmp_path / "samples", tmp_path / "learning", push=push, plan=plan
    )  # fmt: skip


def labels(tmp_path):
    return Repository(tmp_path / "models").find("blobs").settings.labels


def test_a_shift_is_regained_through_shadow_canary_and_promotion(server, client, bases, tmp_path):
    with Users(server.url) as users:
        users.wait(400)
        assert np.mean(users.answers[-200:]) < 0.6
        learner = learner_of(client, bases, tmp_path)
        ended = learner.once()
        assert (ended.phase, ended.version) == ("promoted", "2"), ended.reason
        then = len(users.answers)
        users.wait(then + 200)
    assert np.mean(users.answers[then:]) > 0.9
    assert users.failures == []
    assert labels(tmp_path)["stable"] == "2"
    with Client(server.url) as client:
        states = [each["state"] for each in client.rollout("blobs")["decisions"]]
    assert list(dict.fromkeys(states)) == ["shadow", "canary", "promoted"]
    assert lx.load(tmp_path / "models/blobs/2.lepton", base=lx.load(bases["int8"])).manifest.is_update
    # What was promoted is where the next round begins, and what it is compared with.
    assert (learner._rounds.serving_version, learner._rounds.master.exists()) == ("2", True)
    assert {each.version for each in Samples(tmp_path / "samples", "blobs").with_labels()} == {"1", "2"}
    assert learner.tracked()[0].accuracy < 0.6
    assert learner.tracked()[-1].accuracy > 0.8


def fill(server, count=400, sign=-1.0):
    with Client(server.url) as client:
        x, right = learning_model.rows(count, 1, sign)
        for number in range(count):
            client.infer("blobs", x=x[number : number + 1], request_id=f"r{number}")
        client.feedback("blobs", {f"r{number}": int(label) for number, label in enumerate(right)})
    until = time.monotonic() + 20
    while next(iter(server.metrics)).samples["kept"] < 2 * count:
        assert time.monotonic() < until
        time.sleep(0.01)


DIRECT = LearningPlan(steps=100, least_rows=100, least_held_out=20, direct=True)


class KilledError(BaseException):
    """As if the process had been killed."""


def killed_at(monkeypatch, owner, name, call, *, after):
    """Has the numbered call of a function end everything: before it does anything, or as soon as it is done."""
    function = getattr(owner, name)
    calls = itertools.count()

    def ends(*arguments, **options):
        last = next(calls) == call
        if last and not after:
            raise KilledError
        result = function(*arguments, **options)
        if last:
            raise KilledError
        return result

    monkeypatch.setattr(owner, name, ends)


# Everything that a round leaves on the disk or at the server, in its order.
STEPS = [
    (Rounds, "save", 0), (steps, "write_master", 0), (Rounds, "save", 1), (Rounds, "save", 2), (Rounds, "save", 3),
    (RepositoryClient, "push", 0), (Rounds, "save", 4), (RepositoryClient, "promote", 0), (Rounds, "save", 5),
    (os, "rename", -1), (Rounds, "_write", -2), (os, "replace", -3),
]  # fmt: skip


@pytest.mark.parametrize(
    "killed",
    [
        [((RepositoryClient, "push", 0), True), ((os, "rename", -1), True)],
        pytest.param(list(itertools.product(STEPS, (False, True))), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_killed_at_any_step_it_goes_on_and_pushes_once(server, client, bases, tmp_path, monkeypatch, killed):
    fill(server)
    whole = learner_of(client, bases, tmp_path, DIRECT)._base
    for number, ((owner, name, call), after) in enumerate(killed):
        folder = tmp_path / f"learning {number}"
        before = Repository(tmp_path / "models").find("blobs").versions
        Repository(tmp_path / "models").promote("blobs", "1")  # the learner is new, and so are its weights
        push = Push(client, "blobs", poll_s=0.02)
        monkeypatch.setattr(steps, "load", lambda path, base=None: whole if base is None else lx.load(path, base=base))
        make = lambda folder=folder, push=push: Learner(  # noqa: E731
            learning_model.spec(), bases["int8"], tmp_path / "samples", folder, push=push, plan=DIRECT
        )
        with monkeypatch.context() as patched:
            if call >= 0:
                killed_at(patched, owner, name, call, after=after)
            else:
                killed_at_end(patched, owner, name, call, after=after)
            with pytest.raises(KilledError):
                make().once()
        again = make()
        rounds = Rounds(folder, "blobs")
        ended = rounds.history()
        if not ended or rounds.current is not None:
            interrupted = rounds.current
            if interrupted is not None and interrupted.ended:
                with rounds.locked():  # a start, which only has to tidy up
                    pass
            else:
                again.once()
        ended = rounds.history()
        where = f"{name} {call} {'after' if after else 'before'}"
        assert [each.phase for each in ended] == ["promoted"], where
        assert labels(tmp_path)["stable"] == ended[0].version, where
        after_all = Repository(tmp_path / "models").find("blobs").versions
        assert len(after_all) == len(before) + 1, where
        assert rounds.serving_version == ended[0].version, where
        assert rounds.master.exists(), where
        assert rounds.serving.exists(), where
        assert rounds.current is None, where
        assert not rounds.work.exists(), where


def killed_at_end(patched, owner, name, call, *, after):
    """The same while a round is ended as promoted: calls are counted from there, -1 is the first, -2 the second."""
    end = Rounds.end

    def ends(self, *arguments):
        killed_at(patched, owner, name, -call - 1, after=after)
        return end(self, *arguments)

    patched.setattr(Rounds, "end", ends)


@pytest.mark.slow
def test_kill_9_in_each_phase_is_noticed_by_nobody(server, bases, tmp_path):
    (tmp_path / "rollout.json").write_text(
        json.dumps({"stages": [{"shadow": 1.0, "answers": 50}, {"share": 0.5, "answers": 50}], "rollback": []})
    )
    command = [
        sys.executable, "-m", "lepton_xla", "learn", f"{learning_model.__file__}:spec", "--base", bases["int8"],
        "--samples", tmp_path / "samples", "--folder", tmp_path / "learning", "--server", server.url, "--steps", "100",
        "--least-rows", "100", "--rollout", tmp_path / "rollout.json", "--json",
    ]  # fmt: skip
    noted = tmp_path / "learning" / "blobs" / "round.json"
    with Users(server.url) as users:
        users.wait(600)
        seen = []
        for phase in ("train", "judge", "push", "rollout"):
            with subprocess.Popen([str(each) for each in command], stdout=subprocess.DEVNULL) as process:
                until = time.monotonic() + 60
                while process.poll() is None and time.monotonic() < until:
                    with contextlib.suppress(OSError, ValueError, KeyError):
                        found = json.loads(noted.read_bytes())["phase"]
                        if found == phase or found not in ("train", "judge", "push"):
                            seen.append(found)
                            break
                    time.sleep(0.001)
                process.send_signal(signal.SIGKILL)
        assert seen[0] == "train"
        done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        ended = json.loads(done.stdout)
        assert ended["phase"] == "promoted", ended
        then = len(users.answers)
        users.wait(then + 100)
    assert users.failures == []
    assert np.mean(users.answers[then:]) > 0.9
    # Whatever was killed when: one round, one version more.
    assert sorted(Repository(tmp_path / "models").find("blobs").versions) == ["1", "2"]
    assert labels(tmp_path) == {"stable": "2"}


@pytest.mark.slow
def test_what_is_worse_for_its_users_is_rolled_back_and_removed(server, client, bases, tmp_path):
    # Whoever gives feedback by hand may err: what was learned is wrong for the users that come then.
    fill(server)
    plan = LearningPlan(
        steps=100, least_rows=100, least_held_out=20, max_drop=1.0, fresh=1.0,
        stages=({"share": 0.5, "answers": 2000},), rollback=("accuracy < stable surely",),
    )  # fmt: skip
    with Users(server.url, sign=1.0) as users:
        ended = learner_of(client, bases, tmp_path, plan).once()
    assert ended.phase == "rolled back", ended.reason
    assert users.failures == []
    assert labels(tmp_path) == {"stable": "1"}
    assert sorted(Repository(tmp_path / "models").find("blobs").versions) == ["1"]
    # Its number is not used again, or the rollout that is over would be taken for that of the next version.
    fill(server, 401, -1.0)
    again = learner_of(client, bases, tmp_path, dataclasses.replace(plan, stages=({"share": 0.5, "answers": 0},)))
    ended = again.once()
    assert (ended.phase, ended.version) == ("promoted", "3"), ended.reason
