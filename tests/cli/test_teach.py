"""`leptonx teach`: answers of a model file and of an artifact."""

import cli_models
import numpy as np
import pytest

from lepton_xla.train import Answers


@pytest.fixture
def data(tmp_path):
    rows = np.random.default_rng(3).standard_normal((10, cli_models.IN)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=rows[:6])
    np.savez(tmp_path / "b.npz", x=rows[6:])
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "id.npy", np.arange(100, 110))
    return tmp_path


def test_a_model_and_its_artifact_give_the_same_answers(cli, plain, artifact, data):
    printed = cli.json("teach", plain, data / "a.npz", data / "b.npz", "--top-k", "2", "-o", data / "of-model")
    assert (printed["samples"], printed["classes"], printed["top_k"]) == (10, cli_models.OUT, 2)
    said = cli.ok(
        "teach",
        artifact,
        f"x={data / 'x.npy'}",
        f"id={data / 'id.npy'}",
        "--top-k",
        2,
        "-o",
        data / "of-artifact",
        "--batch",
        3,
    )
    assert "10 answers, the 2 largest of 4 logits each" in said
    model = Answers.load(data / "of-model").lookup(np.arange(10))
    compiled = Answers.load(data / "of-artifact").lookup(np.arange(100, 110))
    # The artifact is int8, so the order of close logits may differ.
    best = model["teacher:logits"].view(np.float32)[:, 0]
    np.testing.assert_allclose(compiled["teacher:logits"].view(np.float32)[:, 0], best, rtol=0.1, atol=0.5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x={data}/x.npy", "--top-k", "5"], "top_k = 5; the teacher has 4 classes"),
        (["x={data}/x.npy", "--top-k", "2", "--temperatures", "hot"], "--temperatures 'hot': expected numbers"),
        (["id={data}/id.npy", "--top-k", "2"], "the data has no 'x'; the model takes it as float32[batch, 16]"),
        (["x={data}/x.npy", "x={data}/id.npy", "--top-k", "2"], "the files' 'x' cannot be joined row after row"),
        (["{data}/a.npz", "id={data}/id.npy", "--top-k", "2"], "the data has these numbers of rows"),
        (["{data}/missing.npz", "--top-k", "2"], "No such file"),
    ],
)
def test_bad_input_is_one_line(cli, plain, data, args, message):
    assert message in cli.refused(
        "teach", plain, *(arg.replace("{data}", str(data)) for arg in args), "-o", data / "out"
    )
