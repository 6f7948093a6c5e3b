"""Accuracy over time: what users got, from samples and their feedback, whatever version answered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lepton_xla.dtypes import classes_of
from lepton_xla.samples import Sample


class Window(NamedTuple):
    """Some time, and how many answers were right in it.

    Attributes:
        start_s, stop_s: seconds since the epoch, of its first and last request.
        rows: rows with feedback.
        accuracy: the share that was right.
        versions: those that answered, in the order of their first answer.
    """

    start_s: float
    stop_s: float
    rows: int
    accuracy: float
    versions: tuple[str, ...]


def accuracy_over_time(
    samples: Iterable[Sample], output: str | Callable[[Sample], bool | None], windows: int = 24
) -> list[Window]:
    """Cut samples with feedback into windows of about equally many requests.

    Args:
        samples: in the order of their time; those without the output or without feedback are left out.
        output: name of the output whose largest element is the answer, `[rows, classes]`; or what says whether the
            reply of a model that generates is right (None: left out).
        windows: how many, or less where there are fewer requests.

    >>> right, wrong = np.float32([[0, 1]]), np.float32([[1, 0]])
    >>> samples = [Sample("", "12"[i > 1], i, {}, {"y": right if i else wrong}, frozenset(), (1,)) for i in range(4)]
    >>> [(window.accuracy, window.versions) for window in accuracy_over_time(samples, "y", windows=2)]
    [(0.5, ('1',)), (1.0, ('2',))]
    """
    judged: list[tuple[float, int, int, str]] = []
    for sample in samples:
        if not isinstance(output, str):
            replied = output(sample)
            if replied is not None:
                judged.append((sample.time_s, int(replied), 1, sample.version))
            continue
        answers = sample.outputs.get(output)
        if sample.labels is None or answers is None or output in sample.hashed or answers.ndim != 2:
            continue
        right = int((classes_of(answers) == list(sample.labels)).sum())
        judged.append((sample.time_s, right, len(sample.labels), sample.version))
    each = -(-len(judged) // max(1, windows))
    found: list[Window] = []
    for part in itertools.batched(judged, max(each, 1)):
        rows = sum(count for _, _, count, _ in part)
        versions = tuple(dict.fromkeys(version for *_, version in part))
        accuracy = sum(right for _, right, _, _ in part) / max(rows, 1)
        found.append(Window(part[0][0], part[-1][0], rows, accuracy, versions))
    return found
