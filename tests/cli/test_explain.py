"""`leptonx compile --explain` and `leptonx explain`."""

import cli_models as models
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.cli.explain import _shrunk


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


def test_tokens_of_a_text_are_named(cli, tmp_path):
    tokenizer = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"?": 0, "lost": 1}, "unk_token": "?"}}'
    program = lx.trace(
        lambda w, tokens: w[tokens].sum(1),
        np.float32([[0, 0], [0, 2]]),
        {"tokens": lx.TensorSpec(("batch", 2), "int32")},
    )
    explained = lx.explanation.occlusion(lx.take_texts(program, tokenizer))
    lx.compile(explained, {"batch": (1,)}, name="why").save(tmp_path / "why.lepton")
    (tmp_path / "q.txt").write_text("lost")
    call = ("explain", tmp_path / "why.lepton", "--input", f"text={tmp_path / 'q.txt'}")
    (row,) = cli.json(*call)["rows"]
    assert row["tokens"]["tokens"] == ["lost", "?"]
    assert row["top"]["tokens"][0] == {"at": [0], "token": "lost", "attribution": 2.0}
    assert ["lost", "0", "+2"] in [line.split() for line in cli.ok(*call).splitlines()]


def test_a_picture_of_characters_is_of_the_image_alone_and_not_too_wide():
    values = np.zeros((200, 300, 3), np.float32)
    values[4, 150], values[190] = 1, 9  # the latter beyond the image
    shrunk = _shrunk(values, (100, 151))
    assert shrunk.shape == (17, 51)  # cells of 6 x 3 pixels
    assert (shrunk[0, 50], shrunk.sum()) == (3, 3)
    assert _shrunk(values[:20, :30], (20, 30)).shape == (20, 30)


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
