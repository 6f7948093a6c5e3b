"""What all workers have loaded, as `Memory` looks at it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import time
from typing import Any

from lepton_xla.serve.models.changes import Change
from lepton_xla.serve.processes.child import Child


class Kept:
    """A version that every worker has loaded; a `Version` of `Memory`. Whoever holds it says that some have it still.

    Args:
        name, version: what it is called.
        nbytes: what it takes in one worker, the most of all, until workers report it.
        pinned: whether it is never evicted.
        workers: all of them.

    Attributes:
        name, pinned: as given.
        devices: the one that each worker has.
    """

    def __init__(self, name: str, version: str, nbytes: int, pinned: bool, workers: Sequence[Child]) -> None:
        self.name = name
        self._told_bytes = nbytes
        self.pinned = pinned
        self.devices = (0,)
        self._key = f"{name}/{version}"
        self._workers = workers
        self._opened_s = time()

    def _counts(self) -> Iterator[dict[str, Any]]:
        return (child.counts[self._key] for child in self._workers if self._key in child.counts)

    @property
    def nbytes(self) -> int:
        """What it takes in one worker, the most of all: less while others share its code."""
        reported = (each.get("now", {}).get("model_bytes", 0) for each in self._counts())
        return int(max(reported, default=0)) or self._told_bytes

    @property
    def used_s(self) -> float:
        """When it last ran a batch, as far as workers have reported, or was loaded."""
        return max((self._opened_s, *(each.get("last_s", 0.0) for each in self._counts())))

    @property
    def requests(self) -> int:
        """How many were answered, as far as workers have reported."""
        return sum(int(sum(each.get("request_s", (0,))[:-1])) for each in self._counts())

    @property
    def busy(self) -> bool:
        """Whether a request waited for it when a worker last reported."""
        return any(each.get("now", {}).get("queue_requests", 0) for each in self._counts())


class Roster:
    """The versions that all workers have; a `Loaded` of `Memory`.

    Args:
        workers: all of them.
    """

    def __init__(self, workers: Sequence[Child]) -> None:
        self._workers = workers
        self._sizes: dict[int, dict[str, int]] = {}
        self._models: dict[str, dict[str, Kept]] = {}

    def __iter__(self) -> Iterator[Kept]:
        return (kept for versions in self._models.values() for kept in versions.values())

    def names(self) -> list[str]:
        """The names of the models."""
        return list(self._models)

    def prepared(self, number: int, sizes: dict[str, int]) -> None:
        """A worker has told what the versions of a change take."""
        known = self._sizes.setdefault(number, {})
        for version, nbytes in sizes.items():
            known[version] = max(known.get(version, 0), nbytes)

    def committed(self, number: int, change: Change) -> list[Kept]:
        """A change is carried out; returns what it takes out, to be held until all workers have freed that."""
        sizes = self._sizes.pop(number, {})
        versions = self._models.setdefault(change.name, {})
        gone = [versions.pop(version) for version in (*change.load, *change.retire) if version in versions]
        for version, source in change.load.items():
            pinned = source.serving.pinned
            versions[version] = Kept(change.name, version, sizes.get(version, 0), pinned, self._workers)
        if not versions:
            del self._models[change.name]
        return gone
