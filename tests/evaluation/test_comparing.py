"""Models side by side."""

import json

import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.evaluation import compare, page

random = np.random.default_rng(0)
LABELS = random.integers(0, 4, 101)
X = (random.standard_normal((101, 4)) + 2 * np.eye(4)[LABELS]).astype(np.float32)


def first(x):
    return {"y": x}


def forgets_three(x):
    return {"y": x - np.float32([0, 0, 0, 3])}


def test_every_row_is_answered_once_in_batches_and_compared_in_pairs():
    sizes = []

    def counted(x):
        sizes.append(len(x))
        return {"y": x}

    found = compare({"float": counted, "small": forgets_three}, {"x": X}, LABELS, batch=32)
    assert set(sizes) == {32, 1}  # one shape, so one compilation, and calls of one row
    one, two = found.sides
    assert one.figures.metrics["accuracy"] == (X.argmax(1) == LABELS).mean()
    change = ((X - [0, 0, 0, 3]).argmax(1) == LABELS).mean() - one.figures.metrics["accuracy"]
    value, interval = two.differences["accuracy"]
    assert value == pytest.approx(change)
    assert interval.low <= value <= interval.high < 0
    assert (two.damage[0].label, two.damage[0].surely) == (3, True)
    assert one.differences == {}


def test_models_that_answer_alike_differ_by_nothing_for_certain():
    found = compare({"a": first, "b": first}, {"x": X}, LABELS)
    for name in ("recall", "precision", "f1", "auc", "calibration_error"):
        value, interval = found.sides[1].differences[name]
        assert (value, interval.low, interval.high) == (0, 0, 0)


def test_a_paired_interval_is_narrower_than_that_of_one_model():
    found = compare({"a": first, "b": lambda x: {"y": x + np.float32([0, 0.1, 0, 0])}}, {"x": X}, LABELS)
    own, paired = found.sides[1].intervals["f1"], found.sides[1].differences["f1"][1]
    assert paired.high - paired.low < (own.high - own.low) / 2


def test_what_is_said_is_json_and_a_page_that_loads_nothing():
    found = compare({"<a>": first, "b": forgets_three}, {"x": X}, LABELS, resources={"b": {"weights_bytes": 7.0}})
    again = json.loads(json.dumps(found.to_json()))
    assert again["sides"][1]["damage"][0]["label"] == 3
    assert again["sides"][1]["resources"] == {"weights_bytes": 7.0}
    assert again["sides"][1]["differences"]["accuracy"]["method"] == "Newcombe, paired"
    text = page("a & b", found)
    assert "&lt;a&gt;" in text
    assert "<a>" not in text
    assert "//" not in text
    assert text.count("<svg") == 2


@pytest.mark.parametrize(
    ("models", "labels", "said"),
    [
        ({"a": lambda x: {"y": x * np.nan}}, LABELS, "output 'y' of a is not finite in 101 of 101 rows"),
        ({"a": first, "b": lambda x: {"z": x}}, LABELS, "b has no output 'y'"),
        ({"a": first, "b": lambda x: {"y": x[:, :3]}}, LABELS, "b has 3 classes, and a 4"),
        ({"a": lambda x: {"y": x.astype(np.int32)}}, LABELS, "no output has classes"),
        ({"a": first}, LABELS[:5], "'x' is .101, 4., and there are 5 labels"),
        ({}, LABELS, "there is no model"),
    ],
)
def test_what_cannot_be_compared_is_named(models, labels, said):
    with pytest.raises(lx.LeptonError, match=said):
        compare(models, {"x": X}, labels)
