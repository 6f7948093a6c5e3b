"""Candidates that are trained: what they find beside candidates that are not, what a run goes on from, and Optuna."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import socket
import sqlite3
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_tune import LABELS, PROGRAM, X, found

import lepton_xla as lx
from lepton_xla.errors import MissingPackageError, TuningError
from lepton_xla.train import TrainSpec, supervised
from lepton_xla.tuning import CHOICES, Budget, Constraints, studies, trials
from lepton_xla.tuning.candidates import Candidates, Estimates
from lepton_xla.tuning.studies import Study
from lepton_xla.tuning.trainings import Trainer, first_of

ROOT = pathlib.Path(__file__).parents[2]
CHILD = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
RANGES = {"rate": (0.01, 1.0, True), "alpha": (0.0, 1.0, False)}
FIRST = [{"rate": 0.1, "alpha": 0.5}]
SPEC = TrainSpec(
    PROGRAM,
    lambda step: {"x": X[(at := step % 6 * 100) : at + 100], "label": LABELS[at : at + 100]},
    150,
    optax.sgd(0.3, momentum=0.9),
)


def ended(key, objective=1.0, failure="", origin="trained"):
    return trials.Trial(key, "", origin, {}, judged=0.1, bytes=int(objective), failure=failure)


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("optuna")
    path = tmp_path_factory.mktemp("trainings") / "journal.jsonl"
    given = {
        "constraints": Constraints(max_drop=9.0),
        "choices": (CHOICES[0], CHOICES[5]),
        "journal": path,
        "training": SPEC,
    }
    return found(budget=Budget(trials=2, trainings=2), **given), given


def test_a_trained_candidate_is_smaller_at_the_same_drop(trained):
    tuned, _ = trained
    untrained = [each for each in tuned.trials if not each.training and each.excess(tuned.constraints) == 0]
    assert tuned.best.training
    assert tuned.best.bytes < 0.6 * min(each.bytes for each in untrained)
    assert tuned.best.judged <= 9
    assert tuned.stopped == "trials"  # there is always more to train
    # None of what estimates say is of trained weights.
    assert all(not each.estimates for each in tuned.trials if each.training)


def test_what_was_trained_is_built_again(trained):
    tuned, _ = trained
    program = tuned.build()
    answers = np.asarray(program.fn(program.weights, X)).argmax(-1)
    assert (answers == LABELS).mean() == pytest.approx(tuned.best.metrics["accuracy"], abs=1e-9)
    assert {path: leaf.format for path, leaf in program.weights.items() if hasattr(leaf, "format")} != {}


def test_a_run_goes_on_with_what_was_trained(trained, monkeypatch):
    tuned, given = trained
    train, count = Trainer.train, []
    monkeypatch.setattr(Trainer, "train", lambda self, *args: count.append(1) or train(self, *args))
    again = found(budget=Budget(trials=2, trainings=3), **given)
    assert len(count) == 1
    assert [each.name for each in again.trials[:-1]] == [each.name for each in tuned.trials]


def batch(step):
    return {"x": X[(at := step % 6 * 100) : at + 100], "label": LABELS[at : at + 100]}


def squared(scale):
    """A loss that closes over an array, within a function of its own jaxpr."""
    table = np.full(4, scale, np.float32)

    def loss(weights, batch, key, state):
        outputs = jax.jit(lambda x: PROGRAM.fn(weights, x) * table[None])(batch["x"])
        return jnp.mean((outputs - jax.nn.one_hot(batch["label"], 4)) ** 2), {}, state

    return loss


@functools.cache
def whole():
    return digest()


def digest(**changes):
    return Trainer(PROGRAM, dataclasses.replace(SPEC, **changes), None, 0).digest


@pytest.mark.parametrize(
    "other",
    [
        {"optimizer": optax.sgd(0.2, momentum=0.9)},
        {"optimizer": optax.sgd(0.3)},
        {"optimizer": lambda steps: optax.sgd(0.3 - 1 / steps, momentum=0.9)},
        {"loss": supervised(PROGRAM)},
        {"data": lambda step: batch(step if step < 100 else step + 1)},
        {"data": lambda step: batch(step) | {"more": np.zeros(100)}},
        {"steps": 151},
        {"options": {"clip_norm": 1.0}},
        {"options": {"ema": 0.9}},
        {"options": {"seed": 1}},
    ],
)
def test_another_training_is_told_by_its_digest(other):
    assert digest(**other) != whole()


def test_the_same_training_is_told_by_its_digest():
    again = {
        "optimizer": lambda steps: optax.sgd(0.3, momentum=0.9),
        "data": [batch(step) for step in range(6)],
        "options": {"log_every": 5, "checkpoint": "elsewhere"},
    }
    assert digest(**again) == whole()
    assert digest(loss=squared(2.0)) == digest(loss=squared(2.0))
    assert digest(loss=squared(2.0)) != digest(loss=squared(3.0))
    other = PROGRAM.replace(fn=lambda w, x: 2 * PROGRAM.fn(w, x))
    assert Trainer(other, SPEC, None, 0).digest != whole()


def test_another_process_has_the_same_digests():
    code = (
        "import sys, jax; jax.config.update('jax_platforms', 'cpu'); sys.path.insert(0, 'tests/tuning')\n"
        "import test_trainings as t, lepton_xla.tuning.trials as trials\n"
        "print(t.digest(), t.digest(loss=t.squared(2.0)), trials.digest(t.PROGRAM, [{'x': t.X}])['model'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=CHILD, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [
        whole(),
        digest(loss=squared(2.0)),
        trials.digest(PROGRAM, [{"x": X}])["model"],
    ]


def test_a_journal_gives_nothing_of_another_training(trained, monkeypatch):
    tuned, given = trained
    count, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *args: count.append(1) or train(self, *args))
    other = dataclasses.replace(SPEC, optimizer=optax.sgd(0.2, momentum=0.9), steps=SPEC.steps)
    again = found(budget=Budget(trials=2, trainings=1), **given | {"training": other})
    assert len(count) == 1
    assert not {each.name for each in again.trials if each.training} & {each.name for each in tuned.trials}


def test_data_that_can_be_read_once_is_refused_at_once():
    once = dataclasses.replace(SPEC, data=iter([batch(0)] * 1000))
    with pytest.raises(TuningError, match="the data is an iterator, which can be read once"):
        found(constraints=Constraints(max_drop=9.0), training=once, progress=lambda *_: None)


def test_without_optuna_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(studies.importlib, "import_module", missing)
    with pytest.raises(MissingPackageError, match=r"needs the package optuna: pip install 'lepton-xla\[tune\]'"):
        Study("s", RANGES, FIRST)
    with pytest.raises(MissingPackageError, match="needs the package optuna"):
        found(constraints=Constraints(max_drop=9.0), training=SPEC, progress=lambda *_: pytest.fail("it began"))


def test_the_same_seed_asks_the_same_in_one_run_or_two(optuna, tmp_path):
    def asked(study, count):
        settings = []
        for number in range(count):
            each = study.ask()
            settings.append(each.settings)
            study.tell(each, f"{len(study.done)}", ended("a"), (each.settings["rate"], number), 0.0)
        return settings

    whole = asked(Study("s", RANGES, FIRST, seed=3), 4)
    assert whole[:1] == FIRST
    path = tmp_path / "s.optuna"
    assert asked(Study("s", RANGES, FIRST, storage=path, seed=3), 2) == whole[:2]
    assert asked(Study("s", RANGES, FIRST, storage=path, seed=3), 2) == whole[2:]
    assert asked(Study("s", RANGES, FIRST, seed=4), 4)[1:] != whole[1:]


def test_what_a_killed_process_tried_is_tried_again(optuna, tmp_path):
    path = tmp_path / "s.optuna"
    study = Study("s", RANGES, FIRST, storage=path)
    study.tell(study.ask(), "first", ended("first"), (0.1, 1.0), 0.0)
    lost = study.ask()
    lives = Study("s", RANGES, FIRST, storage=path)  # its process lives: somebody works on it
    assert lives.ask().settings != lost.settings
    with subprocess.Popen(["true"]) as child:
        child.wait()
    lost.handle.set_user_attr("owner", f"{socket.gethostname()}:{child.pid}")
    again = Study("s", RANGES, FIRST, storage=path)
    assert again.ask().settings == lost.settings
    assert list(again.done) == ["first"]
    # Killed while it wrote: the torn line is cut, and what comes later is read.
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    torn = Study("s", RANGES, FIRST, storage=path)
    torn.tell(torn.ask(), "second", ended("second"), (0.1, 1.0), 0.0)
    assert list(Study("s", RANGES, FIRST, storage=path).done) == ["first", "second"]


def test_a_bad_training_is_stopped_half_way(optuna):
    study = Study("s", RANGES, FIRST)
    for index, drop in enumerate((1.0, 2.0, 3.0)):
        each = study.ask()
        study.check(each, 100.0, drop, 0.5)
        study.tell(each, str(index), ended("a"), (drop, 100), 0.0)
    larger, worse = study.ask(), study.ask()
    study.check(larger, 50.0, 9.0, 0.5)  # smaller than all others, so none says that it could be better
    with pytest.raises(studies.StoppedError, match="points lost"):
        study.check(worse, 100.0, 9.0, 0.5)
    study.tell(worse, "3", ended("b", failure="stopped", origin="stopped"), (), 0.0)
    assert list(study.done) == ["0", "1", "2", "3"]


def told(study, key, drop=1.0):
    asked = study.ask()
    study.tell(asked, key, ended(key), (drop, 1.0), 0.0)
    return asked.settings


def test_within_the_bound_a_smaller_drop_is_worth_nothing():
    none, little, much = (trials.Trial("a", "", "trained", {}, judged=drop, bytes=400) for drop in (0.0, 0.4, 0.9))
    bounded = Constraints(max_drop=0.5)
    assert [studies.objectives_of(each, "bytes", bounded)[0] for each in (none, little, much)] == [
        (0.5, 400.0), (0.5, 400.0), (0.9, 400.0),
    ]  # fmt: skip
    assert studies.objectives_of(none, "metric", bounded)[0] == (0.0, 400.0)
    assert studies.objectives_of(little, "bytes", Constraints())[0] == (0.4, 400.0)


def test_two_processes_share_what_they_try_and_measure(optuna, tmp_path):
    where = f"sqlite:///{tmp_path}/s.db"
    study = Study("s", RANGES, FIRST, storage=where)
    waits = study.ask()  # while the other works
    code = (
        "import sys; sys.path.insert(0, 'tests/tuning'); import test_trainings as t\n"
        f"study = t.Study('s', t.RANGES, t.FIRST, storage={where!r})\n"
        "print([t.told(study, f'theirs {index}')['rate'] for index in range(3)])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=CHILD, capture_output=True, text=True, check=True
    )
    rates = json.loads(found.stdout)
    assert waits.settings == FIRST[0]
    assert waits.settings["rate"] not in rates
    study.tell(waits, "ours", ended("ours", 7), (1.0, 1.0), 0.0)
    assert study.count == 4
    assert {key: trial.bytes for key, trial in study.done.items()} == {
        "ours": 7, "theirs 0": 1, "theirs 1": 1, "theirs 2": 1,
    }  # fmt: skip
    assert told(study, "more")["rate"] not in [*rates, waits.settings["rate"]]


def test_two_that_ask_at_once_try_different_things(optuna, tmp_path, monkeypatch):
    one, other = (Study("s", RANGES, [], storage=tmp_path / "s.optuna") for _ in range(2))
    draw, drawn = Study._drawn, []

    def at_once(self):
        if not drawn:  # the other draws between this one's look at the trials and its own
            drawn.append(None)
            with monkeypatch.context() as patch:
                patch.setattr(type(other._study), "trials", property(lambda self: []))
                drawn[0] = draw(other)
                return draw(self)
        return draw(self)

    monkeypatch.setattr(Study, "_drawn", at_once)
    mine = one.ask()
    assert drawn[0].settings != mine.settings
    assert mine.handle.number == 2  # the one that was the same is given up


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////nowhere/at/all.db", "sqlite:////nowhere/at/all.db: the database cannot be used"),
        ("nothing://user:secret@host/db", r"nothing://user:\*\*\*@host/db: the database"),
        ("postgresql+nothing://user:secret@host/db", "the database"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_without_its_password(optuna, url, said):
    with pytest.raises(TuningError, match=said) as error:
        Study("s", RANGES, FIRST, storage=url)
    assert "secret" not in str(error.value)


def test_two_that_begin_a_database_at_once_both_open_it(optuna, tmp_path, monkeypatch):
    sqlalchemy = pytest.importorskip("sqlalchemy")
    begin, tries = optuna.storages.RDBStorage.__init__, []

    def raced(self, *args, **kwargs):
        tries.append(1)
        begin(self, *args, **kwargs)  # what the other made
        if len(tries) == 1:
            raise sqlalchemy.exc.OperationalError("CREATE TABLE studies", {}, Exception("table studies already exists"))

    monkeypatch.setattr(optuna.storages.RDBStorage, "__init__", raced)
    assert Study("s", RANGES, FIRST, storage=f"sqlite:///{tmp_path}/s.db").ask().settings == FIRST[0]
    assert len(tries) == 2


def test_a_database_that_is_gone_is_told_in_a_line(optuna, tmp_path):
    study = Study("s", RANGES, FIRST, storage=f"sqlite:///{tmp_path}/s.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as database:
        database.execute("DROP TABLE trials")
    with pytest.raises(
        TuningError, match=r"storage of trained candidates cannot be used any more: .*no such table"
    ) as e:
        study.ask()
    assert "\n" not in str(e.value)


def test_channels_are_removed_where_there_are_some():
    trainer = Trainer(PROGRAM, SPEC, None, 0)
    assert "channels" in trainer.names()
    assert [each["channels"] for each in first_of(trainer, 0.5)] == [0.15, 0.0, 0.4]
    flat = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.ones((8, 4))}, {"x": lx.TensorSpec(("batch", 8), "float32")})
    assert "channels" not in Trainer(flat, SPEC, None, 0).names()
    assert len(first_of(Trainer(flat, SPEC, None, 0), 0.5)) == 1


def test_channels_that_are_removed_make_what_is_chosen_larger_and_the_model_smaller():
    costs = {kind: [np.array([80.0, 20.0])] for kind in ("bytes", "operations")} | {"error": [np.array([0.0, 1.0])]}
    candidates = Candidates(
        Estimates([None], costs, {"bytes": 20.0, "operations": 0.0, "error": 0.0}),
        Constraints(max_drop=1.0, max_bytes=60),
        "metric",
    )
    assert candidates.within(1.0) == (1,)  # 40 bytes; (20 + 80) in float are too many
    assert candidates.within(1.0, removed=0.5) == (0,)  # a quarter of 100
    assert candidates.expected((0,), removed=0.5)["bytes"] == 25
    assert candidates.within(1.0, removed=0.5, more={"bytes": 2.5}) == (1,)  # 62 of 60 that may be


def test_a_training_removes_channels(trained):
    tuned, _ = trained
    small = next(each for each in tuned.trials if each.training.get("channels") == 0.15)
    assert tuned.build(small).weights["q"].shape == (8, 14)


def test_a_file_of_something_else_is_refused(optuna, tmp_path):
    for text in ("hello\nworld\n", "hello"):
        (tmp_path / "no.optuna").write_text(text)
        with pytest.raises(TuningError, match=r"no.optuna: Optuna's journal cannot be read"):
            Study("s", RANGES, FIRST, storage=tmp_path / "no.optuna")
        assert (tmp_path / "no.optuna").read_text() == text
