"""`leptonx tune`: the table, the document, and the files that it writes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import lepton_xla as lx
from lepton_xla.learning.lowering import lower
from lepton_xla.modelspec import load_named
from lepton_xla.recipe import Recipe

QUICK = ("--trials", 1, "--buckets", "batch=1")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A target with enough rows to judge points of accuracy."""
    file = tmp_path_factory.mktemp("tuned") / "small_model.py"
    file.write_text("""
import dataclasses
import jax.numpy as jnp
import numpy as np
import optax
import lepton_xla as lx

random = np.random.default_rng(0)
x = random.standard_normal((400, 8)).astype(np.float32)
w = random.standard_normal((8, 4)).astype(np.float32)
right = (x @ w).argmax(-1)


def evaluate(predict):
    return {"accuracy": (predict(x=x)["output"].argmax(-1) == right).mean()}


model = lx.ModelSpec(
    {"x": lx.TensorSpec(("batch", 8), "float32")}, fn=lambda w, x: x @ w, weights=w, buckets={"batch": (1,)},
    calibration=[{"x": x[:32]}], evaluate=evaluate,
)
training = lx.train.TrainSpec(
    lambda: None, lambda step: {"x": x[:100], "label": right[:100]}, 40, optax.sgd(0.1)
)
calls = []


def fails_later(predict):
    calls.append(1)
    if len(calls) > 2:
        raise ValueError("the labels are gone")
    return evaluate(predict)


later = dataclasses.replace(model, evaluate=fails_later)
bare = lx.ModelSpec({"x": lx.TensorSpec(("batch", 8), "float32")}, fn=lambda w, x: x @ w, weights=w)
""")
    return file


def test_the_best_is_printed_and_written(cli, classifier, tmp_path):
    journal, best, report, points = (tmp_path / name for name in ("a.jsonl", "best.toml", "a.html", "points"))
    files = ("--journal", journal, "-o", best, "--report", report, "--points", points)
    document = cli.json("tune", f"{classifier}:model", "--max-drop", 4, "--objective", "bytes", *QUICK, *files)
    assert document["best"]["name"] == "int8"
    assert document["stopped"] == "trials"
    assert document["float"] == {"accuracy": 1.0}
    assert Recipe.load(best).quantize[0].weights == "int8"
    assert [path.stem for path in points.iterdir()] == document["frontier"] == ["int8"]
    assert "<svg" in report.read_text()
    assert len(journal.read_text().splitlines()) > 4
    text = cli.ok("tune", f"{classifier}:model", "--max-drop", 4, "--objective", "bytes", *QUICK, *files)
    assert "the best" in text
    assert "All trials were spent." in text
    assert json.loads(journal.read_text().splitlines()[0])["identity"]["metric"] == "accuracy"
    asked = ("tune", f"{classifier}:model", "--max-drop", 4, "--objective", "bytes", *QUICK, *files[:2])
    for more in ((), ("--json",)):
        full = cli(*asked, "-o", "/dev/full", *more)
        assert full.exit_code == 2
        assert "/dev/full cannot be written" in full.stderr
        if more:  # what was found is shown all the same
            assert json.loads(full.stdout)["best"]["name"] == "int8"
        else:
            assert "The best is int8" in full.stdout


def test_constraints_that_nothing_keeps_to_end_with_one_line(cli, classifier):
    result = cli("tune", f"{classifier}:model", "--max-drop", 4, "--max-latency-ms", 1e-9, *QUICK)
    assert result.exit_code == 2
    assert "1 recipe measured" in result.stdout
    assert "no recipe that was measured keeps to the constraints; the nearest is int8" in result.stderr


def test_where_nothing_could_be_measured_it_says_why(cli, classifier):
    result = cli("tune", f"{classifier}:later", "--max-drop", 4, "--objective", "bytes", *QUICK)
    assert result.exit_code == 2
    assert "nothing was measured: " in result.stderr
    assert "the labels are gone" in result.stderr


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("model", ("--max-drop", 4, "--minutes", 0), "a budget of 0 minutes"),
        ("model", ("--max-drop", 4, "--max-bytes", "2 apples"), "'2 apples': expected bytes, such as 800000, 2MB"),
        ("model", ("--max-drop", 4, "--max-operations", "many"), "'many': expected multiply-adds, such as"),
        ("model", ("--max-drop", 4, "--max-latency-ms", "1,soon"), "'1,soon': expected milliseconds, such as 3"),
        ("model", ("--max-drop", 4, "--max-latency-ms", "1,2"), "2 limits, but calls are timed at 1 sizes"),
        ("model", (), "objective 'latency' needs max_drop"),
        ("model", ("--max-drop", 0.1), "2000 rows would do"),
        ("bare", ("--max-drop", 4), "has no evaluate"),
        ("model", ("--max-drop", 4, "-o", "/nowhere/at/all.toml"), "does not exist"),
        ("model", ("--max-drop", 4, "--metric", "f1"), "no metric 'f1': evaluate returns accuracy"),
    ],
)
def test_what_is_refused(cli, classifier, name, options, said):
    assert said in cli.refused("tune", f"{classifier}:{name}", *options)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_two_processes_share_what_they_train(classifier, tmp_path):
    pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path}/study.db"
    given = ("--max-drop", "9", "--objective", "bytes", *map(str, QUICK), "--trainings", "4", "--json")
    shared = ("--train", f"{classifier}:training", "--storage", storage)
    command = [sys.executable, "-m", "lepton_xla", "tune", f"{classifier}:model", *given, *shared]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [(each.communicate(timeout=900), each.returncode) for each in both]
    assert [code for _, code in ended] == [0, 0], ended
    trained = [[trial["name"] for trial in json.loads(out)["trials"] if trial["training"]] for (out, _), _ in ended]
    # The last to end has all: four, and one that the other had begun. None was trained twice.
    last, first = sorted(map(set, trained), key=len, reverse=True)
    assert 4 <= len(last) <= 5
    assert first <= last
    assert all(len(set(each)) == len(each) for each in trained)
    study = optuna_study(storage)
    owners = [trial.user_attrs["owner"] for trial in study.trials if "found" in trial.user_attrs]
    assert len(owners) == len(last)
    assert len(set(owners)) == 2  # both worked


def optuna_study(storage):
    import optuna

    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


def test_the_artifact_has_a_certificate_that_its_signature_signs(cli, classifier, tmp_path, monkeypatch):
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path / "times"))  # what was measured here is not measured again
    cli("keys", "new", tmp_path / "release")
    artifact, prices = tmp_path / "small.lepton", tmp_path / "prices.toml"
    prices.write_text("currency = 'EUR'\n[per_hour]\ncpu = 0.36\n")
    served = ("--slo", "p99=1s", "--rate", 10, "--prices", prices)
    made = cli(
        "tune", f"{classifier}:model", "--max-drop", 5, "--objective", "bytes", *QUICK, "--json",
        "--artifact", artifact, "--key", tmp_path / "release.key", *served,
    )  # fmt: skip
    deployments = json.loads(made.stdout)["deployments"]
    cheapest = deployments["found"][0]
    assert deployments["currency"] == "EUR"
    assert (cheapest["target"], cheapest["replicas"], cheapest["source"]) == ("cpu", 1, "measured")
    assert cheapest["per_million"] == pytest.approx(0.36 / (10 * 3600) * 1e6)
    said = cli("verify", artifact, "--key", tmp_path / "release.pub").stdout
    assert "certificate, signed by release" in said
    assert "promises accuracy of at least 0.9" in said
    assert "certificate: accuracy 1 ->" in " ".join(cli("inspect", artifact).stdout.split())
    # What is learned later is lowered by the recipe that is stored in it.
    spec = load_named(f"{classifier}:model", lx.ModelSpec)
    update = lower(spec.program(), artifact, lx.load(artifact), spec.calibration, "2")
    assert update.manifest.weights
    assert any("int8" in str(each.dtype) for each in update.manifest.weights)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--slo", "p99=1s"), "--slo, --rate and --prices belong together"),
        (("--key", "a.key"), "--key without --artifact changes nothing; give that too"),
        (("--trainings", 5), "--trainings without --train"),
        (("--trainings", 5, "--storage", "a.db"), "--storage and --trainings without --train"),
        (("--overwrite",), "--overwrite without --artifact"),
        (("--targets", "cpu"), "--targets without --slo"),
        (("--new-journal",), "--new-journal without --journal"),
        (("--artifact", "my model.lepton"), "model name 'my model'"),
        (("--artifact", "a.lepton", "--key", "absent.key"), "absent.key"),
        (("--report", "."), ". is a folder; give a file"),
        (("--points", __file__), "is a file; give a folder"),
        (
            ("--slo", "p99=1s", "--rate", 1, "--prices", "PRICES", "--targets", "v5x:1x1"),
            "topology 'v5x:1x1': expected",
        ),
        (("--slo", "fast", "--rate", 1, "--prices", "p.toml"), "such as p99=20ms"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(cli, tmp_path, more, said):
    (tmp_path / "prices.toml").write_text('[per_hour]\n"v5x:1x1" = 1.0\n')
    given = [tmp_path / "prices.toml" if each == "PRICES" else each for each in more]
    result = cli("tune", "no.py:model", "--max-drop", 1, *given)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
