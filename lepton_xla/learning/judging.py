"""Whether a new version is better than the one that serves: on samples that it was not trained on, and on old data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from lepton_xla.compiler import Servable
from lepton_xla.dtypes import classes_of
from lepton_xla.errors import LearningError
from lepton_xla.evaluation.intervals import sign_test
from lepton_xla.generation.rows import text_of_tokens
from lepton_xla.modelspec import Predict, figures_of

# A metric with such a word in its name is better when it is smaller, unless somebody says otherwise.
_LOSSES = ("loss", "error", "perplexity")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How two versions compare.

    Attributes:
        better: whether the new one may take the other's place.
        reason: why, or why not.
        rows: samples that it was judged by.
        accuracy_before, accuracy: on those, of the version that serves and of the new one.
        chance: the probability of so many more right answers if both were equally good.
        old_before, old: metrics on old data.
    """

    better: bool
    reason: str
    rows: int
    accuracy_before: float
    accuracy: float
    chance: float
    old_before: dict[str, float]
    old: dict[str, float]


def judge(
    before: Predict,
    after: Predict,
    inputs: Mapping[str, np.ndarray],
    labels: np.ndarray,
    output: str,
    evaluate: Callable[[Predict], Mapping[str, float]],
    *,
    max_drop: float = 0.02,
    confidence: float = 0.95,
    lower_is_better: Collection[str] = (),
    higher_is_better: Collection[str] = (),
) -> Verdict:
    """Compare a new version with the one that serves.

    Args:
        before, after: the two, as they will be served.
        inputs: name -> array `[rows, ...]`, of samples that were not trained on.
        labels: the right class of each row, `[rows]`.
        output: name of the output whose largest element is the answer.
        evaluate: metrics on old data.
        max_drop: how far a metric on old data may get worse.
        confidence: the new version must be right more often with so much confidence, by a one-sided sign test on the
            rows that only one of them gets right (McNemar 1947).
        lower_is_better: metrics that are better when they are smaller, beside those whose names hold `loss`, `error` or
            `perplexity`.
        higher_is_better: metrics of such names that are better when they are larger all the same.

    Raises:
        LearningError: if the old metrics are no numbers, or there is none of a name that is given.

    >>> x, labels = np.eye(4, dtype=np.float32)[[0, 1, 2, 3] * 5], np.array([0, 1, 2, 3] * 5)
    >>> verdict = judge(
    ...     lambda x: {"y": -x}, lambda x: {"y": x}, {"x": x}, labels, "y", lambda predict: {"accuracy": 0.9}
    ... )
    >>> verdict.better, verdict.accuracy_before, verdict.accuracy
    (True, 0.0, 1.0)
    """
    right = [classes_of(np.asarray(predict(**inputs)[output])) == labels for predict in (before, after)]
    figures = [figures_of(evaluate(each), LearningError) for each in (before, after)]
    return _verdict(right, figures, max_drop, confidence, _losses(figures[0], lower_is_better, higher_is_better))


def judge_replies(
    before: Servable,
    after: Servable,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[str],
    evaluate: Callable[[Predict], Mapping[str, float]],
    *,
    max_drop: float = 0.02,
    confidence: float = 0.95,
    lower_is_better: Collection[str] = (),
    higher_is_better: Collection[str] = (),
) -> Verdict:
    """As `judge`, of models that generate: right is the whole reply, greedily.

    Args:
        before, after: the two, as they will be served.
        prompts: tokens of prompts that were not trained on.
        replies: their right replies.
        evaluate: metrics on old data, by the tokens that follow prompts: it gets the models as they are called.
        max_drop, confidence, lower_is_better, higher_is_better: as of `judge`.
    """
    right = [
        np.array([text == reply for text, reply in zip(replied(each, prompts), replies, strict=True)], bool)
        for each in (before, after)
    ]
    figures = [figures_of(evaluate(each), LearningError) for each in (before, after)]
    return _verdict(right, figures, max_drop, confidence, _losses(figures[0], lower_is_better, higher_is_better))


def replied(model: Servable, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The texts of greedy replies, until the model ends them or the cache is full.

    What clients gave as `stop` and `max_tokens` is not in samples.
    """
    if not prompts:
        return []
    steps = model.generator.steps
    longest = 1 if steps.first_position is not None else max(map(len, prompts))
    found = model.generator.generate(prompts, max_tokens=steps.capacity - longest + 1)
    return [text_of(model, each.tokens) for each in found]


def text_of(model: Servable, tokens: Sequence[int]) -> str:
    """The text of a reply, as feedback knows it."""
    tokenizer = model.generator.tokenizer
    return text_of_tokens(tokens) if tokenizer is None else tokenizer.decode(tokens)


def _verdict(
    right: Sequence[np.ndarray],
    figures: Sequence[Mapping[str, float]],
    max_drop: float,
    confidence: float,
    losses: Collection[str],
) -> Verdict:
    """What follows from which rows two versions get right, and from their metrics on old data."""
    gained, lost = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    chance = sign_test(gained, lost)
    old_before, old = map(dict, figures)
    accuracies = [float(each.mean()) if len(each) else math.nan for each in right]
    rows = len(right[0])
    fallen = _fallen(old_before, old, max_drop, losses)
    if fallen:
        reason = f"on old data {fallen}"
    elif chance > 1 - confidence:
        reason = (
            f"not surely better on {rows} samples: {gained} more are right and {lost} more are wrong, which "
            f"happens by chance with probability {chance:.2g}"
        )
    else:
        reason = f"{accuracies[0]:.1%} -> {accuracies[1]:.1%} right of {rows} samples, old data kept"
    better = not fallen and chance <= 1 - confidence
    return Verdict(better, reason, rows, accuracies[0], accuracies[1], chance, old_before, old)


def _losses(names: Collection[str], lower: Collection[str], higher: Collection[str]) -> set[str]:
    """The metrics that are better when they are smaller."""
    for name in lower:
        if name not in names:
            raise LearningError(f"lower_is_better names {name!r}; the metrics on old data are {', '.join(names)}")
    by_name = {name for name in names if any(word in name.lower() for word in _LOSSES)}
    return by_name.difference(higher).union(lower)


def _fallen(before: Mapping[str, float], after: Mapping[str, float], max_drop: float, losses: Collection[str]) -> str:
    """The first metric that got too much worse, as text; NaN is worse than anything."""
    for name, value in before.items():
        now = after.get(name, math.nan)
        drop = now - value if name in losses else value - now
        if math.isnan(now) or drop > max_drop + 1e-9:
            return f"{name} goes from {value:.4g} to {now:.4g}, and may get worse by {max_drop:g}"
    return ""
