"""Settings and partitions."""

import fleets
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.federated import Federation, Privacy, partition


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds = 0"),
        ({"batch_rows": True}, "batch_rows = True"),
        ({"participation": 1.5}, "participation = 1.5; expected a number above 0 and at most 1"),
        ({"alpha": float("nan")}, "alpha = nan"),
        ({"proximal": -1}, "proximal = -1"),
        ({"momentum": 1.0}, "momentum = 1.0; expected a number above 0 and below 1"),
        ({"rule": "median"}, "rule = 'median'; expected average, momentum, adam"),
        ({"updates": "int2"}, "updates = 'int2'; expected float32, int8, int4, int3, top-k"),
        ({"updates": "int8", "secure": True}, "cannot take updates = 'int8'"),
        ({"updates": "top-k", "secure": True}, "cannot take updates = 'top-k'"),
        ({"personal": "head"}, "personal is a text"),
        ({"personal": ("(",)}, "is no regular expression"),
        ({"most_norm": 0.0}, "most_norm = 0.0"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(lx.FederatedError) as found:
        Federation(**changes)
    assert message in str(found.value)


@pytest.mark.parametrize(
    "changes", [{"epsilon": -1.0}, {"delta": 1.0}, {"share": 0.0}, {"noise": 0.0}, {"clip_norm": float("inf") * 0}]
)
def test_privacy_out_of_range_is_named(changes):
    with pytest.raises(lx.FederatedError, match=next(iter(changes))):
        Privacy(**changes)


def test_settings_travel_as_json():
    settings = Federation(rule="adam", personal=("head",), privacy=Privacy(noise=2.0))
    assert Federation.of_json(settings.to_json()) == settings
    for text in ("{", '{"rounds": "many"}', '{"rule": "x"}', "[]"):
        with pytest.raises(lx.FederatedError):
            Federation.of_json(text)
    with pytest.raises(lx.FederatedError, match="alpha"):
        Federation.of_json('{"alpha": 3.0}')


def test_personal_patterns_must_leave_something_shared():
    with pytest.raises(lx.FederatedError, match="matches no weight"):
        Federation(personal=("tail",)).private(["body", "head"])
    with pytest.raises(lx.FederatedError, match="nothing is shared"):
        Federation(personal=(".*",)).private(["body", "head"])


@pytest.mark.parametrize("label", [None, "label"])
def test_every_row_is_in_one_part(label):
    rows = {**fleets.table(103), "place": np.arange(103)}
    parts = partition(rows, 10, label=label, concentration=0.5)
    assert sorted(np.concatenate([part["place"] for part in parts])) == list(range(103))
    for part in parts:
        np.testing.assert_array_equal(part["x"], rows["x"][part["place"]])
    again = partition(rows, 10, label=label, concentration=0.5)
    assert [len(part["x"]) for part in parts] == [len(part["x"]) for part in again]


def test_a_low_concentration_gives_few_classes():
    rows = fleets.table(3000)

    def largest(label, concentration):
        parts = partition(rows, 10, label=label, concentration=concentration)
        return np.mean([np.bincount(part["label"], minlength=3).max() / len(part["label"]) for part in parts])

    assert largest(None, 1.0) < 0.42
    assert largest("label", 1000.0) < 0.42
    assert largest("label", 0.05) > 0.8


def test_rows_that_cannot_be_split_are_refused():
    rows = fleets.table(6)
    with pytest.raises(lx.FederatedError, match="6 rows cannot be split among 7 clients"):
        partition(rows, 7)
    with pytest.raises(lx.FederatedError, match="no column 'class'"):
        partition(rows, 2, label="class")
    with pytest.raises(lx.FederatedError, match="larger concentration"):
        partition(rows, 6, label="label", concentration=0.01)
