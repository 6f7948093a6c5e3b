"""Pushing a version to a running server, and its rollout: steps that a learner which was killed may take again."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lepton_xla.errors import LearningError
from lepton_xla.files.copies import listing_of
from lepton_xla.serve.client import RequestError
from lepton_xla.serve.client.repository import RepositoryClient

_STABLE = "stable"
_POLL_S = 1.0
# How long a version may take to load, and a server may be away while a rollout goes on.
_LOAD_S, _AWAY_S = 300.0, 120.0
_ENDS = ("promoted", "rolled back", "stopped")
_MISSING, _CONFLICT = 404, 409


class Push:
    """A model of a running server, as the place for new versions.

    Args:
        client: of the server's repository.
        model: name of the model.
        poll_s: seconds between two looks at a rollout.
        clock, sleep: seconds, monotonic; and waiting.

    >>> from lepton_xla.serve.client.repository import RepositoryClient
    >>> with RepositoryClient("http://127.0.0.1:9") as client:
    ...     Push(client, "digits").stable()
    Traceback (most recent call last):
    lepton_xla.serve.client.transport.RequestError: ...
    """

    def __init__(
        self,
        client: RepositoryClient,
        model: str,
        *,
        poll_s: float = _POLL_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._client = client
        self.model = model
        self._poll_s = poll_s
        self._clock = clock
        self._sleep = sleep

    def _versions(self) -> list[dict[str, Any]]:
        for found in self._client.models():
            if found["name"] == self.model:
                if found["problem"] and not found["versions"]:
                    raise LearningError(f"model {self.model!r} of {self._client.url}: {found['problem']}")
                return found["versions"]
        raise LearningError(
            f"{self._client.url} has no model {self.model!r} in its repository: push the artifact that is served, or "
            "name the model"
        )

    def stable(self) -> str:
        """The version that the label `stable` stands on; the label is put on the one that serves if it stands nowhere.

        Without it a version would serve all requests as soon as it is pushed.

        Raises:
            LearningError: if there is no version.
            RequestError: if the server cannot be reached, or refuses.
        """
        versions = self._versions()
        for each in versions:
            if _STABLE in each["labels"]:
                return each["version"]
        wanted = [each["version"] for each in versions if each["wanted"]]
        if not wanted:
            raise LearningError(f"model {self.model!r} has no version that is served")
        self._client.promote(self.model, wanted[-1], _STABLE)
        return wanted[-1]

    def free_version(self, used: Iterable[str] = ()) -> str:
        """One more than the greatest version that there is or was: what is known of a number must mean one version.

        Args:
            used: versions that the learner has pushed.
        """
        there = [each["version"] for each in self._versions()]
        rollout = self._rollout()
        if rollout is not None:
            there.append(rollout["version"])
        return str(1 + max((int(each) for each in (*there, *used)), default=0))

    def push(self, artifact: str | os.PathLike[str], version: str) -> bool:
        """Send an artifact as a version; that it is there already is well if it is the same one.

        Returns:
            Whether it is there; False if another one has taken the number.
        """
        try:
            self._client.push(artifact, self.model, version)
        except RequestError as error:
            if error.status != _CONFLICT:
                raise
            listing, _ = listing_of(pathlib.Path(artifact))
            same = {"version": version, "size_bytes": listing.size_bytes, "created": listing.created}
            return any(all(each[name] == value for name, value in same.items()) for each in self._versions())
        return True

    def wait_loaded(self, version: str) -> None:
        """Wait until the server has loaded a version.

        Raises:
            LearningError: if it cannot, or takes too long.
        """
        until_s = self._clock() + _LOAD_S
        state: dict[str, Any] = {}
        while self._clock() < until_s:
            for each in self._client.index():
                if each["name"] == self.model and each.get("version") == version:
                    state = each
            if state.get("state") == "READY":
                return
            if state.get("reason"):
                raise LearningError(f"the server cannot load version {version}: {state['reason']}")
            self._sleep(min(self._poll_s, 0.2))
        raise LearningError(
            f"the server has not loaded version {version} after {_LOAD_S:.0f} s: `versions` in its model.toml must be "
            "latest:1 or more, or name it"
        )

    def promote(self, version: str) -> None:
        """Move the label `stable` to a version."""
        self._client.promote(self.model, version, _STABLE)

    def remove(self, version: str) -> None:
        """Remove a version that was rolled back, which would stay loaded as the greatest one. It may be gone already.

        Raises:
            RequestError: if the server cannot be reached.
        """
        try:
            self._client.remove(self.model, version)
        except RequestError as error:
            # Where somebody has put a label on it, it stays.
            if error.status not in (_MISSING, _CONFLICT):
                raise

    def roll_out(
        self, wanted: Mapping[str, Any], tell: Callable[[Mapping[str, Any]], object] = lambda rollout: None
    ) -> dict[str, Any]:
        """Have the server roll a version out, and wait for the end. A rollout of the version that goes on is joined.

        Args:
            wanted: the rollout to ask for, with the `version`.
            tell: called with the rollout whenever it was looked at.

        Returns:
            The rollout at its end.

        Raises:
            RequestError: if the server refuses it, or is away for too long.
        """
        rollout = self._rollout()
        if rollout is None or rollout["version"] != wanted["version"]:
            rollout = self._client.start_rollout(self.model, wanted)
        seen_s = self._clock()
        while rollout["state"] not in _ENDS:
            tell(rollout)
            self._sleep(self._poll_s)
            try:
                found = self._rollout()
            except RequestError as error:
                # A server that starts again goes on with the rollout.
                if (error.status is not None and error.status < 500) or self._clock() - seen_s > _AWAY_S:
                    raise
                continue
            seen_s = self._clock()
            if found is None or found["version"] != wanted["version"]:
                return {**rollout, "state": "stopped", "reason": "another rollout took its place"}
            rollout = found
        return rollout

    def _rollout(self) -> dict[str, Any] | None:
        try:
            return self._client.rollout(self.model)
        except RequestError as error:
            if error.status == _MISSING:
                return None
            raise
