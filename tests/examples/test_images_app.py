"""The images application runs to its end on invented images, and its figures are written beside their aims."""

import importlib
import json
import pathlib
import sys

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "apps"

pytest.importorskip("PIL.Image")


@pytest.fixture
def app(monkeypatch):
    """The modules of the application."""
    for folder in (FOLDER, FOLDER / "images"):
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("run"), importlib.import_module("digits_data"), importlib.import_module("reports")
    for name in ("run", "digits_data", "reports"):
        sys.modules.pop(name, None)


def invented(digits_data):
    """Each class is a bright bar at a height of its own."""
    labels = np.arange(60, dtype=np.int32) % 10
    images = np.zeros((60, 28, 28, 1), np.float32)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 3 : 2 * label + 5] = 1.0
    return digits_data.Digits(images, labels, images, labels, "invented images")


def test_augmentation_moves_images_a_little(app):
    digits_data = app[1]
    images = invented(digits_data).images
    found = digits_data.augmented(images[:4], np.random.default_rng(0))
    assert found.shape == images[:4].shape
    assert 0 < np.abs(found - images[:4]).mean() < 0.3
    np.testing.assert_array_equal(found, digits_data.augmented(images[:4], np.random.default_rng(0)))


def test_figures_are_written_beside_their_aims(app, tmp_path, capsys):
    reports = app[2]
    assert not reports.write("one", {"a": 1.0, "b": 5}, {"a": (">=", 2.0), "b": ("<=", 6.0)}, tmp_path)
    assert reports.write("two", {"a": 3.0}, {"a": (">=", 2.0)}, tmp_path)
    known = json.loads((tmp_path / "summary.json").read_text())
    assert known["one"]["aims"] == {"a": [">=", 2.0, False], "b": ["<=", 6.0, True]}
    assert list(known) == ["one", "two"]
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.slow
def test_the_application_runs(app, tmp_path, monkeypatch):
    run, digits_data, _ = app
    monkeypatch.setattr(digits_data, "data", lambda: invented(digits_data))
    monkeypatch.setattr(run, "REQUESTS", 20)
    figures = run.once(0, 4, tmp_path)
    assert figures["weights_bytes"] < figures["weights_bytes_float"] / 4
    assert 0 <= figures["lowest_recall"] <= figures["accuracy"] <= 1
    assert figures["p99_ms"] > 0
