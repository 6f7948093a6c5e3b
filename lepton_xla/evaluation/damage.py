"""Which classes lost by a change, row by row."""

from __future__ import annotations

import dataclasses

import numpy as np

from lepton_xla.evaluation.intervals import Interval, paired_interval, sign_test


@dataclasses.dataclass(frozen=True)
class ClassDamage:
    """What became of the rows of one class.

    Attributes:
        label: the class.
        rows: rows that are of it.
        before, after: its recall.
        gained, lost: rows that only the second, and only the first model gets right.
        interval: of the difference of recall, paired.
        chance: the probability of so many more losses if both were equally good, by the sign test, times the number of
            classes that still compete (Holm 1979): below 0.05 the class lost surely.

    >>> from lepton_xla.evaluation import ClassDamage
    >>> damage = ClassDamage(3, 100, 0.98, 0.9, 0, 8, Interval(-0.15, -0.04, "Newcombe, paired"), 0.01)
    >>> damage.surely, round(damage.difference, 2)
    (True, -0.08)
    """

    label: int
    rows: int
    before: float
    after: float
    gained: int
    lost: int
    interval: Interval
    chance: float

    @property
    def difference(self) -> float:
        """The change of recall."""
        return self.after - self.before

    @property
    def surely(self) -> bool:
        """Whether the class lost by more than chance."""
        return self.chance < 0.05


def class_damage(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> list[ClassDamage]:
    """Compare two models class by class, the greatest loss first.

    Args:
        before, after: whether each row is right, bool `[rows]`.
        labels: the right classes.

    >>> before, after = np.array([True, True, True, False]), np.array([True, False, True, True])
    >>> [(each.label, each.difference) for each in class_damage(before, after, np.array([0, 0, 1, 1]))]
    [(0, -0.5), (1, 0.5)]
    """
    found: list[ClassDamage] = []
    for label in np.unique(labels):
        own = labels == label
        one, two = before[own], after[own]
        lost, gained = int((one & ~two).sum()), int((two & ~one).sum())
        interval = paired_interval(int((one & two).sum()), lost, gained, int((~one & ~two).sum()))
        chance = sign_test(lost, gained)
        shares = float(one.mean()), float(two.mean())
        found.append(ClassDamage(int(label), int(own.sum()), *shares, gained, lost, interval, chance))
    return sorted(_corrected(found), key=lambda each: (each.difference, each.label))


def _corrected(found: list[ClassDamage]) -> list[ClassDamage]:
    """Holm's correction: the smallest of n chances counts n times, the next n - 1 times."""
    made: list[ClassDamage] = []
    least = 0.0
    for place, each in enumerate(sorted(found, key=lambda each: each.chance)):
        least = max(least, min(1.0, each.chance * (len(found) - place)))
        made.append(dataclasses.replace(each, chance=least))
    return made
