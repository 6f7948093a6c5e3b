"""`leptonx sensitivity`: the ranking on stdout, as a document, in a file and as a picture."""

import json
import sys
import types

import numpy as np
import pytest
from matplotlib.figure import Figure

from lepton_xla.cli.sensitivity import _draw


@pytest.fixture(scope="module")
def document(cli, plain, files):
    return cli.json("sensitivity", plain, "--recipe", files / "int8.toml")


def test_the_document(document, plain):
    assert document["target"] == plain
    assert document["metric"] == "mean"
    assert set(document["float"]) == {"mean", "largest"}
    assert {entry["site"] for entry in document["sites"]} == {"hidden", "head"}
    for entry in document["sites"]:
        assert entry["drop"] == pytest.approx(document["float"]["mean"] - entry["metrics"]["mean"])
        assert 0 < entry["output_error"] < 0.05
        assert entry["bytes_saved"] == entry["bytes_before"] - entry["bytes_after"]
    drops = [entry["drop"] for entry in document["sites"]]
    assert drops == sorted(drops, reverse=True)
    assert document["together"]["sites"] == ["hidden", "head"]


def test_the_table(cli, plain, files):
    text = cli.ok("sensitivity", plain, "--recipe", files / "int8.toml", "--metric", "output", "--top", 1)
    assert "the most sensitive" in text
    assert ("hidden" in text) != ("head" in text)
    assert "all together" in text
    assert "1 less sensitive weights are not shown." in text
    assert "The rule: int8 weights, int8 activations dynamic." in text


def test_a_loss(cli, plain, files, document):
    found = cli.json(
        "sensitivity", plain, "--recipe", files / "static.toml", "--metric", "largest", "--lower-is-better"
    )
    for entry in found["sites"]:
        assert entry["drop"] == pytest.approx(entry["metrics"]["largest"] - document["float"]["largest"])


def test_files(cli, plain, files, tmp_path):
    path = tmp_path / "ranking.json"
    shown = cli.json("sensitivity", plain, "--recipe", files / "int8.toml", "--latency", "-o", path)
    assert json.loads(path.read_text()) == shown
    assert all(entry["latency_ratio"] > 0 for entry in shown["sites"])
    assert [timing["sizes"] for timing in shown["sites"][0]["timings"]] == [{"batch": 1}]


def test_without_evaluate_and_calibration(cli, variant):
    line = cli.refused("sensitivity", variant("evaluate=None, calibration=None"))
    assert "needs calibration data" in line
    assert cli.json("sensitivity", variant("evaluate=None"))["metric"] == "output"


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--recipe", "prune50"], "recipe 'prune50' quantizes no weight"),
        (["--metric", "accuracy"], "no metric 'accuracy': evaluate returns mean, largest"),
        (["--top", "0"], "--top"),
        (["-o", "nowhere/a.json"], "nowhere/a.json: the folder"),
        (["--plot", "nowhere/a.png"], "a.png: the folder"),
    ],
)
def test_what_cannot_be_done(cli, plain, args, part, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=object))
    assert part in cli.refused("sensitivity", plain, *args)


def test_a_plot_without_its_library(cli, plain, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = cli.refused("sensitivity", plain, "--plot", tmp_path / "a.png")
    assert "--plot needs the package matplotlib: pip install 'lepton-xla[plot]'" in line


def test_a_plot_has_a_bar_a_weight(document, tmp_path):
    figure = Figure()
    path = tmp_path / "ranking.png"
    _draw(figure, document, 1, str(path))
    (axes,) = figure.axes
    (bar,) = axes.patches
    assert bar.get_width() == pytest.approx(document["sites"][0]["drop"])
    assert [label.get_text() for label in axes.get_yticklabels()] == [document["sites"][0]["site"]]
    assert axes.get_xlabel() == "loss of mean"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_kind_of_picture_that_is_none(cli, plain, files, tmp_path):
    args = ["--recipe", files / "int8.toml", "--metric", "output", "--plot"]
    assert "ranking.nothing cannot be written" in cli.refused("sensitivity", plain, *args, tmp_path / "ranking.nothing")
    cli.ok("sensitivity", plain, *args, tmp_path / "ranking.svg")
    assert "<svg" in (tmp_path / "ranking.svg").read_text()


def test_numbers_are_those_of_the_model(document):
    assert np.isfinite([entry["cosine"] for entry in document["sites"]]).all()
    assert all(0.99 < entry["cosine"] <= 1.0001 for entry in document["sites"])
