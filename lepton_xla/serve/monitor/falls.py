"""Falls of a model's accuracy and confidence, found in the stream of its rows by ADWIN, of the package river.

A window of rows has one length, so it is slow to tell of a small fall or tells of one that is chance. ADWIN keeps as
long a window as nothing has changed in, and bounds how often it is wrong.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.environment.extras import Needs
from lepton_xla.profiles import Profile

STREAMS = ("accuracy", "confidence")
# Rows of a stream between two looks. Of more, so many are taken, evenly: an update takes microseconds.
_MOST_ROWS = 500


class Falls:
    """Counts how often the means of some streams of one model version have fallen.

    Args:
        streams: which, of `STREAMS`.

    Raises:
        MissingPackageError: without the package.

    Source:
        Bifet and Gavaldà, "Learning from time-changing data with adaptive windowing", 2007.
    """

    def __init__(self, streams: Iterable[str]) -> None:
        with Needs("drift", "the quantity falls"):
            drift: Any = importlib.import_module("river.drift")
        self._new = drift.ADWIN
        self._windows = {name: self._new() for name in streams}
        self._seen: dict[str, tuple[str, list[int]]] = {}
        self.counts = dict.fromkeys(self._windows, 0)

    def look(self, counts: Mapping[str, Any], profile: Profile | None) -> dict[str, int]:
        """Takes the rows that were counted since the last look.

        Args:
            counts: of the version, which only grow.
            profile: whose bins its confidence is counted into.

        Returns:
            Stream -> how often its mean has fallen, ever.
        """
        for name, window in self._windows.items():
            kind, values, totals = _accuracy(counts) if name == "accuracy" else _confidence(counts, profile)
            before_kind, before = self._seen.get(name, (kind, [0] * len(totals)))
            self._seen[name] = kind, totals
            if before_kind != kind:
                # Other bins, another model: what was known of its confidence says nothing.
                window, before = self._new(), [0] * len(totals)
                self._windows[name] = window
            rows = [max(0, total - past) for total, past in zip(totals, before, strict=True)]
            for value in _in_turn(values, rows):
                mean = window.estimation
                window.update(value)
                self.counts[name] += bool(window.drift_detected and window.estimation < mean)
        return dict(self.counts)


def _accuracy(counts: Mapping[str, Any]) -> tuple[str, Sequence[float], list[int]]:
    feedback = counts.get("feedback") or {"right": 0, "wrong": 0}
    return "", (1.0, 0.0), [feedback["right"], feedback["wrong"]]


def _confidence(counts: Mapping[str, Any], profile: Profile | None) -> tuple[str, Sequence[float], list[int]]:
    """The bins of all confidences: what each stands for, and its rows."""
    values: list[float] = []
    rows: list[int] = []
    if profile is not None:
        sketch = counts.get("sketch", {}).get(profile.bins, {})
        for feature in profile.features:
            if feature.name.endswith(":confidence") and feature.edges:
                edges = (feature.edges[0], *feature.edges, feature.edges[-1])
                values += [(low + high) / 2 for low, high in itertools.pairwise(edges)]
                rows += sketch.get(feature.name, [0] * len(feature.counts))[:-1]
    return "" if profile is None else profile.bins, values, rows


def _in_turn(values: Sequence[float], rows: Sequence[int]) -> list[float]:
    """Each value as often as it has rows, evenly mixed: in which order they came is not known.

    >>> _in_turn((1.0, 0.0), (4, 2))
    [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    """
    total = sum(rows)
    if total > _MOST_ROWS:
        ends = np.round(np.cumsum(rows) * (_MOST_ROWS / total)).astype(int)
        rows = np.diff(ends, prepend=0).tolist()
    places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in rows]) if rows else np.empty(0)
    return np.repeat(np.array(values, float), rows)[np.argsort(places, kind="stable")].tolist()
