"""Metrics against scikit-learn's, and intervals against published figures and simulation."""

import math

import numpy as np
import pytest
from sklearn import metrics

import lepton_xla as lx
from lepton_xla.evaluation import measure
from lepton_xla.evaluation.damage import class_damage
from lepton_xla.evaluation.figures import resampled
from lepton_xla.evaluation.intervals import bootstrap_interval, paired_interval, share_interval, sign_test
from lepton_xla.evaluation.scores import are_logits, probabilities_of


def rows(seed, count, classes, ties=False):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    logits = random.standard_normal((count, classes)) + 1.5 * np.eye(classes)[labels]
    if ties:
        logits = np.round(logits)
    return probabilities_of(logits, logits=True), labels


@pytest.mark.parametrize(("classes", "ties"), [(2, False), (2, True), (5, False), (5, True)])
def test_metrics_are_scikit_learns(classes, ties):
    chances, labels = rows(classes, 400, classes, ties)
    found, predicted = measure(chances, labels), chances.argmax(1)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(labels, predicted, zero_division=0)
    assert found.confusion.tolist() == metrics.confusion_matrix(labels, predicted).tolist()
    for mine, theirs in ((found.precision, precision), (found.recall, recall), (found.f1, f1)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)
    auc = (
        metrics.roc_auc_score(labels, chances[:, 1])
        if classes == 2
        else metrics.roc_auc_score(labels, chances, multi_class="ovr")
    )
    expected = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "recall": recall.mean(),
        "precision": precision.mean(),
        "f1": f1.mean(),
        "auc": auc,
    }
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_a_class_that_never_occurs_counts_in_no_mean():
    chances, labels = rows(0, 200, 4)
    labels = np.where(labels == 2, 1, labels)
    found = measure(chances, labels)
    recall = metrics.recall_score(labels, chances.argmax(1), labels=[0, 1, 3], average="macro")
    assert found.metrics["recall"] == pytest.approx(recall)
    assert math.isnan(found.recall[2])
    assert math.isfinite(found.metrics["auc"])


def test_calibration_error_of_a_case_by_hand():
    # Two rows at 0.9 of which one is right, two at 0.6 that are both right: |0.9 - 0.5| / 2 + |0.6 - 1| / 2.
    chances = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    found = measure(chances, np.array([0, 1, 0, 1]))
    assert found.metrics["calibration_error"] == pytest.approx(0.4)
    assert found.bins[13].tolist() == pytest.approx([2, 0.9, 0.5])
    assert found.bins[8].tolist() == pytest.approx([2, 0.6, 1.0])


def test_a_resample_is_the_metric_of_the_repeated_rows():
    chances, labels = rows(3, 150, 3, ties=True)
    counts = np.random.default_rng(0).multinomial(150, np.full(150, 1 / 150), 4).astype(np.float64)
    found = resampled(chances, labels, counts)
    for k, each in enumerate(counts):
        places = np.repeat(np.arange(150), each.astype(int))
        expected = measure(chances[places], labels[places]).metrics
        assert {name: values[k] for name, values in found.items()} == pytest.approx(expected, rel=1e-9)


def test_intervals_of_published_cases():
    # Newcombe 1998: single proportions, table I, method 3; paired differences, table III, method 10.
    found = [share_interval(*case) for case in ((81, 263), (15, 148), (0, 20), (1, 29))]
    ends = [(round(each.low, 4), round(each.high, 4)) for each in found]
    assert ends == [(0.2553, 0.3662), (0.0624, 0.1605), (0.0, 0.1611), (0.0061, 0.1718)]
    found = [paired_interval(36, 2, 12, 0), paired_interval(20, 0, 0, 0)]
    assert [(round(each.low, 4), round(each.high, 4)) for each in found] == [(0.0569, 0.3404), (-0.1611, 0.1611)]


def test_a_paired_interval_corrects_for_continuity():
    # By hand: 40 x 45 - 5 x 10 = 1750, less half of 100 rows, over the root of 45 x 55 x 50 x 50.
    phi = 1700 / math.sqrt(45 * 55 * 50 * 50)
    one, two, found = share_interval(45, 100), share_interval(50, 100), paired_interval(40, 5, 10, 45)
    down, up = 0.5 - two.low, one.high - 0.45
    assert found.low == pytest.approx(0.05 - math.sqrt(down**2 - 2 * phi * down * up + up**2), abs=1e-12)


def test_paired_intervals_cover():
    random = np.random.default_rng(1)
    shares = [0.85, 0.08, 0.03, 0.04]  # the second is 5 points worse
    covered = [
        each.low <= -0.05 <= each.high
        for each in (paired_interval(*random.multinomial(300, shares)) for _ in range(2000))
    ]
    assert 0.93 < np.mean(covered) < 0.975


def test_a_metric_that_is_undefined_on_most_resamples_has_no_interval():
    assert bootstrap_interval(np.full(100, np.nan), paired=True) is None


def test_the_class_that_lost_is_named_and_chance_is_corrected():
    labels = np.repeat([0, 1, 2], 100)
    before = np.ones(300, bool)
    after = before.copy()
    after[100:110] = False  # ten rows of class 1
    after[200] = False
    found = class_damage(before, after, labels)
    assert [(each.label, each.lost, each.gained, each.surely) for each in found] == [
        (1, 10, 0, True),
        (2, 1, 0, False),
        (0, 0, 0, False),
    ]
    assert found[0].chance == pytest.approx(3 * sign_test(10, 0))
    assert found[0].before - found[0].after == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("scores", "logits"),
    [([[0.2, 0.8]], False), ([[0.2, 0.2]], True), ([[3.0, -1]], True), ([0.3], False), ([[1.5]], True)],
)
def test_logits_are_told_from_probabilities(scores, logits):
    assert are_logits(np.array(scores)) is logits
    assert probabilities_of(np.array(scores), logits=logits).sum() == pytest.approx(1)


def test_labels_that_are_no_classes_are_refused():
    for labels in (np.array([0.0, 1.0]), np.array([0, 2]), np.array([-1, 0]), np.array([0])):
        with pytest.raises(lx.InputError, match="expected 2 integers from 0 to 1"):
            measure(np.eye(2), labels)
