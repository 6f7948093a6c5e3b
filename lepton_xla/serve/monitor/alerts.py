"""Evaluates alert rules on what was counted, and tells when alerts begin and end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lepton_xla.certificates import Certificate
from lepton_xla.profiles import Profile, tensor_of
from lepton_xla.serve.monitor.drift import Drift, drifts
from lepton_xla.serve.monitor.history import Counts, History
from lepton_xla.serve.monitor.rules import Condition, Rule

type State = Literal["unknown", "ok", "pending", "firing"]


class Subject(NamedTuple):
    """A model version, as rules see it.

    Attributes:
        history: its counters.
        bounds: upper bounds of the bins of `request_s`, seconds.
        profile: of the known data, if its artifact has one.
        certificate: of what it promises, if its artifact has one.
    """

    history: History
    bounds: Sequence[float]
    profile: Profile | None
    certificate: Certificate | None = None


@dataclasses.dataclass(slots=True)
class Alert:
    """A rule applied to a model version.

    Attributes:
        rule: the rule.
        model, version: what it was applied to.
        state: `unknown` where there are too few data, `pending` while its condition holds but not for long enough.
        value: of the quantity; NaN if unknown.
        since_s: when the state began, seconds since the epoch.
    """

    rule: Rule
    model: str
    version: str
    state: State
    value: float
    since_s: float


class Alerts:
    """The state of all alerts.

    Args:
        rules: the rules.
        tell: called with an alert that begins to fire or stops.

    >>> from lepton_xla.serve.monitor.rules import Rules
    >>> rules = Rules.parse("[[rule]]\\nname = 'many'\\nwhen = 'queue > 10'").rules
    >>> history = History()
    >>> alerts = Alerts(rules, lambda alert: print(alert.rule.name, alert.state, alert.value))
    >>> for second, rows in enumerate((0, 20, 20, 0)):
    ...     _ = history.add(second, {"now": {"queue_rows": rows}})
    ...     alerts.look(second, {("digits", "1"): Subject(history, (), None)})
    many firing 20
    many ok 0
    """

    def __init__(self, rules: Sequence[Rule], tell: Callable[[Alert], object]) -> None:
        self._rules = tuple(rules)
        self._tell = tell
        self._alerts: dict[tuple[str, str, str], Alert] = {}
        self._held_since: dict[tuple[str, str, str], float] = {}

    def __iter__(self) -> Iterator[Alert]:
        return iter(tuple(self._alerts.values()))

    def look(self, now_s: float, subjects: Mapping[tuple[str, str], Subject]) -> None:
        """Evaluates all rules.

        Args:
            now_s: seconds since the epoch.
            subjects: (model, version) -> what is known of it. Alerts of others end.
        """
        seen: set[tuple[str, str, str]] = set()
        for (model, version), subject in subjects.items():
            drift_over: dict[float, dict[str, Drift] | None] = {}
            for rule in self._rules:
                if rule.condition.quantity == "certificate" and subject.certificate is None:
                    continue
                if rule.model in ("", model) and rule.version in ("", version):
                    key = (rule.name, model, version)
                    seen.add(key)
                    self._set(key, rule, now_s, measure(rule.condition, subject, drift_over))
        for key in [key for key in self._alerts if key not in seen]:
            self._end(key, now_s)

    def restart(self, model: str, version: str, quantities: Collection[str], now_s: float) -> None:
        """Ends the alerts of a version that are about some quantities: what was measured is gone."""
        for key, alert in tuple(self._alerts.items()):
            if key[1:] == (model, version) and alert.rule.condition.quantity in quantities:
                self._end(key, now_s)

    def _set(self, key: tuple[str, str, str], rule: Rule, now_s: float, value: float | None) -> None:
        alert = self._alerts.get(key)
        if alert is None:
            alert = self._alerts[key] = Alert(rule, key[1], key[2], "unknown", math.nan, now_s)
        before = alert.state
        if value is None:
            # Without data an alert stays as it is: a model that is not asked has not become right.
            return
        alert.value = value
        if rule.condition.holds(value):
            since = self._held_since.setdefault(key, now_s)
            alert.state = "firing" if now_s - since >= rule.condition.hold_s else "pending"
        else:
            self._held_since.pop(key, None)
            alert.state = "ok"
        if alert.state != before:
            alert.since_s = now_s
            if "firing" in (alert.state, before):
                self._tell(alert)

    def _end(self, key: tuple[str, str, str], now_s: float) -> None:
        alert = self._alerts.pop(key)
        self._held_since.pop(key, None)
        if alert.state == "firing":
            alert.state, alert.since_s = "ok", now_s
            self._tell(alert)


def measure(
    condition: Condition, subject: Subject, drift_over: dict[float, dict[str, Drift] | None] | None = None
) -> float | None:
    """The value of a condition's quantity; None with too few data.

    Args:
        condition: the condition.
        subject: what it is about.
        drift_over: keeps drifts by window, for several conditions of one subject.
    """
    name, history = condition.quantity, subject.history
    if name == "queue":
        return history.now.get("now", {}).get("queue_rows")
    if name == "certificate":
        return history.now.get("certificate")
    if name in ("accuracy", "recall", "precision"):
        counted = history.last(int(condition.over), judged_rows)
        return None if counted is None else _rightness(condition, counted["feedback"])
    if name == "agreement":
        counted = history.last(int(condition.over), mirrored_rows)
        return None if counted is None else counted["shadow"]["same"] / mirrored_rows(counted)
    if name in ("drift", "shift", "ks", "missing"):
        return _drift(condition, subject, {} if drift_over is None else drift_over)
    window = history.over(condition.over)
    if window is None:
        return None
    counted, seconds = window
    if name == "falls":
        return counted.get("falls", {}).get(condition.argument)
    answered = sum(counted.get("request_s", [0, 0])[:-1])
    if name == "requests":
        return answered / seconds
    if name.startswith("p"):
        return quantile(counted.get("request_s", [0, 0])[:-1], subject.bounds, float(name[1:]) / 100)
    what = {"errors": "failures", "rejected": "rejected", "expired": "expired"}[name]
    asked = answered + sum(counted.get(each, 0) for each in ("failures", "rejected", "expired"))
    return counted.get(what, 0) / asked if asked else None


def judged_rows(counts: Counts) -> int:
    """Rows with feedback, as counted."""
    feedback = counts.get("feedback", {})
    return feedback.get("right", 0) + feedback.get("wrong", 0)


def mirrored_rows(counts: Counts) -> int:
    """Rows that a version was asked as a shadow, and whose answers were compared."""
    shadow = counts.get("shadow", {})
    return shadow.get("same", 0) + shadow.get("different", 0)


def _rightness(condition: Condition, feedback: Mapping[str, Any]) -> float | None:
    if condition.quantity == "accuracy":
        return feedback["right"] / (feedback["right"] + feedback["wrong"])
    right, of_class, answered = feedback["labels"].get(condition.argument, (0, 0, 0))
    total = of_class if condition.quantity == "recall" else answered
    return right / total if total else None


def _drift(condition: Condition, subject: Subject, drift_over: dict[float, dict[str, Drift] | None]) -> float | None:
    if condition.over not in drift_over:
        drift_over[condition.over] = drift_now(subject, int(condition.over))
    found = drift_over[condition.over]
    if found is None:
        return None
    values = [
        getattr(each, "psi" if condition.quantity == "drift" else condition.quantity)
        for name, each in found.items()
        if condition.argument in ("", name, tensor_of(name))
    ]
    return max(values, default=None)


def drift_now(subject: Subject, rows: int) -> dict[str, Drift] | None:
    """The drift of each feature over the last so many rows; None with fewer, or without a profile."""
    if subject.profile is None:
        return None
    bins = subject.profile.bins
    counted = subject.history.last(rows, lambda counts: _sketched(counts, bins))
    return None if counted is None else drifts(subject.profile, counted["sketch"][bins])


def _sketched(counts: Counts, bins: str) -> int:
    return max((sum(each) for each in counts.get("sketch", {}).get(bins, {}).values()), default=0)


def quantile(counts: Sequence[float], bounds: Sequence[float], share: float) -> float | None:
    """A quantile of a histogram, between the bounds of its bin in proportion, as Prometheus' `histogram_quantile`."""
    total = sum(counts)
    if not total:
        return None
    below, rank = 0.0, share * total
    for index, count in enumerate(counts):
        if below + count >= rank and count:
            if index == len(bounds):
                return bounds[-1]
            low = bounds[index - 1] if index else 0.0
            return low + (bounds[index] - low) * (rank - below) / count
        below += count
    return bounds[-1]
