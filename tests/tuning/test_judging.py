"""Drops and their intervals, against the rows counted by hand; what cannot be judged is refused."""

import math

import numpy as np
import pytest
from scipy import stats

from lepton_xla.errors import ModelError, TuningError
from lepton_xla.program import TensorSpec, trace
from lepton_xla.tuning.judging import Judge

ROWS = 400
X = np.random.default_rng(0).standard_normal((ROWS, 3)).astype(np.float32)
LABELS = X.argmax(-1)
PROGRAM = trace(
    lambda w, x: x @ w["one"], {"one": np.eye(3, dtype=np.float32)}, {"x": TensorSpec(("batch", 3), "float32")}
)


def exact(x):
    return {"output": np.asarray(x)}


def accuracy(predict):
    """Asks in two calls of different size."""
    answers = np.concatenate([predict(x=X[:150])["output"], predict(x=X[150:])["output"]])
    return {"accuracy": float((answers.argmax(-1) == LABELS).mean()), "loss": float(np.square(answers - X).mean())}


def wrong_at(rows):
    """A candidate that is wrong in these rows."""
    lookup = {x.tobytes(): row in set(rows) for row, x in enumerate(X)}

    def predict(x):
        return {"output": np.stack([-row if lookup[row.tobytes()] else row for row in x])}

    return predict


def test_each_part_counts_its_own_rows():
    judge = Judge(PROGRAM, accuracy, exact, seed=3)
    order = np.random.default_rng(3).permutation(ROWS)
    wrong = [*order[:30], *order[-10:]]  # of the first half, and of the other
    found = judge(wrong_at(wrong))
    assert found.judged == pytest.approx(100 * 30 / 200)
    assert found.reported.points == pytest.approx(100 * 10 / 200)
    assert found.metrics["accuracy"] == pytest.approx(0.9)
    assert found.output_error == pytest.approx(np.linalg.norm(2 * X[wrong]) / np.linalg.norm(X))


def test_the_interval_covers_the_true_drop_as_often_as_it_says():
    judge = Judge(PROGRAM, accuracy, exact)
    covered = []
    for seed in range(60):
        wrong = np.flatnonzero(np.random.default_rng(seed).random(ROWS) < 0.08)
        found = judge(wrong_at(wrong)).reported
        covered.append(found.low <= 8 <= found.high)
        rate = found.points / 100
        normal = 100 * 1.96 * math.sqrt(rate * (1 - rate) / found.rows)
        assert 0.6 * normal < found.high - found.points < 1.7 * normal
    assert sum(covered) >= stats.binom.ppf(0.001, 60, 0.9)


def test_a_drop_within_noise_is_called_that_and_how_many_rows_would_tell():
    judge = Judge(PROGRAM, accuracy, exact)
    none = judge(exact, max_drop=0.5).reported
    assert (none.points, none.low, none.high) == (0, -1.5, 1.5)  # the rule of three: 3 / 200 rows
    assert none.is_noise
    assert none.enough == 2 * 600
    assert "within noise" in str(none)
    many = judge(wrong_at(range(0, ROWS, 5)), max_drop=0.5).reported
    assert not many.is_noise
    assert many.low > 10
    assert many.enough == 0


def test_of_a_loss_a_rise_is_a_drop():
    judge = Judge(PROGRAM, accuracy, exact, metric="loss", lower_is_better=True)
    found = judge(wrong_at(range(ROWS)))
    assert found.judged == pytest.approx(
        100 * np.square(2 * X[np.sort(np.random.default_rng(0).permutation(ROWS)[:200])]).mean(), rel=1e-4
    )
    assert found.judged > 0


def test_too_few_rows_say_how_many_would_do():
    judge = Judge(PROGRAM, accuracy, exact)
    judge.check_resolution(0.5)
    with pytest.raises(
        TuningError, match=r"200 judge candidates: one of them is 0.50 points, more than the 0.2 .* 1000 rows"
    ):
        judge.check_resolution(0.2)
    mean = Judge(PROGRAM, lambda predict: {"mean": float(predict(x=X)["output"].mean())}, exact)
    mean.check_resolution(0.01)  # no share of rows
    with pytest.raises(TuningError, match="asks for 1 rows"):
        Judge(PROGRAM, lambda predict: {"mean": float(predict(x=X[:1])["output"].mean())}, exact)


def raising(_predict):
    raise KeyError("labels.csv")


def model_error(_predict):
    raise ModelError("its own")


def noisy(predict):
    return {"accuracy": accuracy(predict)["accuracy"] + np.random.default_rng().random()}


def other_rows(predict):
    rows = np.random.default_rng().permutation(ROWS)[:100]
    return {"accuracy": float((predict(x=X[rows])["output"].argmax(-1) == LABELS[rows]).mean())}


@pytest.mark.parametrize(
    ("evaluate", "error", "said"),
    [
        (raising, TuningError, "evaluate fails: KeyError: 'labels.csv'"),
        (model_error, ModelError, "its own"),
        (
            lambda predict: {"a": math.nan, **accuracy(predict)},
            TuningError,
            "evaluate gives a = nan for the float model",
        ),
        (lambda predict: {}, TuningError, "returns no metric"),
        (lambda predict: 3, TuningError, "evaluate fails: TypeError"),
        (noisy, TuningError, "must not be random"),
        (other_rows, TuningError, "asks for other rows each time"),
    ],
)
def test_an_evaluate_that_cannot_judge(evaluate, error, said):
    with pytest.raises(error, match=said):
        Judge(PROGRAM, evaluate, exact)


def test_a_candidate_that_gives_nan_or_other_shapes():
    judge = Judge(PROGRAM, accuracy, exact)
    with pytest.raises(TuningError, match="loss = nan for this candidate"):
        judge(lambda x: {"output": np.full_like(x, np.nan)})
    with pytest.raises(TuningError, match="has shape"):
        judge(lambda x: {"output": x[:, :1]})
    with pytest.raises(TuningError, match="no metric 'f1': evaluate returns accuracy, loss"):
        Judge(PROGRAM, accuracy, exact, metric="f1")
