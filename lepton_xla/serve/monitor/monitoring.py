"""Looks at all model versions once a second: their drift, and the alert rules."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import time
from typing import NamedTuple

from lepton_xla.certificates import Certificate, Evidence
from lepton_xla.profiles import Profile
from lepton_xla.serve.monitor.alerts import Alert, Alerts, Subject, drift_now, judged_rows, measure
from lepton_xla.serve.monitor.drift import Drift
from lepton_xla.serve.monitor.falls import Falls
from lepton_xla.serve.monitor.history import Counts, History
from lepton_xla.serve.monitor.rules import QUANTITIES, Rule, Rules, parse_condition
from lepton_xla.serve.monitor.webhooks import Sender, summary_of

_log = logging.getLogger("lepton_xla.serve")

_KEPT = ("request_s", "failures", "rejected", "expired", "sketch", "feedback", "shadow")
WATCHED = frozenset((*_KEPT, "now"))
"""Names of the counts that `Monitoring` looks at."""
_OF_A_PROFILE = ("drift", "shift", "ks", "missing")
_DRIFT_ROWS = int(QUANTITIES["drift"].default)
CERTIFIED = Rule(
    name="certificate",
    when="certificate > 10000",
    condition=parse_condition("certificate > 10000"),
    severity="critical",
    summary="the accuracy that the artifact's certificate promises does not hold",
)
"""The rule that versions with a certificate are looked at by, unless there is another about it."""
_ACCURACY = parse_condition("accuracy < 1")


class Watched(NamedTuple):
    """A model version to look at.

    Attributes:
        model, version: its name and version.
        counts: what was counted of it in all processes: the `WATCHED`.
        bounds: upper bounds of the bins of `request_s`, seconds.
        profile: of the known data, if its artifact has one.
        certificate: of what it promises, if its artifact has one.
    """

    model: str
    version: str
    counts: Counts
    bounds: Sequence[float]
    profile: Profile | None
    certificate: Certificate | None = None


class _Promise:
    """What a version's certificate promises, and the evidence against it in its feedback."""

    def __init__(self, certificate: Certificate, seen: tuple[int, int]) -> None:
        assert certificate.promised is not None
        self.certificate = certificate
        self.seen = seen  # rows right and wrong that need no more looking at
        self._evidence = Evidence(certificate.promised)

    def look(self, counts: Counts) -> float:
        feedback = counts.get("feedback") or {"right": 0, "wrong": 0}
        right, wrong = self.seen
        self.seen = feedback["right"], feedback["wrong"]
        self._evidence.add(max(0, self.seen[0] - right), max(0, self.seen[1] - wrong))
        return self._evidence.value


class Monitoring:
    """Histories of what was counted, drift, and alerts.

    Args:
        rules: what to alert on, and where to.
        server_url: where the server is, for whoever gets an alert.
        sends: whether this process sends alerts; of several, one does.
        clock: seconds since the epoch.

    Raises:
        ServeError: if a rule needs a package that is not here.

    >>> monitoring = Monitoring(Rules.parse("[[rule]]\\nname = 'wrong'\\nwhen = 'accuracy < 0.9 over 10'"))
    >>> counts = {"feedback": {"right": 5, "wrong": 5, "labels": {}}}
    >>> monitoring.look([Watched("digits", "1", counts, (), None)])
    >>> [(alert.rule.name, alert.state, alert.value) for alert in monitoring.alerts]
    [('wrong', 'firing', 0.5)]
    """

    def __init__(
        self, rules: Rules | None = None, server_url: str = "", *, sends: bool = True, clock: Callable[[], float] = time
    ) -> None:
        rules = rules or Rules()
        self._clock = clock
        known = rules.rules
        if not any(each.condition.quantity == "certificate" for each in known):
            known = (*known, CERTIFIED)
        self._alerts = Alerts(known, self._tell)
        self._sender = Sender(rules.webhooks if sends else (), server_url)
        self._subjects: dict[tuple[str, str], Subject] = {}
        self._streams = {each.condition.argument for each in rules.rules if each.condition.quantity == "falls"}
        self._falls: dict[tuple[str, str], Falls] = {}
        if self._streams:
            Falls(self._streams)  # without its package the server does not start
        self._drifts: dict[tuple[str, str], dict[str, Drift]] = {}
        self._promises: dict[tuple[str, str], _Promise] = {}

    @property
    def alerts(self) -> Iterator[Alert]:
        """All alerts, those that are well included."""
        return iter(self._alerts)

    @property
    def drifts(self) -> Mapping[tuple[str, str], Mapping[str, Drift]]:
        """(model, version) -> feature -> its drift over the last 500 rows."""
        return self._drifts

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(model, version) of each whose certificate does not hold any more."""
        return [
            (alert.model, alert.version)
            for alert in self._alerts
            if alert.state == "firing" and alert.rule.condition.quantity == "certificate"
        ]

    def accuracy(self, model: str, version: str) -> float | None:
        """The accuracy over the last 1,000 rows with feedback, or all if there are fewer; None without any."""
        subject = self._subjects.get((model, version))
        if subject is None:
            return None
        judged = judged_rows(subject.history.now)
        return measure(dataclasses.replace(_ACCURACY, over=min(_ACCURACY.over, judged)), subject) if judged else None

    def look(self, watched: Iterable[Watched]) -> None:
        """Takes what was counted by now, and brings drift and alerts up to date. Versions that are left out end."""
        now_s = self._clock()
        subjects: dict[tuple[str, str], Subject] = {}
        for each in watched:
            key = (each.model, each.version)
            before = self._subjects.get(key)
            history = History() if before is None else before.history
            if before is not None and before.profile != each.profile:
                self._drifts.pop(key, None)
                self._alerts.restart(*key, _OF_A_PROFILE, now_s)
            counts = {name: each.counts[name] for name in _KEPT if name in each.counts}
            queued = {"queue_rows": each.counts.get("now", {}).get("queue_rows", 0)}
            if self._streams:
                falls = self._falls.get(key)
                if falls is None:
                    falls = self._falls[key] = Falls(self._streams)
                counts["falls"] = falls.look(counts, each.profile)
            if each.certificate is not None and each.certificate.promised is not None:
                promise = self._promises.get(key)
                if promise is None or promise.certificate != each.certificate:
                    # Counters go on if another artifact takes the place: what they say so far is of the one before.
                    seen = (0, 0) if promise is None else promise.seen
                    promise = self._promises[key] = _Promise(each.certificate, seen)
                counts["certificate"] = promise.look(counts)
            news = history.add(now_s, {**counts, "now": queued})
            subjects[key] = subject = Subject(history, each.bounds, each.profile, each.certificate)
            if news and (found := drift_now(subject, _DRIFT_ROWS)) is not None:
                self._drifts[key] = found
        self._subjects = subjects
        self._drifts = {key: each for key, each in self._drifts.items() if key in subjects}
        self._falls = {key: each for key, each in self._falls.items() if key in subjects}
        self._promises = {key: each for key, each in self._promises.items() if key in subjects}
        self._alerts.look(now_s, subjects)

    def _tell(self, alert: Alert) -> None:
        if alert.state == "firing":
            _log.warning("alert %s: %s", alert.rule.name, summary_of(alert))
        else:
            _log.info("alert %s has ended: %s version %s", alert.rule.name, alert.model, alert.version)
        self._sender.send(alert)

    def close(self) -> None:
        """Stops sending."""
        self._sender.close()
