"""A client of the repository of a running server: sends artifacts in pieces, and moves labels."""

from __future__ import annotations

import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from lepton_xla.errors import ArtifactError, ServeError
from lepton_xla.files.copies import listing_of, open_file, signature_of
from lepton_xla.files.listing import MANIFEST, FileEntry
from lepton_xla.serve.client import documents
from lepton_xla.serve.client.calls import RequestOf, json_of, route
from lepton_xla.serve.client.sync_client import Client
from lepton_xla.serve.client.transport import RequestError
from lepton_xla.serve.protocol.uploads import ModelOnDisk
from lepton_xla.trust.bundles import SIGNATURE

PIECE_BYTES = 8 << 20
# A piece whose answer was lost is there already: the server says how much is, and sending goes on from there.
_CONFLICT = 409
_TOO_LARGE = 413
_MISSING = 404
# The server reads all files of a version, and flushes them to its disk, before it answers.
_CHANGE_S = 600.0
_LEAST_PIECE_BYTES = 1 << 10
_MOST_CONFLICTS = 100
# Artifacts are sent so often where others who push the same take the files.
_MOST_TIMES = 10
_LOOK_S = 0.1
# What is told of a version may be of an earlier one, until the server looks at its repository again.
_SURE_S = 3.0


class RepositoryClient(Client):
    """The repository of a server that was started with a folder of models. Options are those of `Client`.

    A push that is cut off is taken up where it ended by the next one. Files that the server has already are not sent.

    Raises:
        ServeError: for several URLs: a change is made on one server.
    """

    def _open(self) -> None:
        if self._replicas.several:
            raise ServeError(f"a repository is changed on one server, but several are given: {self.url}")
        super()._open()

    def models(self) -> list[dict[str, Any]]:
        """The models with their versions, sizes and labels."""
        return json_of(self._call(self._plain("/v2/repository/models"), self._attempts()), list[ModelOnDisk])

    def push(
        self,
        artifact: str | os.PathLike[str],
        name: str,
        version: str | None = None,
        tell: Callable[[int, int], object] = lambda sent, total: None,
    ) -> str:
        """Send an artifact as a new version.

        Args:
            artifact: a local artifact.
            name: the model's name in the repository.
            version: a version that is not there; by default one more than the greatest.
            tell: called with the bytes that are sent, and those of all files.

        Returns:
            The version.

        Raises:
            ArtifactError: if the artifact is missing or damaged.
            RequestError: if the server refuses it, or cannot be reached.
        """
        path = f"/v2/repository/models/{quote(name, safe='')}/versions" + (f"/{version}" if version else "")
        return self._change_by(
            pathlib.Path(artifact), tell, lambda sent: self._change(documents.PushedTold, "POST", path, sent)
        )["version"]

    def wait(self, name: str, version: str, label: str | None = None, *, seconds: float = 60.0) -> None:
        """Wait until the server answers by a version.

        Args:
            name: the model's name.
            version: the version.
            label: whose requests it must answer as well; None for requests that name the version.
            seconds: how long to wait at most.

        Raises:
            ServeError: if the server cannot load it, with the reason, or has not within that time.
            RequestError: if the server cannot be reached.
        """
        what, end = f"version {version} of model {name!r}", time.monotonic() + seconds
        failing_s: float | None = None
        while True:
            entries = {each.get("version", ""): each for each in self.index() if each["name"] == name}
            entry, now = entries.get(version) or entries.get("", {}), time.monotonic()
            # A version that is ready and has a reason answers by an older artifact, as the new one cannot be loaded.
            state, reason = entry.get("state"), entry.get("reason", "")
            failing_s = (failing_s or now) if state == "UNAVAILABLE" or reason else None
            if failing_s is not None and (now - failing_s >= _SURE_S or now > end):
                raise ServeError(f"{what} does not answer: {reason or 'it cannot be loaded'}")
            if state == "READY" and not reason and (label is None or label in self._labels(name, version)):
                return
            if now > end:
                raise ServeError(f"{what} does not answer after {seconds:g} s; `leptonx top` shows what is loaded")
            time.sleep(_LOOK_S)

    def _labels(self, name: str, version: str) -> list[str]:
        """The labels whose requests a version answers now."""
        return [
            label for each in self.traffic(name)["versions"] if each["version"] == version for label in each["labels"]
        ]

    def adjust(
        self,
        artifact: str | os.PathLike[str],
        name: str,
        *,
        tell: Callable[[int, int], object] = lambda sent, total: None,
        **plan: Any,
    ) -> dict[str, Any]:
        """Have the weights of a model move in steps towards those of an artifact, as long as accuracy holds.

        Args:
            artifact: a local artifact that keeps its float master, for the code of the version that serves.
            name: the model's name in the repository.
            tell: as `push` takes it.
            plan: `alpha`, `steps`, `every_s`, `max_drop` and `nearest`, see `AdjustmentRequest`.

        Returns:
            The adjustment, as `adjustment` answers.

        Raises:
            ArtifactError: if the artifact is missing or damaged.
            RequestError: if the server refuses it, or cannot be reached.
        """
        return self._change_by(
            pathlib.Path(artifact), tell,
            lambda sent: self._change(
                documents.AdjustmentTold, "PUT", f"{route(name)}/adjustment", {**plan, "manifest": sent["manifest"]}
            ),
        )  # fmt: skip

    def stop_adjustment(self, name: str) -> dict[str, Any]:
        """Have the last step go on serving; returns the adjustment."""
        return self._change(documents.AdjustmentTold, "DELETE", f"{route(name)}/adjustment")

    def _change_by(
        self,
        folder: pathlib.Path,
        tell: Callable[[int, int], object],
        change: Callable[[dict[str, str]], dict[str, Any]],
    ) -> dict[str, Any]:
        """Send the files of an artifact that are not there, and have a change made of them.

        Args:
            folder: the artifact.
            tell: as `push` takes it.
            change: given the digests of the manifest and the signature.
        """
        listing, data = listing_of(folder)
        digest = hashlib.sha256(data).hexdigest()
        files = {entry.sha256: (file, entry) for file, entry in listing.files.items() if entry.size}
        files[digest] = (MANIFEST, FileEntry(size=len(data), sha256=digest))
        body = {"manifest": digest}
        signature = signature_of(folder)
        if signature is not None:
            body["signature"] = hashlib.sha256(signature).hexdigest()
            files[body["signature"]] = (SIGNATURE, FileEntry(size=len(signature), sha256=body["signature"]))
        total = sum(entry.size for _, entry in files.values())
        there = self._sizes(list(files))
        times = 0
        all_there = False
        while True:
            sent = 0
            for file, entry in files.values():
                self._send(
                    folder, file, entry, there[entry.sha256], lambda size, before=sent: tell(before + size, total)
                )
                sent += entry.size
            times += 1
            try:
                return change(body)
            except RequestError as error:
                if error.status != _MISSING or times == _MOST_TIMES:
                    raise
                there = self._sizes(list(files))
                # Somebody who pushed the same at the same time has taken the files, and may have sent them again since:
                # only if nothing lacks twice, something else is missing.
                before, all_there = all_there, all(there[each] >= entry.size for each, (_, entry) in files.items())
                if before and all_there:
                    raise

    def promote(self, name: str, version: str, label: str = "stable") -> str | None:
        """Move a label to a version; returns the one that it stood on before."""
        return self._change(documents.MovedTold, "POST", _label(name, label), {"version": version})["stood_on"]

    def rollback(self, name: str, label: str = "stable") -> tuple[str, str]:
        """Move a label back; returns the version that it stood on, and the one that it stands on now."""
        moved = self._change(documents.MovedTold, "POST", _label(name, label), {"rollback": True})
        return moved["stood_on"], moved["stands_on"]

    def remove(self, name: str, version: str) -> None:
        """Remove a version."""
        self._change(
            documents.Named,
            "DELETE",
            f"/v2/repository/models/{quote(name, safe='')}/versions/{quote(version, safe='')}",
        )

    def set_traffic(self, name: str, traffic: Mapping[str, Any]) -> dict[str, Any]:
        """Share the requests for a model among its versions.

        Args:
            name: the model's name.
            traffic: such as `{"shares": {"stable": 0.95, "canary": 0.05}, "sticky": "x-user"}`.

        Returns:
            What `traffic` answers afterwards.
        """
        return self._change(documents.TrafficTold, "PUT", f"{route(name)}/traffic", traffic)

    def clear_traffic(self, name: str) -> dict[str, Any]:
        """Send all requests to one version again; returns what `traffic` answers afterwards."""
        return self._change(documents.TrafficTold, "DELETE", f"{route(name)}/traffic")

    def start_rollout(self, name: str, rollout: Mapping[str, Any]) -> dict[str, Any]:
        """Have a version take the place of the stable one, in stages and as long as it does well.

        Args:
            name: the model's name.
            rollout: such as `{"version": "4"}`, with stages and rules of its own if the default ones do not fit.

        Returns:
            The rollout, as `rollout` answers.
        """
        return self._change(documents.RolloutTold, "PUT", f"{route(name)}/rollout", rollout)

    def stop_rollout(self, name: str) -> dict[str, Any]:
        """Have the stable version answer all requests again; returns the rollout."""
        return self._change(documents.RolloutTold, "DELETE", f"{route(name)}/rollout")

    def _sizes(self, digests: list[str]) -> dict[str, int]:
        request = self._request("POST", "/v2/repository/blobs", msgspec.json.encode({"sha256": digests}))
        found = json_of(self._call(request, self._attempts()), documents.SizesTold)["sizes"]
        return {digest: found.get(digest, 0) for digest in digests}

    def _send(
        self, folder: pathlib.Path, file: str, entry: FileEntry, offset: int, tell: Callable[[int], object]
    ) -> None:
        conflicts, most = 0, PIECE_BYTES
        with open_file(folder, file) as opened:
            while offset < entry.size:
                opened.seek(offset)
                piece = opened.read(min(most, entry.size - offset))
                if not piece:
                    raise ArtifactError(
                        f"{folder}: {file} is damaged: it has fewer than the {entry.size} bytes of the manifest"
                    )
                request = self._request("PUT", f"/v2/repository/blobs/{entry.sha256}?offset={offset}", piece)
                answer = self._call(request, self._attempts())
                if answer.status == _TOO_LARGE and most > _LEAST_PIECE_BYTES:
                    most //= 2  # the server takes shorter bodies
                    continue
                if answer.status == _CONFLICT and conflicts < _MOST_CONFLICTS:
                    conflicts += 1
                    offset = self._sizes([entry.sha256])[entry.sha256]
                else:
                    offset = json_of(answer, documents.PieceTold)["size"]
                tell(min(offset, entry.size))

    def _change(self, kind: Any, method: str, path: str, body: Any = None) -> Any:
        """One attempt: what changes something is not sent twice."""
        request = self._request(method, path, *(() if body is None else (msgspec.json.encode(body),)))
        return json_of(self._call(request, self._attempts(max(self._timeout_s, _CHANGE_S), retries=0)), kind)

    def _request(self, method: str, path: str, *body: bytes) -> RequestOf:
        return lambda there, left_s: there.request(method, path, body)


def _label(name: str, label: str) -> str:
    return f"/v2/repository/models/{quote(name, safe='')}/labels/{quote(label, safe='')}"
