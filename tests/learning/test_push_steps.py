"""Steps of a push against a server that is played: what is joined, tried again, or given up."""

import dataclasses
import errno
import pathlib

import jax.numpy as jnp
import learning_model
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.learning import Learner, LearningPlan
from lepton_xla.learning import masters as storing
from lepton_xla.learning.labelled import place_of
from lepton_xla.learning.pushing import Push
from lepton_xla.learning.rounds import Round, Rounds
from lepton_xla.serve.client import RequestError


@dataclasses.dataclass
class Played:
    """The repository of a server. `states` are the rollout's, one for each look; an int is an HTTP status."""

    versions: list = dataclasses.field(default_factory=lambda: [played_version("1", ["stable"])])
    states: list = dataclasses.field(default_factory=list)
    indexed: list = dataclasses.field(default_factory=list)
    refusal: int = 0
    url: str = "http://played"
    done: list = dataclasses.field(default_factory=list)
    rolled: str = ""

    def models(self):
        return [{"name": "m", "problem": None, "versions": self.versions}]

    def promote(self, name, version, label):
        self.done.append(("promote", version, label))

    def push(self, artifact, name, version):
        if self.refusal:
            raise RequestError(self.refusal, "refused")
        self.done.append(("push", version))

    def remove(self, name, version):
        self.done.append(("remove", version))
        raise RequestError(404, "gone")  # by a learner that was killed after it

    def index(self):
        return [self.indexed.pop(0)] if self.indexed else []

    def start_rollout(self, name, wanted):
        self.done.append(("rollout", wanted["version"]))
        self.rolled = wanted["version"]
        return self._next()

    def rollout(self, name):
        if not self.rolled:
            raise RequestError(404, "none")
        return self._next()

    def _next(self):
        state = self.states.pop(0)
        if isinstance(state, int) or state is None:
            raise RequestError(state, "away")
        version, _, state = state.rpartition(":")
        return {"version": version or self.rolled, "state": state, "reason": f"is {state}", "share": 0.5}


def played_version(version, labels=(), wanted=True):
    return {"version": version, "labels": list(labels), "wanted": wanted, "size_bytes": 1, "created": "then"}


class Time:
    now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def push_of(played):
    clock = Time()
    return Push(played, "m", poll_s=10.0, clock=clock, sleep=clock.sleep)


def test_the_label_stable_is_put_where_it_stands_nowhere():
    played = Played(
        versions=[played_version("1", wanted=False), played_version("3"), played_version("4", wanted=False)]
    )
    assert push_of(played).stable() == "3"
    assert played.done == [("promote", "3", "stable")]
    assert push_of(Played()).stable() == "1"
    both = [played_version("9"), played_version("10")]
    assert push_of(Played(versions=both)).free_version() == "11"
    assert push_of(Played(versions=both)).free_version(["12"]) == "13"  # which was rolled back, and removed
    assert push_of(Played(versions=both, states=["11:rolled back"], rolled="11")).free_version() == "12"
    with pytest.raises(lx.LearningError, match="has no version that is served"):
        push_of(Played(versions=[])).stable()
    with pytest.raises(lx.LearningError, match="has no model 'other' in its repository"):
        Push(Played(), "other").stable()


def test_a_rollout_is_followed_to_its_end_through_a_restart_of_the_server():
    played = Played(states=["shadow", None, 503, "canary", "promoted"])
    told = []
    ended = push_of(played).roll_out({"version": "2"}, told.append)
    assert (ended["state"], [each["state"] for each in told]) == ("promoted", ["shadow", "shadow", "shadow", "canary"])
    assert played.done == [("rollout", "2")]


def test_a_rollout_that_is_under_way_or_over_is_joined():
    for states, end in ((["canary", "rolled back"], "rolled back"), (["promoted"], "promoted")):
        played = Played(states=states, rolled="2")
        assert push_of(played).roll_out({"version": "2"})["state"] == end
        assert played.done == []
    played = Played(states=["1:promoted", "shadow", "3:shadow"], rolled="1")
    ended = push_of(played).roll_out({"version": "2"})
    assert (ended["state"], ended["reason"]) == ("stopped", "another rollout took its place")
    assert played.done == [("rollout", "2")]


def test_a_server_that_stays_away_or_refuses_is_an_error():
    with pytest.raises(RequestError):
        push_of(Played(states=["shadow", *[None] * 100])).roll_out({"version": "2"})
    with pytest.raises(RequestError):
        push_of(Played(states=[409])).roll_out({"version": "2"})
    with pytest.raises(RequestError):
        push_of(Played(states=["shadow", 403])).roll_out({"version": "2"})


def test_a_version_that_is_there_already_is_pushed_once(tmp_path):
    program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    manifest = lx.compile(program, {"batch": (1,)}, name="m").save(tmp_path / "m.lepton")
    same = {**played_version("2"), "size_bytes": manifest.size_bytes, "created": manifest.created}
    assert push_of(Played(versions=[same], refusal=409)).push(tmp_path / "m.lepton", "2")
    assert not push_of(Played(versions=[played_version("2")], refusal=409)).push(tmp_path / "m.lepton", "2")
    with pytest.raises(RequestError):
        push_of(Played(refusal=403)).push(tmp_path / "m.lepton", "2")
    played = Played()
    assert push_of(played).push(tmp_path / "m.lepton", "2")
    assert played.done == [("push", "2")]


def test_a_version_that_the_server_cannot_load():
    entry = {"name": "m", "version": "2", "state": "LOADING", "reason": ""}
    push_of(Played(indexed=[entry, {**entry, "state": "READY"}])).wait_loaded("2")
    with pytest.raises(lx.LearningError, match="cannot load version 2: no room"):
        push_of(Played(indexed=[entry, {**entry, "state": "UNAVAILABLE", "reason": "no room"}])).wait_loaded("2")
    with pytest.raises(lx.LearningError, match="has not loaded version 2 after 300 s"):
        push_of(Played()).wait_loaded("2")


# The learner with such a server.

PLAN = LearningPlan(steps=100, least_rows=100, least_held_out=20)


def learner_of(played, bases, sampled, tmp_path, **more):
    push = push_of(played)
    push.model = "blobs"
    played.models = lambda: [{"name": "blobs", "problem": None, "versions": played.versions}]
    given = {"push": push, "plan": PLAN} | more
    return Learner(learning_model.spec(), bases["float"], sampled.folder, tmp_path / "learning", **given)


def ready(version):
    return {"name": "blobs", "version": version, "state": "READY"}


def test_what_is_rolled_back_is_forgotten_and_what_is_promoted_goes_on(bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(500, 1, sign=-1.0))
    played = Played(states=["shadow", "rolled back"], indexed=[ready("2")])
    learner = learner_of(played, bases, sampled, tmp_path)
    ended = learner.once()
    assert (ended.phase, ended.reason, ended.version) == ("rolled back", "is rolled back", "2")
    assert played.done == [("push", "2"), ("rollout", "2"), ("remove", "2")]
    assert learner._rounds.serving_version == ""
    assert not (tmp_path / "learning/blobs/master.npz").exists()
    sampled.add(*learning_model.rows(400, 2, sign=-1.0))
    played.versions.append(played_version("2"))
    played.states, played.rolled, played.indexed = ["promoted"], "", [ready("3")]
    assert learner.once().phase == "promoted"
    assert learner._rounds.serving_version == "3"
    # Others have promoted something else since: the learner begins with the model's own weights again.
    sampled.add(*learning_model.rows(400, 3, sign=-1.0))
    played.versions = [played_version("3"), played_version("4", ["stable"])]
    played.refusal, played.rolled = 400, ""
    ended = learner.once()
    assert (ended.phase, ended.reason) == ("stopped", "the server refuses version 5: refused")
    assert learner._rounds.serving_version == ""


def test_a_server_that_is_away_when_it_comes_to_pushing(bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(500, 1, sign=-1.0))
    played = Played(refusal=503)
    learner = learner_of(played, bases, sampled, tmp_path)
    with pytest.raises(RequestError):
        learner.once()
    assert learner._rounds.current.phase == "push"
    played.refusal, played.states, played.indexed = 0, ["promoted"], [ready("2")]
    assert learner.once().phase == "promoted"
    assert [each[0] for each in played.done] == ["push", "rollout"]


def test_a_full_disk_stops_a_round_and_the_next_start_goes_on(bases, sampled, tmp_path, monkeypatch):
    sampled.add(*learning_model.rows(500, 1, sign=-1.0))
    learner = learner_of(Played(), bases, sampled, tmp_path, push=None)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(storing.np, "savez", lambda *_, **__: (_ for _ in ()).throw(full))
        with pytest.raises(lx.LearningError, match=r"cannot be written: .*No space left on device"):
            learner.once()
    assert learner._rounds.current.phase == "train"
    # What retention has left of the samples is too little to go on, until there are more.
    with monkeypatch.context() as patched:
        patched.setattr(learner, "_plan", dataclasses.replace(PLAN, least_held_out=200))
        with pytest.raises(lx.LearningError, match="to judge by are too few"):
            learner.once()
    # Nor is the result lost where it cannot be saved.
    with pytest.raises(lx.ArtifactError, match="cannot be created"):
        learner.once(tmp_path / "learning/blobs/split.key/better.lepton")
    assert learner._rounds.current.phase == "judge"
    assert learner.once(tmp_path / "better.lepton").phase == "kept"
    assert lx.load(tmp_path / "better.lepton", base=lx.load(bases["float"])).manifest.is_update


def test_the_weights_of_a_training_run_are_where_it_begins(bases, sampled, tmp_path):
    spec = learning_model.spec(model=learning_model.program)  # untrained
    model = learning_model.program()
    trained = lx.train.fit(
        model, lx.train.supervised(model), spec.updates(150), spec.data, steps=150, progress=False,
        checkpoint=lx.train.Checkpoints(tmp_path / "run"),
    ).program  # fmt: skip
    learner = Learner(spec, bases["float"], sampled.folder, tmp_path / "learning", trained=tmp_path / "run")
    for path, leaf in learner._model(learner._rounds).weights.items():
        np.testing.assert_array_equal(leaf, trained.weights[path])


# The folder.


def test_half_a_line_of_history_costs_that_line_only(tmp_path):
    rounds = Rounds(tmp_path, "m")
    with rounds.locked():
        rounds.end(rounds.save(Round(number=1, rows=5)), "refused", "no")
    history = pathlib.Path(tmp_path / "m" / "history.jsonl")
    with open(history, "ab") as file:
        file.write(b'{"number": 2, "pha')
    with rounds.locked():
        assert rounds.next_number == 2
        rounds.end(rounds.save(Round(number=2, rows=6)), "kept", "yes")
    assert [(each.number, each.phase) for each in rounds.history()] == [(1, "refused"), (2, "kept")]


def test_who_is_killed_while_it_forgets_forgets_the_rest(tmp_path, monkeypatch):
    rounds = Rounds(tmp_path, "m")
    with rounds.locked():
        rounds.serving.mkdir()
        rounds.master.write_bytes(b"weights")
        (rounds.folder / "serving.json").write_text('{"version": "4"}')
        unlink, gone = pathlib.Path.unlink, []

        def killed(path, missing_ok=False):
            if gone:
                raise KeyboardInterrupt
            gone.append(path)
            unlink(path, missing_ok)

        monkeypatch.setattr(pathlib.Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            rounds.forget()
        monkeypatch.undo()
        # What is still there is told to be another version's than the server's.
        assert rounds.serving_version == "4"
        rounds.forget()
        assert (rounds.serving_version, rounds.master.exists(), rounds.serving.exists()) == ("", False, False)


def test_what_a_request_is_used_for_is_not_for_its_client_to_choose(tmp_path):
    secrets = []
    for name in ("a", "a", "b"):
        with Rounds(tmp_path / name, "m").locked() as rounds:
            (rounds.folder / "split.key").write_bytes(bytes([len(secrets) // 2]) * 16)
            secrets.append(rounds.secret())
    assert [place_of("id", secret) == place_of("id", secrets[0]) for secret in secrets] == [True, True, False]
    (tmp_path / "a" / "m" / "split.key").write_bytes(b"")
    with pytest.raises(lx.LearningError, match=r"split\.key is damaged"):
        Rounds(tmp_path / "a", "m").secret()


def test_a_damaged_note_is_named(tmp_path):
    rounds = Rounds(tmp_path, "m")
    with rounds.locked():
        pass
    (tmp_path / "m" / "round.json").write_text("{")
    with pytest.raises(lx.LearningError, match=r"round\.json cannot be read"):
        _ = rounds.current
