"""`leptonx eval` on labelled rows: float models, recipes, artifacts and models on servers."""

import cli_models as models
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.serve import Options, Server


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows and their classes, a few of them wrong for the model."""
    data = np.random.default_rng(9).standard_normal((40, models.IN)).astype(np.float32)
    labels = models.reference(data).argmax(1)
    labels[:4] = (labels[:4] + 1) % models.OUT
    file = tmp_path_factory.mktemp("rows") / "rows.npz"
    np.savez(file, x=data, label=labels)
    return file


def test_float_recipe_and_artifact_side_by_side(cli, plain, artifact, rows, tmp_path):
    report = tmp_path / "report.html"
    found = cli.json("eval", plain, artifact, "--recipe", "int8", "--rows", rows, "--report", report)
    sides = found["comparison"]["sides"]
    assert [side["name"] for side in sides] == [plain, str(artifact), "int8"]
    assert sides[0]["metrics"]["accuracy"] == 0.9
    assert np.sum(sides[0]["confusion"]) == 40
    assert sides[2]["resources"]["weights_on_disk"] < sides[0]["resources"]["weights_bytes"]
    data = np.load(rows)
    right = lx.load(artifact)(x=data["x"])["output"].argmax(1) == data["label"]
    assert sides[1]["metrics"]["accuracy"] == right.mean()
    assert found["evaluate"][plain]["largest"] > 0  # the model's own metrics, too
    assert "<svg" in report.read_text()
    text = cli.ok("eval", plain, artifact, "--rows", rows)
    assert "Newcombe" in text
    assert "calibration error" in text


def test_rows_of_the_model_itself(cli, variant, artifact):
    target = variant("evaluate=None, rows=lambda: {'x': data, 'label': fn(weights, data).argmax(1)}")
    found = cli.json("eval", target, artifact)
    assert found["float"]["accuracy"] == 1.0
    assert found["difference"]["accuracy"] == found["artifact"]["accuracy"] - 1.0


def test_a_model_on_a_server_answers_as_its_artifact(cli, artifact, rows):
    servable = lx.load(artifact)
    with Server(servable, Options(port=0)) as server:
        found = cli.json("eval", artifact, f"{server.url}/{servable.name}", "--rows", rows)
    one, two = found["comparison"]["sides"]
    assert one["metrics"] == two["metrics"]
    assert two["differences"]["accuracy"]["value"] == 0
    assert "difference" in found


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{artifact}", "--recipe", "int8", "--rows", "{rows}"], "--recipe needs a float model"),
        (["{artifact}", "{artifact}", "--rows", "{rows}"], "is given twice"),
        (["{plain}", "--rows", "{unlabelled}"], "there is no array 'label'"),
        (["{plain}", "--report", "report.html"], "--report needs labelled rows"),
        (["http://127.0.0.1:1", "--rows", "{rows}"], "expected the address of a server and a model"),
        (["{artifact}", "--rows", "{rows}", "--output", "other"], "there is no output 'other'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(cli, plain, artifact, rows, tmp_path, args, said):
    unlabelled = tmp_path / "unlabelled.npz"
    np.savez(unlabelled, x=np.zeros((2, models.IN), np.float32))
    places = {"plain": plain, "artifact": artifact, "rows": rows, "unlabelled": unlabelled}
    assert said in cli.refused("eval", *(arg.format(**places) for arg in args))
