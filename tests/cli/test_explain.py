"""`leptonx compile --explain` and `leptonx explain`."""

import cli_models as models
import numpy as np
import pytest

import lepton_xla as lx


@pytest.fixture(scope="module")
def explained(cli, plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained")
    cli.ok("compile", plain, "--explain", "gradients", "--no-evaluate", "-o", folder / "plain.lepton")
    return folder / "plain-explain.lepton"


def test_attributions_add_up_and_the_largest_are_named(cli, explained, tmp_path):
    np.save(tmp_path / "x.npy", models.data()[:3])
    found = cli.json("explain", explained, "--input", f"x={tmp_path / 'x.npy'}", "--top", "2")
    exact = models.reference(models.data()[:3])
    for row, expected in zip(found["rows"], exact, strict=True):
        assert row["target"] == expected.argmax()
        assert row["score"] == pytest.approx(expected.max(), rel=1e-4)
        assert row["explained"] == pytest.approx(row["score"] - row["baseline"], rel=1e-3)
        values = np.array(row["attributions"]["x"])
        (place,) = row["top"]["x"][0]["at"]
        assert place == np.abs(values).argmax()
    asked = cli.json("explain", explained, "--input", f"x={tmp_path / 'x.npy'}", "--target", "2")
    assert [row["target"] for row in asked["rows"]] == [2, 2, 2]
    assert "class" in cli.ok("explain", explained, "--input", f"x={tmp_path / 'x.npy'}")


def test_an_image_has_a_heat_map(cli, tmp_path):
    weight = np.zeros((16, 2), np.float32)
    weight[5] = 1, -1
    program = lx.trace(
        lambda w, x: x.reshape(x.shape[0], -1) @ w, weight, {"x": lx.TensorSpec(("batch", 4, 4, 1), "float32")}
    )
    lx.compile(lx.explanation.occlusion(program), {"batch": (1,)}, name="why").save(tmp_path / "why.lepton")
    np.save(tmp_path / "x.npy", np.ones((1, 4, 4, 1), np.float32))
    lines = cli.ok("explain", tmp_path / "why.lepton", "--input", f"x={tmp_path / 'x.npy'}").splitlines()
    assert " @" in [line.rstrip() for line in lines]


def test_an_artifact_without_attributions_is_refused(cli, artifact, tmp_path):
    np.save(tmp_path / "x.npy", models.data()[:1])
    said = cli.refused("explain", artifact, "--input", f"x={tmp_path / 'x.npy'}")
    assert "gives no attributions" in said


def test_an_input_given_twice_is_refused(cli, explained, tmp_path):
    np.save(tmp_path / "x.npy", models.data()[:1])
    said = cli.refused("explain", explained, *("--input", f"x={tmp_path / 'x.npy'}") * 2)
    assert "input 'x' is given twice" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"x": 3}', "input 'x' has 0 dimensions"),
        ('{"x": [[1, 2], [3]]}', "input 'x' is not a nested list of numbers"),
        ("{}", "input 'x' is missing"),
        ('{"y": [1]}', "unknown input 'y'"),
    ],
)
def test_inputs_without_rows_are_refused(cli, explained, tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    assert said in cli.refused("explain", explained, "--input", tmp_path / "x.json")
