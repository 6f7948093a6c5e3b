"""What two versions have done since a rollout began, however often the server was started again meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict, cast

import msgspec

from lepton_xla.errors import RepositoryError
from lepton_xla.files.copies import read_text
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.monitor.alerts import judged_rows
from lepton_xla.serve.monitor.history import Counts, History, difference
from lepton_xla.serve.observe.metrics import added

FILE = ".evidence.json"
# What is looked at, and of that what is kept on the disk: histograms of features are many.
_KEPT = ("request_s", "failures", "rejected", "expired", "feedback", "shadow")
_LOOKED_AT = (*_KEPT, "sketch")


# JSON has no other numbers, and a count is exact up to here.
type _Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)] | Annotated[float, msgspec.Meta(ge=0, le=2**53)]
type _Sum = Annotated[int, msgspec.Meta(ge=0)] | Annotated[float, msgspec.Meta(ge=0)]


class _Judged(TypedDict, total=False):
    """Counters of feedback, see `Feedback.counts`."""

    right: _Count
    wrong: _Count
    weighted: Annotated[list[_Sum], msgspec.Meta(min_length=5, max_length=5)]
    labels: dict[str, Annotated[list[_Count], msgspec.Meta(min_length=3, max_length=3)]]


class Kept(TypedDict, total=False):
    """Counters as they are kept."""

    request_s: list[_Sum]
    failures: _Count
    rejected: _Count
    expired: _Count
    feedback: _Judged
    shadow: dict[str, _Count]


class Saved(msgspec.Struct, frozen=True):
    """Evidence on the disk.

    Attributes:
        started_s: of the rollout or the bandit that it belongs to.
        stage: that the rollout was in.
        before: answers of the new version before that stage.
        counts: version -> what it has done since the rollout began.
    """

    started_s: float
    stage: int
    before: float
    counts: dict[str, Kept] = {}


def read_evidence(repository: Repository, name: str) -> Saved | None:
    """The evidence that is kept of a model; None without any, or where it is damaged: it begins anew then."""
    try:
        text = read_text(repository.root / name / FILE)
        return None if text is None else msgspec.json.decode(text, type=Saved)
    except (RepositoryError, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def write_evidence(repository: Repository, name: str, saved: Saved) -> None:
    """Keep the evidence of a model, beside its `traffic.json`."""
    repository.note(name, FILE, msgspec.json.encode(saved))


class Tally:
    """The counters of one version since a moment, which go on when the server's begin at zero again.

    Args:
        carried: what was counted since then by earlier processes.

    Attributes:
        last: what was counted since then, as last looked at.
        history: that, over time.

    >>> tally = Tally({"failures": 2})
    >>> [tally.grown({"failures": count})["failures"] for count in (10, 13, 1)]
    [2, 5, 6]
    """

    def __init__(self, carried: Counts | None = None) -> None:
        self._carried: Counts = dict(carried or {})
        self._base: Counts | None = None
        self._last: Counts = {}
        self.last: dict[str, Any] = dict(carried or {})
        self.history = History()

    def grown(self, counts: Counts) -> dict[str, Any]:
        """What was counted since the moment.

        Args:
            counts: the server's counters now.
        """
        counts = {name: counts[name] for name in _LOOKED_AT if name in counts}
        if self._base is None:
            self._base = counts
        elif _total(counts) < _total(self._last):
            self._carried, self._base = self._joined(difference(self._last, self._base)), {}
        self._last = counts
        self.last = self._joined(difference(counts, self._base))
        return self.last

    def _joined(self, counts: Counts) -> dict[str, Any]:
        """What was carried, and more; only that where a server of another version has counted into other bins."""
        try:
            return added(self._carried, counts)
        except ValueError:
            self._carried = {}
            return dict(counts)

    def look(self, now_s: float, counts: Counts) -> None:
        """Adds what was counted by now to the history."""
        queued = {"queue_rows": counts.get("now", {}).get("queue_rows", 0)}
        self.history.add(now_s, {**self.grown(counts), "now": queued})

    def kept(self) -> Kept:
        """What is kept on the disk."""
        return cast("Kept", {name: self.last[name] for name in _KEPT if name in self.last})


def answers(counts: Counts) -> float:
    """Answers that a version has given, those of a shadow included."""
    shadow: Mapping[str, int] = counts.get("shadow", {})
    mirrored = shadow.get("same", 0) + shadow.get("different", 0) + shadow.get("failed", 0)
    return sum(counts.get("request_s", [0, 0])[:-1]) + counts.get("failures", 0) + mirrored


def _total(counts: Counts) -> float:
    """Something that only grows while a server runs."""
    return answers(counts) + judged_rows(counts)
